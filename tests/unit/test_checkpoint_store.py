"""One checkpoint on the disk: bit-equal when whole, refused when damaged, never half there."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from alexnet_ddp.checkpoint import files, store
from alexnet_ddp.checkpoint.state import SCHEMA, TrainState
from alexnet_ddp.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
LINEAGE = {"attempt": 3, "recipe": {"lr": 0.1, "names": ["ä", "b"]}, "git": None}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def every_kind() -> TrainState:
    """A state with every dtype, odd sizes, 0-dim and empty tensors, and awkward names."""
    generator = torch.Generator().manual_seed(0)
    model: dict[str, Tensor] = {
        f"{dtype}": torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for dtype in files.DTYPES
    }
    model["features.0.weight"] = torch.randn(7, 3, 2, generator=generator)
    model["half"] = torch.randn(9, generator=generator).to(torch.bfloat16)
    model["tiny"] = torch.tensor([5e-45, -0.0, 1e-38])
    model["scalar"], model["empty"] = torch.tensor(2.5), torch.empty(0, 4)
    model['näme/with:all {kinds} "of" signs'] = torch.arange(3)
    return TrainState(
        step=120,
        epoch=2,
        position=1003,
        phase="evaluate",
        evaluated_step=60,
        skipped=2,
        skipped_in_a_row=1,
        damaged=4,
        best={"top1": 0.1 + 0.2, "step": 60},
        scaler={"scale": 65536.0, "growth_tracker": 17},
        model=model,
        optimizer={
            "momentum_buffer": {"features.0.weight": torch.randn(7, 3, 2, generator=generator)},
            "step": {"features.0.weight": torch.tensor(3.0), "a/b": torch.tensor(4)},
        },
        ema={"features.0.weight": torch.randn(7, 3, 2, generator=generator)},
        window=torch.rand(4, 3, generator=generator, dtype=torch.float64),
        window_rows=2,
    )


def small(step: int = 1) -> TrainState:
    """A state whose weights tell its step."""
    return TrainState(
        step=step, model={"w": torch.full((8,), float(step))}, optimizer={"m": {"w": torch.ones(8)}}
    )


def write(state: TrainState, directory: Path, **options: Any) -> Path:
    """Write with the arguments that don't matter to a test filled in."""
    directory.mkdir(exist_ok=True)
    options = {"attempt": 1, "lineage": LINEAGE, "guard": lambda: None, **options}
    return store.write(state, directory=directory, **options)


def assert_same(found: TrainState, expected: TrainState) -> None:
    """Equal in every bit: numbers, names, shapes, dtypes, contents."""
    assert json.dumps(found.plain(), sort_keys=True) == json.dumps(expected.plain(), sort_keys=True)
    for stem, tensors in expected.tensors().items():
        assert found.tensors()[stem].keys() == tensors.keys()
        for name, tensor in tensors.items():
            again = found.tensors()[stem][name]
            assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape), name
            bits = BITS[tensor.itemsize]
            assert torch.equal(again.contiguous().view(bits), tensor.contiguous().view(bits)), name


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    """Every dtype, shape, name and number comes back as it was, with the lineage, and can be written to."""
    state = every_kind()
    path = write(state, tmp_path / "checkpoints")
    assert path == tmp_path / "checkpoints" / "step_00000120"
    found, lineage = store.load(path)
    assert_same(found, state)
    assert lineage == LINEAGE
    found.model["features.0.weight"].add_(1)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_steps_beyond_eight_digits(tmp_path: Path) -> None:
    """A step of more than eight digits gets a longer name."""
    assert write(small(123456789), tmp_path).name == "step_123456789"


