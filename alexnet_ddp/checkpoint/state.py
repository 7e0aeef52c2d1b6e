"""TrainState: all that a run needs to go on exactly, in plain tensors and plain Python; nothing per rank."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from alexnet_ddp.checkpoint.files import DTYPES
from alexnet_ddp.errors import UserError

TENSOR_FIELDS = ("model", "optimizer", "ema", "window")
PHASES = ("train", "evaluate")


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The state of a run between two steps.

    step            global batches consumed, whether or not the optimizer moved
    epoch           the epoch the next step belongs to
    position        samples of that epoch already trained on
    phase           "train", or "evaluate" when an evaluation is due before the next step
    evaluated_step  the step of the last finished evaluation; None before the first
    skipped         updates skipped for non-finite gradients, in all
    skipped_in_a_row  the same, since the last update that was made
    damaged         damaged samples met
    best            {"top1": float, "step": int} of the best evaluation; None before the first
    scaler          {"scale": float, "growth_tracker": int} under fp16, else None
    model           parameters and buffers by name, without DDP's `module.`
    optimizer       state name -> parameter name -> tensor; a state name has no "/" in it
    ema             running mean of the weights by parameter name; empty where none is kept
    window          float64 [rows, columns], the open accumulators of the logging window, or None
    window_rows     rows of it that are filled
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    phase: str = "train"
    evaluated_step: int | None = None
    skipped: int = 0
    skipped_in_a_row: int = 0
    damaged: int = 0
    best: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    model: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    ema: dict[str, Tensor] = field(default_factory=dict)
    window: Tensor | None = None
    window_rows: int = 0

    def check(self) -> None:
        """Raise TypeError, with the field's name, unless all is plain and can be saved.

        NumPy scalars, paths, namespaces and their kin would save today and fail to load in another year, so
        they are caught here, when the state is saved.
        """
        for name in ("step", "epoch", "position", "skipped", "skipped_in_a_row", "damaged", "window_rows"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise TypeError(
                    f"TrainState.{name} must be an int >= 0, got {type(value).__name__} {value!r}"
                )
        if self.evaluated_step is not None and type(self.evaluated_step) is not int:
            raise TypeError(f"TrainState.evaluated_step must be an int or None, got {self.evaluated_step!r}")
        if self.phase not in PHASES:
            raise TypeError(f"TrainState.phase must be one of {PHASES}, got {self.phase!r}")
        _check_record("best", self.best, {"top1": float, "step": int})
        _check_record("scaler", self.scaler, {"scale": float, "growth_tracker": int})
        for file, tensors in self.tensors().items():
            for name, tensor in tensors.items():
                _check_tensor(f"{file}: {name}", tensor)
        for state_name in self.optimizer:
            if "/" in state_name:
                raise TypeError(
                    f"TrainState.optimizer: '/' is not allowed in a state name, got {state_name!r}"
                )
        if self.window is not None and (self.window.dtype != torch.float64 or self.window.dim() != 2):
            found = f"{self.window.dtype} {list(self.window.shape)}"
            raise TypeError(f"TrainState.window must be float64 [rows, columns], got {found}")
        if self.window_rows > (0 if self.window is None else self.window.shape[0]):
            raise TypeError(f"TrainState.window_rows is {self.window_rows}, more than the window has")

    def plain(self) -> dict[str, Any]:
        """All but the tensors, ready for JSON (which in Python gives floats back bit for bit)."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in TENSOR_FIELDS}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors as they lie in files: stem -> name -> tensor, `<state>/<parameter>` in `optimizer`."""
        optimizer = {
            f"{state_name}/{parameter}": tensor
            for state_name, tensors in self.optimizer.items()
            for parameter, tensor in tensors.items()
        }
        ema = {"ema": self.ema} if self.ema else {}
        window = {} if self.window is None else {"window": {"window": self.window}}
        return {"model": self.model, "optimizer": optimizer, **ema, **window}

    def published(self) -> dict[str, Tensor]:
        """The weights that others are given: the mean of those there is a mean of, all else from the model."""
        return {**self.model, **self.ema}

    def to_cpu(self, *, into: "TrainState | None" = None) -> "TrainState":
        """A copy in CPU memory that training can't touch: what the background writer gets.

        Tensors on an accelerator go to pinned memory without blocking, and are waited for once at the end.
        The buffers of `into`, an earlier copy that nobody reads any more, are used again where they fit:
        fresh memory costs six times as much as warm.
        """
        spare = {} if into is None else into.tensors()
        devices = set()

        def stage(file: str, name: str, tensor: Tensor) -> Tensor:
            source, copy = tensor.detach(), spare.get(file, {}).get(name)
            if copy is None or copy.shape != source.shape or copy.dtype != source.dtype:
                # Contiguous whatever the memory format of the source, as the files want it.
                copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            copy.copy_(source, non_blocking=source.is_cuda)
            if source.is_cuda:
                devices.add(source.device)
            return copy

        copies = {
            file: {name: stage(file, name, tensor) for name, tensor in tensors.items()}
            for file, tensors in self.tensors().items()
        }
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return replace(
            self,
            best=None if self.best is None else dict(self.best),
            scaler=None if self.scaler is None else dict(self.scaler),
            **_tensor_fields(copies),
        )


