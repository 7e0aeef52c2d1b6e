"""Exported nets: what is written into the files, and the files opened as nets again.

An ONNX file keeps it in metadata_props, a torch.export program in its extra file `alexnet_ddp.json` (an object of
texts): the entries of alexnet_ddp.trained.packed_weights, and

    class_names    JSON: the classes as people call them, in the order of the logits
    version        of alexnet-ddp
    precision      fp32 or fp16: of weights and sums; what goes in and comes out is float32 either way

The graph maps `images`, float32 [batch, channels, size, size] (normalised, see preprocessing), to `logits`, float32
[batch, classes]. Its batch is 1, or any.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

from alexnet_ddp import __version__
from alexnet_ddp import config as recipes
from alexnet_ddp.checkpoint import files
from alexnet_ddp.config import Config
from alexnet_ddp.errors import UserError, first_line
from alexnet_ddp.models.source import Source
from alexnet_ddp.trained.graph import ExportedNet, Signature
from alexnet_ddp.trained.model import NAMELESS, Model, changed, config_in_use
from alexnet_ddp.trained.packed_weights import MARK, VERSION, Packed, parse
from alexnet_ddp.trained.preprocessing import Preprocessing
from alexnet_ddp.trained.program_file import refuse_code

INPUT, OUTPUT = "images", "logits"
TOLD = "alexnet_ddp.json"  # the extra file of a torch.export program
EXTRA = "pip install 'alexnet-ddp[export]'"

Precision = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class Told(Packed):
    """What an exported file says of itself (see the module's head)."""

    class_names: tuple[str, ...] = ()
    version: str = __version__
    precision: Precision = "fp32"

    @classmethod
    def of(cls, model: Model, *, precision: Precision) -> Told:
        return cls(model=model.name, recipe=model.config.model_dump(mode="json"), classes=tuple(model.classes),
                   preprocessing=model.preprocessing.plain(), facts=model.facts, quantization=model.quantization,
                   class_names=tuple(model.spoken), precision=precision)

    def metadata(self) -> dict[str, str]:
        return {**super().metadata(), "class_names": json.dumps(list(self.class_names)), "version": self.version,
                "precision": self.precision}


def read_told(texts: Mapping[str, str], *, where: str) -> Packed | None:
    """What a file says of itself; None of one that isn't ours. Raises UserError where that can't be understood."""
    if MARK not in texts:
        return None
    try:
        if texts[MARK] != VERSION:
            raise ValueError(f"layout {texts[MARK]}, this version reads {VERSION}")
        told = parse(texts)
        Preprocessing.from_plain(told.preprocessing)
        return told
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"What {where} says of itself isn't understood ({error}). Export the net anew.") from None


# --- the files as nets ------------------------------------------------------------------------------------------


def open_exported(source: Source, overrides: Sequence[str], device: torch.device) -> Model:
    """The model in an exported file. `overrides`: as for a recipe; a file that isn't ours needs augment.size at least.

    A .pt2 is a program: open only such as you trust. Raises UserError when the file isn't whole, isn't a net of images,
    or doesn't say how images are brought to it, and where the packages to run it are missing.
    """
    run, signature, texts, notes = (_open_onnx if source.kind == "onnx" else _open_program)(source.path, device)
    where = str(source.path)
    told = read_told(texts, where=where)
    chosen = [recipes.parse_override(text) for text in overrides]
    if told is None:
        told = _foreign(source.path, signature, chosen)
        notes.append(f"{where} doesn't say how images are brought to it: the recipe's defaults are taken where nothing "
                     "else is asked for (augment.mean, augment.std, evaluate.crop)")
    config = config_in_use(recipes.apply_overrides(told.recipe, overrides))
    preprocessing = changed(Preprocessing.from_plain(told.preprocessing), before=config_in_use(told.recipe), now=config)
    _check(where, signature, config, preprocessing)
    classes = tuple(map(str, told.classes))
    if not classes:
        notes.append(NAMELESS)
    facts = {**told.facts, "source": where, "path": str(source.path.resolve()),
             "sha256": files.measure(source.path).sha256}
    net = ExportedNet(run, signature=signature, classes=config.model.num_classes)
    return Model(net, told.model, preprocessing, classes, config, _where(where, told), facts, notes, device)


def _where(where: str, told: Packed) -> str:
    step = told.facts.get("step")
    return f"{where} ({told.model}" + (f", step {step})" if step is not None else ")")


def _check(where: str, signature: Signature, config: Config, preprocessing: Preprocessing) -> None:
    """Raises UserError where overrides ask for another net than that of the file."""
    found = {"model.num_classes": (signature.classes, config.model.num_classes),
             "model.in_channels": (signature.channels, preprocessing.channels),
             "augment.size": (signature.sides[0], preprocessing.size),
             "augment.size (its width)": (signature.sides[1], preprocessing.size)}
    for name, (has, asked) in found.items():
        if has is not None and has != asked:
            raise UserError(f"{where} is a net of {name}={has}, which is fixed; got {asked}. Leave it out.")