def test_other_programs_can_read_the_tensors(tmp_path: Path) -> None:
    """The files are safetensors files as the library itself writes and aligns them."""
    state = every_kind()
    path = write(state, tmp_path)
    found = safetensors.torch.load_file(path / "model.safetensors")
    assert found.keys() == state.model.keys()
    with safetensors.safe_open(path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    header = int.from_bytes((path / "model.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0


@pytest.mark.parametrize("schema", [1, 2])
def test_golden_checkpoints_load(schema: int) -> None:
    """A checkpoint of every schema there has been still loads, with the numbers it was written with."""
    state, lineage = store.load(GOLDEN / f"checkpoint_v{schema}")
    assert store.read_manifest(GOLDEN / f"checkpoint_v{schema}").schema == schema
    assert sorted(path.name for path in GOLDEN.iterdir()) == [f"checkpoint_v{n + 1}" for n in range(SCHEMA)]
    assert lineage == {"attempt": 1, "recipe": {"name": "golden", "seed": 0}}
    expected = TrainState(
        step=12,
        epoch=1,
        position=40,
        phase="evaluate",
        evaluated_step=6,
        skipped=1,
        skipped_in_a_row=0,
        damaged=2,
        best={"top1": 0.1 + 0.2, "step": 6},
        scaler={"scale": 65536.0, "growth_tracker": 5},
        model={
            "features.0.weight": torch.arange(12.0).reshape(2, 3, 2) / 7,
            "norm.running_mean": torch.tensor([0.5, -0.25], dtype=torch.bfloat16),
            "norm.num_batches_tracked": torch.tensor(12),
        },
        optimizer={"momentum_buffer": {"features.0.weight": torch.arange(12.0).reshape(2, 3, 2) / -3}},
        ema={} if schema == 1 else {"features.0.weight": torch.arange(12.0).reshape(2, 3, 2) / 5},
        window=torch.arange(6, dtype=torch.float64).reshape(2, 3) / 11,
        window_rows=1,
    )
    assert_same(state, expected)


FILES = ("manifest.json", "state.json", "model.safetensors", "optimizer.safetensors", "ema.safetensors",
         "window.safetensors")


@pytest.mark.parametrize("file", FILES)
def test_damage_to_any_file_is_found(tmp_path: Path, file: str) -> None:
    """Missing, empty, cut short, grown, or with a flipped bit anywhere: never loaded, the file named."""
    path = write(every_kind(), tmp_path)
    target, good = path / file, (path / file).read_bytes()

    def flipped(offset: int, mask: int) -> bytes:
        return good[:offset] + bytes([good[offset] ^ mask]) + good[offset + 1 :]

    # The ends and a sample of what lies between; 0x29 makes a tab of a space, which JSON would not mind.
    offsets = sorted({*range(0, len(good), max(1, len(good) // 40)), 7, 8, len(good) - 1})
    damages = [b"", good[:1], good[:-1], good[: len(good) // 2], good + b"\n", b"\0" * len(good)]
    damages += [flipped(offset, (0x29, 0x01, 0x80)[number % 3]) for number, offset in enumerate(offsets)]
    damages += [flipped(offset, 0x29) for offset, byte in enumerate(good) if byte == ord(" ")][::8]
    for damage in damages:
        target.write_bytes(damage)
        with pytest.raises(store.Damaged, match=file):
            store.load(path)
    with pytest.raises(store.Damaged, match=file):
        store.verify(path)
    target.unlink()
    with pytest.raises(store.Damaged, match=f"{file} is missing"):
        store.load(path)
    target.mkdir()
    with pytest.raises(store.Damaged, match=f"{file} can't be read"):
        store.load(path)
    target.rmdir()
    target.write_bytes(good)
    store.load(path)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_non_finite_weights_are_never_published(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    """One inf or nan in weights or momentum: refused by name, and nothing is left behind."""
    bad = torch.zeros(1000, dtype=dtype)
    bad[517] = value
    for state in (
        TrainState(model={"w": torch.zeros(3), "bad": bad}),
        TrainState(model={"w": torch.zeros(3)}, optimizer={"m": {"bad": bad}}),
    ):
        with pytest.raises(store.NotFinite, match="bad"):
            write(state, tmp_path)
    with pytest.raises(store.NotFinite, match="bad"):
        store.write_best(
            {"bad": bad}, run_dir=tmp_path, model="alexnet_single", step=1, top1=0.5, guard=lambda: None
        )
    assert list(tmp_path.iterdir()) == []


def test_guard_is_the_last_word(tmp_path: Path) -> None:
    """The guard is asked when all is written and nothing published; its refusal leaves all as it was."""
    write(small(1), tmp_path)
    seen: list[list[str]] = []

    def guard() -> None:
        seen.append(sorted(entry.name for entry in tmp_path.iterdir()))
        assert (tmp_path / ".tmp-4-2" / "manifest.json").exists()
        raise RuntimeError("lease lost")

    with pytest.raises(RuntimeError, match="lease lost"):
        write(small(2), tmp_path, attempt=4, guard=guard)
    assert seen == [[".tmp-4-2", "step_00000001"]]
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000001"]


def test_same_step_again_replaces(tmp_path: Path) -> None:
    """A step saved again, after its evaluation say, takes the place of the first and leaves nothing over."""
    write(small(5), tmp_path)
    later = TrainState(step=5, evaluated_step=5, model={"w": torch.full((8,), 5.0)})
    path = write(later, tmp_path, attempt=2)
    assert_same(store.load(path)[0], later)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000005"]


def test_a_disk_that_lies_is_found_before_the_publish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are read back: what comes back other than it was written is never published."""
    write(small(1), tmp_path)
    real = files.sync_directory

    def lie(directory: Path) -> None:
        file = directory / "model.safetensors"
        if file.exists():
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        real(directory)

    monkeypatch.setattr(files, "sync_directory", lie)
    with pytest.raises(store.Damaged, match="model.safetensors differs"):
        write(small(2), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000001"]


def test_best_is_one_plain_file(tmp_path: Path) -> None:
    """best.safetensors holds weights by name and says what it is; best.json says the same for people."""
    weights = small(7).model
    path = store.write_best(
        weights, run_dir=tmp_path, model="alexnet_single", step=7, top1=0.1 + 0.2, guard=lambda: None
    )
    assert torch.equal(safetensors.torch.load_file(path)["w"], weights["w"])
    assert store.read_best(tmp_path) == {"top1": 0.1 + 0.2, "step": 7, "model": "alexnet_single"}
    record = json.loads((tmp_path / "best.json").read_text())
    assert (record["model"], record["step"], record["top1"]) == ("alexnet_single", 7, 0.1 + 0.2)
    assert record["file"] == {"bytes": path.stat().st_size, "sha256": files.measure(path).sha256}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["best.json", "best.safetensors"]


def test_refused_best_leaves_the_old_one(tmp_path: Path) -> None:
    """A guard that refuses, or no file at all: the best is what it was."""
    assert store.read_best(tmp_path) is None
    options: dict[str, Any] = {"run_dir": tmp_path, "model": "m"}
    store.write_best(small(1).model, step=1, top1=0.6, guard=lambda: None, **options)

    def refuse() -> None:
        raise RuntimeError("lease lost")

    with pytest.raises(RuntimeError, match="lease lost"):
        store.write_best(small(2).model, step=2, top1=0.7, guard=refuse, **options)
    assert store.read_best(tmp_path) == {"top1": 0.6, "step": 1, "model": "m"}
    (tmp_path / "best.safetensors").write_bytes(b"no such thing")
    assert store.read_best(tmp_path) is None


def test_size_on_disk_is_an_upper_bound_and_close(tmp_path: Path) -> None:
    """The space asked for covers what is written, and not by much more."""
    state = TrainState(model={"w": torch.zeros(500_000)}, optimizer={"m": {"w": torch.zeros(500_000)}})
    path = write(state, tmp_path)
    written = sum(file.stat().st_size for file in path.iterdir())
    assert written <= store.size_on_disk(state) <= 1.02 * written


def test_space_is_checked_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little space is refused in megabytes; what the run's own checkpoints take counts as space."""
    directory = tmp_path / "run" / "checkpoints"
    free = 399_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(UserError, match=r"400 MB are needed \(2 kept.*100 MB each\), 399 MB are free"):
        store.check_space(directory, needed=100_000_000, keep=2)
    assert list(directory.iterdir()) == []
    own = directory / "step_00000001"
    own.mkdir()
    (own / "model.safetensors").write_bytes(bytes(1_000_000))
    store.check_space(directory, needed=100_000_000, keep=2)
    assert [entry.name for entry in directory.iterdir()] == ["step_00000001"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB of its own."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", mount], capture_output=True)
    if made.returncode:
        pytest.skip(f"can't mount a tmpfs here: {made.stderr.decode().strip()}")
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_full_disk_keeps_what_is_there(small_disk: Path) -> None:
    """ENOSPC in mid-save: the older checkpoint loads, the unfinished one is gone, the next one succeeds."""
    with pytest.raises(UserError, match="not enough space"):
        store.check_space(small_disk / "checkpoints", needed=1_000_000, keep=2)
    first = write(small(1), small_disk)
    large = TrainState(step=2, model={"w": torch.zeros(600_000)})
    with pytest.raises(OSError) as caught:
        write(large, small_disk)
    assert caught.value.errno == errno.ENOSPC
    assert {entry.name for entry in small_disk.iterdir()} - {"checkpoints"} == {"step_00000001"}
    assert_same(store.load(first)[0], small(1))
    write(small(3), small_disk)


def test_read_only_directory_is_refused(small_disk: Path) -> None:
    """A run directory that can't be written is the user's to change, and said so before the first step."""
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match=r"can't be written .*Read-only file system"):
        store.check_space(small_disk / "checkpoints", needed=10, keep=2)


@pytest.mark.parametrize("call", ["open", "fsync", "rename", "mkdir"])
def test_any_failing_call_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """An OSError from any file operation: the older checkpoint loads and nothing unfinished is left."""
    first = write(small(1), tmp_path)
    module = {"open": files, "mkdir": Path}.get(call, os)
    with monkeypatch.context() as patch:

        def fail(*args: Any, **options: Any) -> None:
            raise OSError(errno.EIO, "Input/output error")

        patch.setattr(module, call, fail, raising=False)
        with pytest.raises(OSError, match="Input/output error"):
            write(small(2), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000001"]
    assert_same(store.load(first)[0], small(1))
