"""Trained nets as files that others run: ONNX, a program of torch.export, or safetensors.

    alexnet-ddp export MODEL --format onnx|torch-export|safetensors [--half] [--dynamic-batch] [--out FILE]

    from alexnet_ddp.trained.export import export
    export(load_model("runs/alexnet_single"), Path("alexnet.onnx"), format="onnx")

A file is written under another name, opened as its users will open it, and gets its own name when its logits are the
checkpoint's (alexnet_ddp.trained.parity): no file that bears the name is half or wrong.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from alexnet_ddp.checkpoint import files
from alexnet_ddp.errors import UserError
from alexnet_ddp.trained import packed_weights, parity
from alexnet_ddp.trained.exported import EXTRA, INPUT, OUTPUT, TOLD, Precision, Told, onnx_runtime, quiet
from alexnet_ddp.trained.graph import ExportedNet
from alexnet_ddp.trained.model import Model, load_model
from alexnet_ddp.trained.parity import HALF_TOLERANCE, TOLERANCE, Parity

Format = Literal["onnx", "torch-export", "safetensors"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}
ONNX_LARGEST = 2**31 - 2**20  # bytes of weights: a protobuf message ends at 2 GiB


@dataclass(frozen=True)
class Exported:
    """`path` holds the net, `bytes` long; `parity`: what was found before it got its name. `notes`: for people."""

    path: Path
    bytes: int
    parity: Parity
    notes: list[str]


class _Graph(nn.Module):
    """What is exported: the net with float32 in and out, whatever it computes in."""

    def __init__(self, net: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.net = net
        self.dtype = torch.float16 if precision == "fp16" else torch.float32

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.to(self.dtype)).float()


def export(model: Model, out: Path, *, format: Format, precision: Precision = "fp32", batch: int | None = 1,
           images: Sequence[str] = (), replace: bool = False, tolerance: float | None = None) -> Exported:
    """Writes `model`, which must be on the CPU, to `out`, whole and with the checkpoint's logits or not at all.

    batch      of the graph: so many images at a time; None: any number (of safetensors, which hold no graph, always)
    precision  fp16: the graph's weights and sums; it takes and gives float32 all the same
    images     pictures that parity is shown on, see parity.show
    replace    a file that is there already
    tolerance  of a logit; None: parity.TOLERANCE, for fp16 parity.HALF_TOLERANCE of the largest logit (at least of 1)

    Raises UserError where the net can't be exported so, parity fails, the file can't be written or a package is
    missing.
    """
    _check(model, out, format=format, precision=precision, replace=replace)
    pixels, pictures, notes = parity.show(model, images)
    if precision == "fp16":
        parity.refuse_overflow(model, pixels)
    told = Told.of(model, precision=precision)
    with packed_weights.replacing(out) as fresh:
        written = _write(model, fresh, format=format, told=told, batch=batch)
        found = _parity(model, fresh, pixels=pixels, pictures=pictures, precision=precision, tolerance=tolerance)
        if not found.holds:
            raise UserError(f"The exported net isn't {model.where}: {found}. Nothing was kept."
                            + (" Leave out --half." if precision == "fp16" else ""))
        if out.exists() and not replace:
            raise UserError(_exists(out))
    return Exported(out, written, found, [*model.notes, *notes])


def _check(model: Model, out: Path, *, format: Format, precision: Precision, replace: bool) -> None:
    if isinstance(model.net, ExportedNet):
        raise UserError(f"{model.where} is an exported net already. Name the run, the checkpoint or the file of "
                        "weights that it was made of.")
    suffix = SUFFIXES[format]
    if out.suffix != suffix:
        raise UserError(f"A net in the format {format} is a {suffix} file, by which it is known again; got {out}. "
                        f"Name it {out.with_suffix(suffix)}.")
    if out.is_dir() or (out.exists() and not replace):
        raise UserError(_exists(out))
    scheme = None if model.quantization is None else model.quantization["scheme"]
    if scheme is not None and precision == "fp16":
        raise UserError(f"{model.where} is quantized ({scheme}), and what is left of it in floating-point stays fp32. "
                        "Leave out --half.")
    if scheme == "int8-dynamic" and format == "onnx":
        raise UserError(f"{model.where} is quantized as {scheme}, whose int8 products torch's ONNX exporter doesn't "
                        "know. Use --format torch-export, or quantize with --scheme int8-weight-only.")
    if not out.parent.is_dir():
        raise UserError(f"There is no folder {out.parent}. Make it, or name another.")
    packed_weights.check_folder(out)
    if format == "onnx":
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UserError(f"--format onnx needs {error.name}, which isn't installed here. Get it: {EXTRA}") from None
        onnx_runtime()
        held = sum(tensor.nbytes for tensor in model.net.state_dict().values())
        if held > ONNX_LARGEST:
            raise UserError(f"{model.where} has {held / 2**30:.1f} GiB of weights, and an ONNX file holds 2 GiB. Use "
                            "--format torch-export.")


def _exists(out: Path) -> str:
    return f"{out} is there already. Use --out for another name, or --force to replace it."


# --- formats ----------------------------------------------------------------------------------------------------


def _write(model: Model, path: Path, *, format: Format, told: Told, batch: int | None) -> int:
    """Writes and flushes the file; returns its size in bytes. Raises OSError, UserError."""
    if format == "safetensors":
        half = told.precision == "fp16"
        return packed_weights.write_to(path, packed=told, tensors={
            name: tensor.half() if half and tensor.is_floating_point() else tensor
            for name, tensor in model.tensors().items()}).bytes
    with quiet(), torch.no_grad():
        program = _program(model, precision=told.precision, batch=batch)
        data = _onnx(program, told) if format == "onnx" else _saved(program, told)
    return files.write(path, pieces=[data]).bytes


def _program(model: Model, *, precision: Precision, batch: int | None) -> ExportedProgram:
    net = copy.deepcopy(model.net).to(memory_format=torch.contiguous_format)
    graph = _Graph(net.half() if precision == "fp16" else net, precision).eval()
    size = model.preprocessing.size
    # torch takes an example of a single image, or of none, to mean that there is never another number.
    example = torch.zeros(batch or 2, model.preprocessing.channels, size, size)
    shapes = {INPUT: {0: Dim("batch", min=1)}} if batch is None else None
    program = torch.export.export(graph, (example,), dynamic_shapes=shapes)
    program.example_inputs = None  # they would be pickled into the file
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of code, and the paths of this machine
    return program


def _onnx(program: ExportedProgram, told: Told) -> memoryview:
    import onnx

    made = torch.onnx.export(program, (), input_names=[INPUT], output_names=[OUTPUT], dynamo=True, external_data=False,
                             verbose=False)
    assert made is not None
    proto = made.model_proto
    onnx.helper.set_model_props(proto, told.metadata())
    return memoryview(proto.SerializeToString())


def _saved(program: ExportedProgram, told: Told) -> memoryview:
    held = BytesIO()
    torch.export.save(program, held, extra_files={TOLD: json.dumps(told.metadata())})
    return held.getbuffer()


def _parity(model: Model, path: Path, *, pixels: Tensor, pictures: str, precision: Precision,
            tolerance: float | None) -> Parity:
    """Of the file, opened as its users will open it."""
    opened = load_model(path)
    if (opened.preprocessing, opened.classes) != (model.preprocessing, tuple(model.classes)):
        raise UserError(f"{path.name} doesn't hold the preprocessing and the classes of {model.where}.")
    if tolerance is not None:
        return parity.compare(model, opened.net, pixels=pixels, pictures=pictures, tolerance=tolerance)
    if precision == "fp16":
        return parity.compare(model, opened.net, pixels=pixels, pictures=pictures, tolerance=HALF_TOLERANCE,
                              relative=HALF_TOLERANCE)
    return parity.compare(model, opened.net, pixels=pixels, pictures=pictures, tolerance=TOLERANCE)
