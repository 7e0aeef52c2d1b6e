"""The optimizer step: against the written-out formula, in pieces, clipped, scaled, skipped; and it never waits."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet_ddp.distributed import World
from alexnet_ddp.metrics import Window
from alexnet_ddp.models.dropout import set_dropout_rows
from alexnet_ddp.optim import create_scaler, named_state
from alexnet_ddp.sections import OptimSection
from steps import INF, NAN, SCALE, N, batch, differs, equal, make_net, make_step, spoilt, state, take

# --- the formula ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_three_steps_by_hand(world: World, clip: float | None, nesterov: bool) -> None:
    """Three steps in float64 equal SGD with momentum, weight decay and clipping written out by hand, to 1e-12."""
    section = OptimSection(lr=0.02, momentum=0.9, weight_decay=5e-4, nesterov=nesterov)
    step = make_step(clip=clip, kind=torch.float64, section=section)
    net = make_net(torch.float64)
    weights = dict(net.named_parameters())
    momentum = {name: torch.zeros_like(value) for name, value in weights.items()}
    for seed in range(3):
        window = take(step, batch(seed, kind=torch.float64))
        whole, = batch(seed, kind=torch.float64)
        set_dropout_rows(net, whole.dropout_rows)
        loss = F.cross_entropy(net(whole.pixels), whole.targets.labels)
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        norm = torch.cat([value.ravel() for value in gradients.values()]).norm()
        factor = 1.0 if clip is None else min(1.0, clip / (float(norm) + 1e-6))
        with torch.no_grad():
            for name, weight in weights.items():
                gradient = gradients[name] * factor + 5e-4 * weight
                momentum[name] = 0.9 * momentum[name] + gradient
                weight -= 0.02 * (gradient + 0.9 * momentum[name] if nesterov else momentum[name])
        summary = window.summary()
        assert summary.grad_norm == pytest.approx(float(norm), rel=1e-6)  # before clipping
        assert summary.loss == pytest.approx(loss.item(), rel=1e-12)
        assert clip is None or factor < 1
    expected = {**{name: value.detach() for name, value in weights.items()},
                **{f"momentum_buffer of {name}": value for name, value in momentum.items()}}
    assert differs(state(step), expected) < 1e-12


@pytest.mark.parametrize("cuts", [(0, 3, 6, 9, 10), (0, 1, 2, 10), (0, 5, 5, 10), (0, 10, 10), (0, 0, 10)], ids=str)
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_accumulation_equals_one_batch(world: World, cuts: tuple[int, ...], amp: str) -> None:
    """Micro-batches of any cut, empty ones too, add up to the gradient of the whole batch: float64 to 1e-12."""
    whole, cut = (make_step(kind=torch.float64) for _ in range(2))
    for seed in range(2):
        windows = [take(whole, batch(seed, kind=torch.float64)), take(cut, batch(seed, cuts=cuts, kind=torch.float64))]
    assert differs(state(cut), state(whole)) < 1e-12
    a, b = (window.summary() for window in windows)
    assert (a.samples, a.top1) == (b.samples, b.top1) == (N, a.top1)
    assert a.loss == pytest.approx(b.loss, rel=1e-12)
    if amp != "none":  # rounding of bf16 depends on the sample alone, sums are fp32
        whole, cut = make_step(amp=amp), make_step(amp=amp)
        take(whole, batch(0))
        take(cut, batch(0, cuts=cuts))
        assert differs(state(cut), state(whole)) < 0.02


def test_gradients_are_summed_over_ranks_once_a_step(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many micro-batches a step has on a rank, empty ones too, its gradients are all-reduced once."""
    step, elements = make_step(), []
    take(step, batch(0))
    reduce = dist.all_reduce

    def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        elements.append(tensor.numel())
        return reduce(tensor, *arguments, **options)

    monkeypatch.setattr(dist, "all_reduce", counted)
    for cuts in ((0, 10), (0, 3, 6, 9, 10), (0, 0), (0, 5, 5, 10)):
        elements.clear()
        take(step, batch(1, cuts=cuts))
        assert sum(elements) == sum(parameter.numel() for parameter in step.net.parameters())


