"""One checkpoint on the disk: written whole or not at all, verified by checksums, never loaded when damaged.

    checkpoints/step_00000120/
        model.safetensors       parameters and buffers by name
        optimizer.safetensors   `<state>/<parameter name>`
        ema.safetensors         running mean of the weights by parameter name, when one is kept
        window.safetensors      open accumulators of the logging window, when there are any
        state.json              the numbers
        manifest.json           schema, step, lineage, sha256 of every file and of itself; written last

It is written as `.tmp-<attempt>-<step>`, flushed, read back, and then renamed. When a step that is already
there is saved again (after its evaluation, say), the old one waits as `step_00000120.previous` until the
new one has the name: at every instant one of the two is there, and `choose` knows both names.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from alexnet_ddp.amounts import human_bytes
from alexnet_ddp.checkpoint import files
from alexnet_ddp.checkpoint.files import Written
from alexnet_ddp.checkpoint.state import SCHEMA, TrainState, check_plain, restore
from alexnet_ddp.errors import RunFailed, UserError

MANIFEST = "manifest.json"
STATE = "state.json"
SUFFIX = ".safetensors"
WEIGHTS, MEAN = "model" + SUFFIX, "ema" + SUFFIX
PYTORCH = {"format": "pt"}  # metadata by which libraries know whose layout a safetensors file has
PREVIOUS = ".previous"


class Damaged(Exception):
    """A checkpoint that does not verify: `path` is the checkpoint, `why` says what is wrong in it."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.path, self.why = path, why


