"""TrainState: only what is plain gets in, and a staged copy is out of training's reach."""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from alexnet_ddp.checkpoint.state import SCHEMA, TrainState, check_plain, migrate, restore
from alexnet_ddp.errors import UserError


@pytest.mark.parametrize(
    "change",
    [
        {"step": numpy.int64(3)},
        {"step": True},
        {"step": -1},
        {"position": 1.0},
        {"evaluated_step": "3"},
        {"phase": "validate"},
        {"best": {"top1": numpy.float64(0.5), "step": 1}},
        {"best": {"top1": 0.5}},
        {"best": argparse.Namespace(top1=0.5, step=1)},
        {"scaler": {"scale": 65536, "growth_tracker": 0}},
        {"model": {"weight": numpy.zeros(3)}},
        {"model": {"weight": torch.zeros(3).to_sparse()}},
        {"model": {"weight": torch.zeros(3, device="meta")}},
        {"model": {"weight": torch.zeros(3, dtype=torch.complex128)}},
        {"optimizer": {"momentum/buffer": {"weight": torch.zeros(3)}}},
        {"optimizer": {"momentum": {"weight": 0.5}}},
        {"ema": {"weight": 0.5}},
        {"window": torch.zeros(2, 3)},
        {"window": torch.zeros(2, dtype=torch.float64)},
        {"window": torch.zeros(2, 3, dtype=torch.float64), "window_rows": 3},
        {"window_rows": 1},
    ],
    ids=lambda change: f"{next(iter(change))}-{type(next(iter(change.values()))).__name__}",
)
def test_what_is_not_plain_is_refused(change: dict[str, Any]) -> None:
    """NumPy scalars, namespaces, odd tensors and wrong kinds fail at save time, and the field is named."""
    TrainState().check()
    with pytest.raises(TypeError, match=next(iter(change))):
        TrainState(**change).check()


def test_lineage_must_be_plain() -> None:
    """A value that JSON would change or refuse is named by its place."""
    check_plain({"a": [1, 2.5, None, "x", {"b": True}]}, where="lineage")
    for value in (Path("x"), (1, 2), numpy.float64(1.0), {1: 2}, {1, 2}, object()):
        with pytest.raises(TypeError, match=r"lineage\.a\[0\]"):
            check_plain({"a": [value]}, where="lineage")


def test_numbers_survive_bit_for_bit() -> None:
    """Floats of every kind come back from JSON with the same bits, inf and nan included."""
    for number in (0.1, -0.0, 5e-324, 1.7976931348623157e308, math.pi, math.inf, -math.inf, math.nan):
        state = TrainState(
            best={"top1": number, "step": 2**70}, scaler={"scale": 2.0**16, "growth_tracker": 9}
        )
        plain = json.loads(json.dumps(state.plain()))
        again = restore(plain, tensors={"model": {}}, schema=SCHEMA)
        assert again.best is not None and again.best["top1"].hex() == number.hex()
        assert again.best["step"] == 2**70 and again.scaler == state.scaler


def test_staged_copy_is_out_of_reach() -> None:
    """What training does to its tensors after `to_cpu` does not show in it; shared weights are split."""
    weight = torch.nn.Parameter(torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last))
    live = TrainState(
        step=7,
        best={"top1": 0.5, "step": 7},
        model={"a": weight, "tied": weight},
        optimizer={"momentum": {"a": weight.detach()}},
        ema={"a": weight.detach()},
        window=torch.ones(2, 3, dtype=torch.float64),
        window_rows=1,
    )
    copy = live.to_cpu()
    expected = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1)
    assert live.window is not None and live.best is not None
    live.window.zero_()
    live.best["top1"] = 0.9
    copy.check()
    for tensor in (copy.model["a"], copy.model["tied"], copy.optimizer["momentum"]["a"], copy.ema["a"]):
        assert torch.equal(tensor, expected) and tensor.is_contiguous() and not tensor.requires_grad
    assert copy.model["a"].data_ptr() != copy.model["tied"].data_ptr()
    assert copy.best == {"top1": 0.5, "step": 7} and copy.step == 7 and copy.window_rows == 1
    assert copy.window is not None and copy.window.eq(1).all()


def test_staging_memory_is_used_again() -> None:
    """A later copy takes over the buffers of an earlier one where shape and dtype still fit."""
    first = TrainState(model={"a": torch.zeros(5), "b": torch.zeros(5)}).to_cpu()
    old = {name: tensor.data_ptr() for name, tensor in first.model.items()}
    second = TrainState(model={"a": torch.ones(5), "b": torch.ones(5).double()}).to_cpu(into=first)
    assert second.model["a"].data_ptr() == old["a"] and second.model["b"].data_ptr() != old["b"]
    assert second.model["a"].eq(1).all() and second.model["b"].eq(1).all()


def test_published_weights_are_the_means() -> None:
    """What others are given: the mean of every weight there is one of, and the model's own buffers."""
    model = {"w": torch.zeros(2), "norm.running_mean": torch.ones(2)}
    assert TrainState(model=model).published() == model
    mean = torch.full((2,), 0.5)
    found = TrainState(model=model, ema={"w": mean}).published()
    assert found["w"] is mean and found["norm.running_mean"] is model["norm.running_mean"] and len(found) == 2


def test_migrations_run_in_a_chain() -> None:
    """Schema n passes through n -> n+1 -> ... -> newest, each exactly once."""
    migrations = tuple(lambda raw, n=n: {**raw, "path": [*raw["path"], n]} for n in (1, 2, 3))
    for schema in (1, 2, 3, 4):
        raw = migrate({"path": []}, schema=schema, migrations=migrations)
        assert raw["path"] == list(range(schema, 4))


@pytest.mark.parametrize("schema", [0, SCHEMA + 1])
def test_newer_schema_is_refused(schema: int) -> None:
    """A checkpoint of a newer program is refused with both numbers, not misread."""
    plain = TrainState().plain()
    with pytest.raises(UserError, match=rf"schema {schema}.*reads schemas 1 to {SCHEMA}"):
        restore(plain, tensors={"model": {}}, schema=schema)


def test_state_is_frozen() -> None:
    """A state can't be changed while it waits to be written."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainState().step = 1  # type: ignore[misc]