def test_divided_by_the_planned_batch(world: World) -> None:
    """The loss is divided by the whole global batch that was planned, not by what this rank holds."""
    alone, half = make_step(kind=torch.float64), make_step(kind=torch.float64)
    norms = [take(alone, batch(0, kind=torch.float64)).summary().grad_norm,
             take(half, batch(0, kind=torch.float64), planned=2 * N).summary().grad_norm]
    assert norms[0] == pytest.approx(2 * norms[1], rel=1e-9)


def test_a_rank_without_samples_takes_part(world: World) -> None:
    """An empty batch gives zero gradients, not none: weights decay, the norm is 0, nothing counts as skipped."""
    step = make_step(kind=torch.float64)
    before = state(step)
    window = take(step, batch(0, cuts=(0, 0), kind=torch.float64))
    after = state(step)
    for name in dict(step.net.module.named_parameters()):
        assert torch.allclose(after[name], before[name] * (1 - 0.02 * 5e-4), rtol=1e-12, atol=0)
    summary = window.summary()
    assert (summary.samples, summary.grad_norm, summary.skipped) == (0, 0.0, 0)


def test_the_rate_is_the_step_s(world: World) -> None:
    """Each step uses the rate it is given; a rate of zero moves no weight."""
    step = make_step()
    before = state(step)
    step(batch(0), lr=0.0, planned=N, window=Window(2, device=torch.device("cpu")))
    after = state(step)
    assert all(torch.equal(after[name], before[name]) for name in dict(step.net.module.named_parameters()))
    take(step, batch(1))
    assert not equal(state(step), after)


# --- precision, infinities --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("amp", "tolerance"), [("bf16", 0.05), ("fp16", 0.02)])
def test_logged_norm_is_the_unscaled_one(world: World, amp: str, tolerance: float) -> None:
    """Under fp16's scaler (and in bf16) the logged norm is that of the true gradients, fp32's to rounding."""
    norms = {kind: take(make_step(amp=kind), batch(0)).summary().grad_norm for kind in ("none", amp)}
    assert norms[amp] == pytest.approx(norms["none"], rel=tolerance)
    assert create_scaler("fp16", torch.device("cpu")).get_scale() == 2.0**16


def test_clipping_after_unscaling(world: World) -> None:
    """Under fp16 the norm is clipped in true units: a bound above it changes nothing, one below bounds the update."""
    plain, loose = make_step(amp="fp16"), make_step(amp="fp16", clip=1e3)
    norm = take(plain, batch(0)).summary().grad_norm
    take(loose, batch(0))
    assert norm < 1e3
    assert equal(state(loose), state(plain))
    section = OptimSection(lr=0.02, momentum=0.9, weight_decay=0.0)
    tight = make_step(amp="fp16", clip=norm / 4, section=section)
    assert take(tight, batch(0)).summary().grad_norm == norm  # logged before clipping
    momentum = [value.ravel() for name, value in state(tight).items() if name.startswith("momentum")]
    assert float(torch.cat(momentum).norm()) == pytest.approx(norm / 4, rel=1e-4)


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_one_inf_is_one_skipped_update(world: World, amp: str, clip: float | None, value: float) -> None:
    """One non-finite pixel in one micro-batch skips exactly that update: later steps' bits are those without it."""
    cuts = (0, 4, 8, 10)
    step, never = make_step(amp=amp, clip=clip), make_step(amp=amp, clip=clip)
    window = take(step, batch(0, cuts=cuts))
    take(never, batch(0, cuts=cuts))
    before = state(step)
    take(step, spoilt(batch(1, cuts=cuts), 1, value), window)
    assert equal(state(step), before)
    assert window.counts() == (1, 1)
    if amp == "fp16":
        assert step.scaler.get_scale() == SCALE / 2  # as torch's scaler does
        never.scaler.update(SCALE / 2)
    take(step, batch(2, cuts=cuts), window)
    take(never, batch(2, cuts=cuts))
    assert window.counts() == (1, 0)
    assert not equal(state(step), before)
    assert equal(state(step), state(never))


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_norm_that_overflows_is_a_skipped_update(world: World, clip: float | None) -> None:
    """Finite gradients whose norm fp32 can't hold: counted as skipped, and nothing moves; the next step does."""
    step = make_step(clip=clip)
    window = take(step, batch(0))
    before = state(step)
    handles = [parameter.register_hook(lambda gradient: torch.full_like(gradient, 1e25))
               for parameter in step.net.module.parameters()]
    take(step, batch(1), window)
    assert all(torch.isfinite(parameter.grad).all() for parameter in step.net.module.parameters())
    assert window.counts() == (1, 1)
    assert equal(state(step), before)
    for handle in handles:
        handle.remove()
    take(step, batch(2), window)
    assert window.counts() == (1, 0)
    assert not equal(state(step), before)