def _foreign(path: Path, signature: Signature, chosen: Sequence[tuple[list[str], Any]]) -> Packed:
    """For a file of somebody else: what its graph and the user's words tell."""
    told = {".".join(name): value for name, value in chosen}
    needed = {"augment.size": signature.sides[0], "model.num_classes": signature.classes}
    missing = [name for name, known in needed.items() if name not in told and (known is None or name == "augment.size")]
    if missing:
        size = signature.sides[0] or 224
        raise UserError(f"{path} wasn't exported by alexnet-ddp: it doesn't say how photographs are brought to it, nor "
                        f"what its classes are called. Say it: {', '.join(missing)} at least, such as augment.size="
                        f"{size}, and augment.mean, augment.std where they aren't ImageNet's.")
    tree: dict[str, Any] = {"model": {"num_classes": signature.classes or told["model.num_classes"],
                                      "in_channels": signature.channels or 3},
                            "augment": {"size": signature.sides[0] or told["augment.size"]}}
    preprocessing = Preprocessing.of(config_in_use(tree)).plain()
    return Packed(model=path.stem, recipe=tree, classes=(), preprocessing=preprocessing)


# --- ONNX -------------------------------------------------------------------------------------------------------

Opened = tuple[Callable[[Tensor], Tensor], Signature, dict[str, str], list[str]]
NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


def onnx_runtime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f".onnx files are run by onnxruntime, which isn't installed here. Get it: {EXTRA}") from None
    return onnxruntime


def _open_onnx(path: Path, device: torch.device) -> Opened:
    """In onnxruntime, on as many threads as torch has; on the GPU where its build knows one."""
    runtime = onnx_runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
    providers = [name for name in wanted if name in runtime.get_available_providers()]
    notes = [f"this onnxruntime knows no GPU: {path} runs on the CPU (onnxruntime-gpu would)"] if wanted and not (
        providers) else []
    try:
        session = runtime.InferenceSession(str(path), options, providers=[*providers, "CPUExecutionProvider"])
    except Exception as error:  # of a dozen classes of the runtime's own
        raise UserError(f"{path} is no whole ONNX file that onnxruntime can run: {first_line(error)}.") from None
    inputs, outputs = session.get_inputs(), session.get_outputs()
    shapes = [[_number(side) for side in value.shape] for value in (*inputs, *outputs)]
    signature = _signature(path, shapes, inputs=len(inputs))
    if inputs[0].type not in NUMPY:
        raise UserError(f"{path} takes {inputs[0].type}, not images as numbers with a decimal point.")
    kind, name = NUMPY[inputs[0].type], inputs[0].name

    def run(images: Tensor) -> Tensor:
        found = session.run(None, {name: images.cpu().numpy().astype(kind, copy=False)})[0]
        return torch.from_numpy(found).to(images.device, torch.float32)

    return run, signature, dict(session.get_modelmeta().custom_metadata_map), notes


def _number(side: object) -> int | None:
    return side if isinstance(side, int) and side > 0 else None


def _signature(path: Path, shapes: Sequence[Sequence[int | None]], *, inputs: int) -> Signature:
    if inputs != 1 or len(shapes) != 2 or len(shapes[0]) != 4 or len(shapes[1]) != 2:
        shown = "; ".join(str([side or "any" for side in shape]) for shape in shapes)
        raise UserError(f"{path} is no net that classifies images: that has one input [batch, channels, height, width] "
                        f"and one output [batch, classes]. Its {inputs} inputs, then outputs: {shown}.")
    (batch, channels, height, width), (_, classes) = shapes
    return Signature(batch, channels, (height, width), classes)


# --- torch.export -----------------------------------------------------------------------------------------------


def _open_program(path: Path, device: torch.device) -> Opened:
    refuse_code(path)
    extra = {TOLD: ""}
    try:
        with quiet():
            program = torch.export.load(str(path), extra_files=extra)
            if device.type != "cpu":
                program = move_to_device_pass(program, device)
            graph = program.module()
        texts = json.loads(extra[TOLD]) if extra[TOLD] else {}
    except Exception as error:  # whatever a damaged archive makes of itself
        raise UserError(f"{path} is no whole program of torch.export that torch {torch.__version__} can read: "
                        f"{first_line(error)}.") from None
    taken, given = set(program.graph_signature.user_inputs), program.graph_signature.user_outputs
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    shown = [values[node.name] for node in program.graph.nodes if node.op == "placeholder" and node.name in taken]
    shapes = [[side if isinstance(side, int) else None for side in getattr(value, "shape", ())]
              for value in (*shown, *(values.get(str(name)) for name in given))]
    signature = _signature(path, shapes, inputs=len(shown))
    return graph, signature, texts, []


@contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries say to their own developers; what they say of our code is still heard."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(?!alexnet_ddp)")
        yield
