"""The running mean of the weights: its formula, when it moves, what a skipped update does to it."""

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from alexnet_ddp.distributed import World
from alexnet_ddp.ema import check_steps, decay_at
from alexnet_ddp.errors import UserError
from alexnet_ddp.sections import EmaSection
from steps import INF, batch, differs, equal, make_step, spoilt, state, take


def test_decay_of_a_step() -> None:
    """Every third step has an update; n updates in, it keeps min(decay, (1 + n) / (10 + n)); without one, none does."""
    section = EmaSection(decay=0.5, steps=3)
    found = [decay_at(step, section) for step in range(30)]
    assert [step for step, decay in enumerate(found) if decay is not None] == list(range(2, 30, 3))
    assert found[2::3] == [1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5]
    assert [decay_at(step, EmaSection()) for step in range(9)] == [None] * 9


def test_mean_is_torchs_averaged_model(world: World) -> None:
    """Five steps, updates at some of them: torch's AveragedModel with the same decay holds the same, to 1e-12; the
    weights themselves have the bits of a run without a mean."""
    step, plain = make_step(kind=torch.float64, mean=True), make_step(kind=torch.float64)
    average = AveragedModel(step.net.module, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    average.update_parameters(step.net.module)  # its first update is a copy
    for seed, decay in enumerate((0.7, None, 0.7, None, 0.7)):
        take(step, batch(seed, kind=torch.float64), ema_decay=decay)
        take(plain, batch(seed, kind=torch.float64))
        if decay is not None:
            average.update_parameters(step.net.module)
    expected = {name: value.detach() for name, value in average.module.named_parameters()}
    assert differs(step.mean, expected) < 1e-12
    assert differs(step.mean, dict(step.net.module.named_parameters())) > 1e-4  # it lags behind
    found = {name: value for name, value in state(step).items() if not name.startswith("mean of")}
    assert equal(found, state(plain))


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_a_skipped_update_does_not_move_the_mean(world: World, amp: str) -> None:
    """A non-finite gradient leaves the mean's bits alone; the next finite step moves it as if that had never been."""
    step, never = make_step(amp=amp, mean=True), make_step(amp=amp, mean=True)
    for each in (step, never):
        take(each, batch(0), ema_decay=0.3)
    before = state(step)
    take(step, spoilt(batch(1), 0, INF), ema_decay=0.9)
    assert equal(state(step), before)
    if amp == "fp16":
        never.scaler.load_state_dict(step.scaler.state_dict())
    for each in (step, never):
        take(each, batch(2), ema_decay=0.9)
    assert not any(torch.equal(state(step)[name], before[name]) for name in before if name.startswith("mean of"))
    assert equal(state(step), state(never))


def test_a_mean_that_would_never_move_is_refused() -> None:
    """ema.steps beyond the run would publish the weights that it begins with; as many steps as the run has is one
    update, and without a mean the field says nothing."""
    with pytest.raises(UserError, match="ema.steps must be at most the steps of the run, got 11 for 10"):
        check_steps(EmaSection(decay=0.9, steps=11), total_steps=10)
    check_steps(EmaSection(decay=0.9, steps=10), total_steps=10)
    assert decay_at(9, EmaSection(decay=0.9, steps=10)) is not None
    check_steps(EmaSection(steps=11), total_steps=10)