# The schema is one more than the migrations there are: to change the layout, append `migrate_n`, a pure
# function from the raw fields of schema n to those of n + 1, and commit a golden checkpoint of the new
# schema.
Migration = Callable[[dict[str, Any]], dict[str, Any]]



def _migrate_1(raw: dict[str, Any]) -> dict[str, Any]:
    """Schema 2 may hold a running mean of the weights."""
    return {**raw, "ema": {}}


MIGRATIONS: tuple[Migration, ...] = (_migrate_1,)
SCHEMA = 1 + len(MIGRATIONS)


def migrate(
    raw: dict[str, Any], *, schema: int, migrations: tuple[Migration, ...] = MIGRATIONS
) -> dict[str, Any]:
    """Bring raw fields of an older schema to the newest. Raises UserError for those of a newer program."""
    newest = 1 + len(migrations)
    if not 1 <= schema <= newest:
        raise UserError(
            f"this checkpoint has schema {schema}; this version of alexnet-ddp reads schemas 1 to {newest}.\n"
            "Load it with the version that wrote it, or a later one."
        )
    for step in migrations[schema - 1 :]:
        raw = step(raw)
    return raw


def restore(
    plain: Mapping[str, Any], *, tensors: Mapping[str, Mapping[str, Tensor]], schema: int
) -> TrainState:
    """The state from what `plain()` and `tensors()` gave, brought to the newest schema."""
    return TrainState(**migrate({**plain, **_tensor_fields(tensors)}, schema=schema))


def check_plain(value: object, *, where: str) -> None:
    """Raise TypeError, naming the place, unless the value comes back from JSON as it was."""
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"{where}: keys must be strings, got {key!r}")
            check_plain(item, where=f"{where}.{key}")
    elif type(value) is list:
        for index, item in enumerate(value):
            check_plain(item, where=f"{where}[{index}]")
    elif value is not None and type(value) not in (bool, int, float, str):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"{where} must be plain Python (dict, list, str, int, float, bool, None), got {kind}")


def _tensor_fields(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """The fields of TrainState that hold tensors, from the tensors as they lie in files."""
    optimizer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.get("optimizer", {}).items():
        state_name, _, parameter = key.partition("/")
        optimizer.setdefault(state_name, {})[parameter] = tensor
    window = tensors["window"]["window"] if "window" in tensors else None
    ema = dict(tensors.get("ema", {}))
    return {"model": dict(tensors["model"]), "optimizer": optimizer, "ema": ema, "window": window}


def _check_record(name: str, record: dict[str, Any] | None, kinds: dict[str, type]) -> None:
    if record is None:
        return
    if type(record) is not dict or {key: type(value) for key, value in record.items()} != kinds:
        wanted = ", ".join(f"{key}: {kind.__name__}" for key, kind in kinds.items())
        raise TypeError(f"TrainState.{name} must be {{{wanted}}} or None, got {record!r}")


def _check_tensor(where: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.dtype not in DTYPES or tensor.is_meta:
        raise TypeError(f"{where}: a {tensor.dtype} tensor ({tensor.layout}, {tensor.device}) can't be saved")