class NotFinite(RunFailed):
    """Weights or optimizer state hold inf or nan: they are never published."""

    kind = "nonfinite"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself. `lineage` is what the run said of itself when it wrote it."""

    schema: int
    step: int
    files: dict[str, Written]
    lineage: dict[str, Any]

    def encode(self) -> bytes:
        """The one text of this manifest, with its own sha256 in it."""
        content = asdict(self)
        return _text({**content, "sha256": files.sha256(_text(content))})

    @property
    def size(self) -> int:
        """Size of all files but the manifest, in bytes."""
        return sum(file.bytes for file in self.files.values())


def decode(data: bytes) -> Manifest:
    """The manifest in a text. Raises ValueError for any text that `encode` would not have written."""
    content = json.loads(data)
    found = content.pop("sha256")
    # Compared as a whole text: a flipped byte that leaves the JSON's meaning alone is found too.
    if found != files.sha256(_text(content)) or data != _text({**content, "sha256": found}):
        raise ValueError("its content differs from its checksum")
    records = {name: Written(**record) for name, record in content["files"].items()}
    return Manifest(content["schema"], content["step"], records, content["lineage"])


def directory_name(step: int) -> str:
    """Directory name of the checkpoint of a step."""
    return f"step_{step:08d}"


def write(
    state: TrainState, *, directory: Path, attempt: int, lineage: dict[str, Any], guard: Callable[[], None]
) -> Path:
    """Write and publish the checkpoint of a CPU state (`to_cpu`); return its path. One writer at a time.

    `guard` is called right before the publish and stops it by raising. Raises TypeError for what is not
    plain, NotFinite, OSError (disk full, read-only, gone) and Damaged when the disk gives back other bytes
    than it was given. Whatever is raised, the checkpoints that were there still are, and the unfinished one
    is removed.
    """
    state.check()
    check_plain(lineage, where="lineage")
    refuse_non_finite(state.tensors())
    final, staging = directory / directory_name(state.step), directory / f".tmp-{attempt}-{state.step}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        written = {
            stem + SUFFIX: files.write_tensors(staging / (stem + SUFFIX), tensors=tensors, metadata=PYTORCH)
            for stem, tensors in state.tensors().items()
        }
        written[STATE] = files.write(staging / STATE, pieces=[_text(state.plain())])
        manifest = Manifest(SCHEMA, state.step, written, lineage)
        files.write(staging / MANIFEST, pieces=[manifest.encode()])
        files.sync_directory(staging)
        verify(staging)
        guard()
        _publish(staging, final)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return final


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint, checked against itself, at no cost. Raises Damaged."""
    with _damage(path, MANIFEST):
        data = files.read(path / MANIFEST)
    try:
        return decode(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(path, f"{MANIFEST} is damaged ({error})") from None


def verify(path: Path) -> Manifest:
    """Read every file of a checkpoint and compare it with the manifest. Raises Damaged."""
    manifest = read_manifest(path)
    for file, expected in manifest.files.items():
        with _damage(path, file):
            found = files.measure(path / file)
        _compare(path, file, found, expected)
    return manifest


def load(path: Path) -> tuple[TrainState, dict[str, Any]]:
    """The state (tensors on the CPU) and the lineage of a checkpoint; the bytes parsed are the bytes
    verified.

    Raises Damaged, and UserError when a newer version of the program wrote it.
    """
    manifest = read_manifest(path)
    plain, tensors = {}, {}
    for file, expected in manifest.files.items():
        data = _read(path, file, expected)
        if file == STATE:
            plain = json.loads(data)
        else:
            tensors[file.removesuffix(SUFFIX)] = safetensors.torch.load(data)
    return restore(plain, tensors=tensors, schema=manifest.schema), manifest.lineage


def load_weights(path: Path) -> tuple[dict[str, Tensor], Manifest]:
    """The weights that a checkpoint would publish (on the CPU; as `TrainState.published`), and its manifest.

    The bytes parsed are the bytes verified. Raises Damaged.
    """
    manifest = read_manifest(path)
    if WEIGHTS not in manifest.files:
        raise Damaged(path, f"{MANIFEST} tells of no {WEIGHTS}")
    tensors: dict[str, Tensor] = {}
    for file in (WEIGHTS, MEAN):
        if file in manifest.files:
            tensors |= safetensors.torch.load(_read(path, file, manifest.files[file]))
    return tensors, manifest


def refuse_non_finite(tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise NotFinite when weights or optimizer state hold inf or nan.

    The logging window may hold them: a step that was skipped because of infinite gradients has an infinite loss.
    """
    for file, named in tensors.items():
        for tensor_name, tensor in named.items() if file != "window" else ():
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            if real.is_floating_point() and real.numel():
                low, high = torch.aminmax(real)  # one pass, nothing allocated; a nan comes out of it
                if not (torch.isfinite(low) and torch.isfinite(high)):
                    raise NotFinite(
                        f"{tensor_name} ({file}) holds inf or nan: not saved, older checkpoints are intact"
                    )


def write_best(
    weights: Mapping[str, Tensor],
    *,
    run_dir: Path,
    model: str,
    step: int,
    top1: float,
    guard: Callable[[], None],
) -> Path:
    """Write `best.safetensors` (CPU weights by name) and, for people, `best.json`; each atomically.

    Step, top-1 and the model's name are in the metadata of the former, which so is the truth about itself
    whenever a kill comes. Raises as `write` does.
    """
    refuse_non_finite({"model": weights})
    path, fresh = run_dir / "best.safetensors", run_dir / ".tmp-best.safetensors"
    metadata = {**PYTORCH, "model": model, "step": str(step), "top1": repr(top1)}
    try:
        written = files.write_tensors(fresh, tensors=weights, metadata=metadata)
        guard()
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    files.sync_directory(run_dir)
    record = {"model": model, "step": step, "top1": top1, "file": asdict(written)}
    files.replace(run_dir / "best.json", content=_text(record))
    return path


def read_best(run_dir: Path) -> dict[str, Any] | None:
    """{"top1": float, "step": int, "model": str} of `best.safetensors`; None when none can be read."""
    try:
        with safetensors.safe_open(run_dir / "best.safetensors", framework="pt") as file:
            metadata = file.metadata()
        return {
            "top1": float(metadata["top1"]),
            "step": int(metadata["step"]),
            "model": str(metadata["model"]),
        }
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError):
        return None


def size_on_disk(state: TrainState) -> int:
    """Bytes that a checkpoint of this state takes, headers and manifest (generously) included."""
    tensors = [tensor for named in state.tensors().values() for tensor in named.values()]
    return sum(tensor.nbytes for tensor in tensors) + 256 * len(tensors) + 32768


def check_space(directory: Path, *, needed: int, keep: int) -> None:
    """Refuse in time what would fail at the first save, or at the third: no room, or no right to write.

    Room is needed for `keep` checkpoints of `needed` bytes, the one being written and `best.safetensors`;
    what this run's own checkpoints take already counts as room. Makes the directory. Raises UserError. A
    quota can't be asked for: it shows at the first save.
    """
    probe = directory / ".tmp-probe"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        files.write(probe, pieces=[b"can this directory be written?"])
        probe.unlink()
        files.sync_directory(directory.parent)
    except OSError as error:
        raise UserError(
            f"checkpoints can't be written in {directory}: {error.strerror or error}.\n"
            "Choose a place that can be written: runs=... is the folder of all run directories."
        ) from None
    wanted = (keep + 2) * needed
    own = sum(path.stat().st_size for path in directory.glob("step_*/*"))
    own += sum(path.stat().st_size for path in directory.parent.glob("best.safetensors"))
    free = shutil.disk_usage(directory).free
    if free + own < wanted:
        raise UserError(
            f"not enough space for checkpoints in {directory}: {human_bytes(wanted)} are needed "
            f"({keep} kept, one being written and the best, {human_bytes(needed)} each), "
            f"{human_bytes(free)} are free and {human_bytes(own)} are this run's already.\n"
            "Free some, or choose a larger disk: runs=... is the folder of all run directories."
        )


def _publish(staging: Path, final: Path) -> None:
    previous = final.with_name(final.name + PREVIOUS)
    if final.exists():
        if previous.exists():
            files.discard(previous)
        os.rename(final, previous)
    os.rename(staging, final)
    files.sync_directory(final.parent)
    if previous.exists():
        files.discard(previous)


@contextmanager
def _damage(path: Path, file: str) -> Iterator[None]:
    """A file of a checkpoint that can't be read is damage too."""
    try:
        yield
    except FileNotFoundError:
        raise Damaged(path, f"{file} is missing") from None
    except OSError as error:
        raise Damaged(path, f"{file} can't be read ({error.strerror or error})") from None


def _read(path: Path, file: str, expected: Written) -> bytes:
    """The content of a checkpoint's file, compared with the manifest. Raises Damaged."""
    with _damage(path, file):
        data = files.read(path / file)
    _compare(path, file, Written(len(data), files.sha256(data)), expected)
    return data


def _compare(path: Path, file: str, found: Written, expected: Written) -> None:
    if found.bytes != expected.bytes:
        raise Damaged(path, f"{file} has {found.bytes} bytes instead of {expected.bytes}")
    if found.sha256 != expected.sha256:
        raise Damaged(path, f"{file} differs from its checksum")


def _text(content: object) -> bytes:
    """JSON in one fixed form. Inf and nan are written as Python's json module reads them."""
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