def test_first_update_skipped(world: World) -> None:
    """A skipped first update leaves momentum zeros behind, so that a run that begins so is saved like any other."""
    step = make_step()
    before = state(step)
    window = take(step, spoilt(batch(0), 0, INF))
    assert equal(state(step), before)
    assert window.counts() == (1, 1)
    momentum = named_state(step.net.module, step.optimizer)["momentum_buffer"]
    assert set(momentum) == set(dict(step.net.module.named_parameters()))
    assert not any(value.any() for value in momentum.values())


def test_optimizer_without_momentum(world: World) -> None:
    """Momentum 0 keeps no state; a step still is w - lr (g + wd w)."""
    step = make_step(kind=torch.float64, section=OptimSection(momentum=0.0, weight_decay=0.0))
    assert named_state(step.net.module, step.optimizer) == {}
    before = copy.deepcopy(step.net.module.state_dict())
    norm = take(step, batch(0, kind=torch.float64)).summary().grad_norm
    moved = torch.cat([(value - before[name]).ravel() for name, value in step.net.module.state_dict().items()]).norm()
    assert float(moved) == pytest.approx(0.02 * norm, rel=1e-6)


# --- no waiting -------------------------------------------------------------------------------------------------

WAITS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal",
         "aten::masked_select", "aten::unique_dim", "aten::_unique2"}  # on a GPU each makes the host wait
READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "nonzero")


class Watch(TorchDispatchMode):
    """Notes every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def no_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Within, reading a tensor's value on the host raises (some ways of it run no operator on a CPU)."""
    with monkeypatch.context() as patched, Watch() as watch:
        for name in READS:
            def refuse(*_: Any, name: str = name, **__: Any) -> None:
                raise AssertionError(f"Tensor.{name} was called within a step")
            patched.setattr(torch.Tensor, name, refuse)
        yield watch


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_never_waits_for_the_device(world: World, name: str, amp: str, clip: float | None,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """No operator and no method within a step reads a tensor's value on the host, a skipped update included."""
    section = OptimSection(name=name, lr=0.02, decay_on="weights")
    step = make_step(amp=amp, clip=clip, section=section, mean=True)
    window = Window(20, device=torch.device("cpu"))
    take(step, batch(0, cuts=(0, 4, 8, 10)), window, ema_decay=0.9)  # what happens once, happens here
    for seed in (1, 2, 3):
        batches = batch(seed, cuts=(0, 4, 8, 10))
        if seed == 2:
            spoilt(batches, 1, INF)
        with no_reads(monkeypatch) as watch:
            take(step, batches, window, ema_decay=0.9)
        assert not watch.seen & WAITS
        expected = {"aten::convolution_backward", "aten::lerp_", f"aten::_fused_{name}_"}
        assert expected <= watch.seen, "the watch saw nothing"
    assert window.counts() == (1, 0)


def test_the_watch_sees_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The means of the test above do catch what they look for."""
    value = torch.ones(2)
    with Watch() as watch:
        float(value[0])
        torch.nonzero(value)
    assert {"aten::_local_scalar_dense", "aten::nonzero"} <= watch.seen
    for read in (value.tolist, value.numpy, value[0].item, lambda: bool(value[0])):
        with pytest.raises(AssertionError, match="within a step"), no_reads(monkeypatch):
            read() if read.__name__ == "<lambda>" else getattr(value[0], read.__name__)()
