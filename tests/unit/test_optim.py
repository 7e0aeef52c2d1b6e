"""Optimizers: against their formulas by hand, which parameters decay, frozen ones, and what a skipped update leaves."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_ddp.distributed import World
from alexnet_ddp.metrics import Window
from alexnet_ddp.models import create_model
from alexnet_ddp.models.dropout import set_dropout_rows
from alexnet_ddp.optim import create_optimizer, create_scaler, named_state, parameter_groups
from alexnet_ddp.sections import OptimSection
from alexnet_ddp.step import Step, wrap
from steps import INF, N, batch, differs, equal, make_net, make_step, spoilt, state, take

ADAMW = OptimSection(name="adamw", lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.05)


def gradients_by_hand(net: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    whole, = batch(seed, kind=torch.float64)
    set_dropout_rows(net, whole.dropout_rows)
    loss = F.cross_entropy(net(whole.pixels), whole.targets.labels)
    weights = dict(net.named_parameters())
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


@pytest.mark.parametrize("decay_on", ["all", "weights"])
def test_adamw_by_hand(world: World, decay_on: str) -> None:
    """Three steps in float64 are algorithm 2 of Loshchilov and Hutter written out by hand, to 1e-9."""
    step, net = make_step(kind=torch.float64, section=ADAMW.model_copy(update={"decay_on": decay_on})), make_net(
        torch.float64)
    weights = dict(net.named_parameters())
    mean = {name: torch.zeros_like(value) for name, value in weights.items()}
    square = {name: torch.zeros_like(value) for name, value in weights.items()}
    for t in (1, 2, 3):
        take(step, batch(t, kind=torch.float64))
        gradients = gradients_by_hand(net, t)
        with torch.no_grad():
            for name, weight in weights.items():
                mean[name] = 0.8 * mean[name] + 0.2 * gradients[name]
                square[name] = 0.95 * square[name] + 0.05 * gradients[name] ** 2
                decay = 0.05 if decay_on == "all" or not name.endswith("bias") else 0.0
                weight -= 0.02 * (mean[name] / (1 - 0.8**t) / ((square[name] / (1 - 0.95**t)).sqrt() + 1e-6)
                                  + decay * weight)
    expected = {name: value.detach() for name, value in weights.items()}
    expected |= {f"exp_avg of {name}": value for name, value in mean.items()}
    expected |= {f"exp_avg_sq of {name}": value for name, value in square.items()}
    found = state(step)
    assert differs(found, expected) < 1e-9
    assert {float(value) for name, value in found.items() if name.startswith("step of")} == {3.0}


def test_decay_on_weights_alone_by_hand(world: World) -> None:
    """SGD with decay_on=weights: filters and matrices shrink, biases follow the bare gradient, to 1e-12."""
    section = OptimSection(lr=0.02, momentum=0.9, weight_decay=0.05, decay_on="weights")
    step, net = make_step(kind=torch.float64, section=section), make_net(torch.float64)
    gradients = gradients_by_hand(net, 0)
    take(step, batch(0, kind=torch.float64))
    expected = {name: (weight - 0.02 * (gradients[name] + (0.0 if name.endswith("bias") else 0.05) * weight)).detach()
                for name, weight in net.named_parameters()}
    assert differs(state(step), expected) < 1e-12


def test_groups_of_a_net_with_batch_norm() -> None:
    """decay_on=weights: of a ResNet the biases and batch norms' scales and shifts, and they alone, don't decay."""
    net = create_model("torchvision:resnet18", num_classes=4)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    decaying, others = parameter_groups(net, OptimSection(decay_on="weights"))
    spared = {names[id(parameter)] for parameter in others["params"]}
    norms = {f"{name}.{which}" for name, module in net.named_modules() if isinstance(module, torch.nn.BatchNorm2d)
             for which in ("weight", "bias")}
    assert spared == norms | {"fc.bias"}
    assert others["weight_decay"] == 0.0 and "weight_decay" not in decaying
    assert len(decaying["params"]) + len(spared) == len(names)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_every_group_has_the_rate(world: World, name: str) -> None:
    """A rate of zero moves nothing in either group; another one moves every tensor."""
    step = make_step(section=OptimSection(name=name, decay_on="weights"))
    before, weights = state(step), dict(step.net.module.named_parameters())
    step(batch(0), lr=0.0, planned=N, window=Window(2, device=torch.device("cpu")))
    assert all(torch.equal(state(step)[name], before[name]) for name in weights)
    take(step, batch(1))
    assert not any(torch.equal(state(step)[name], before[name]) for name in weights)


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_skipped_updates_leave_adamw_as_it_was(world: World, amp: str) -> None:
    """A non-finite gradient, in the first step and later, moves neither weights nor means nor the count of steps: later
    steps have the bits of a run that never met it, and the count is that of the updates made."""
    step, never = make_step(amp=amp, section=ADAMW), make_step(amp=amp, section=ADAMW)
    before = state(step)
    assert {name.partition(" of ")[0] for name in before if " of " in name} == {"step", "exp_avg", "exp_avg_sq"}
    window = take(step, spoilt(batch(0), 0, INF))
    assert equal(state(step), before)
    for seed in (1, 2, 3):
        if seed == 2:
            take(step, spoilt(batch(0), 0, INF), window)
        if amp == "fp16":
            never.scaler.load_state_dict(step.scaler.state_dict())
        take(step, batch(seed), window)
        take(never, batch(seed))
    assert window.counts() == (2, 0)
    assert equal(state(step), state(never))
    assert {float(value) for name, value in state(step).items() if name.startswith("step of")} == {3.0}


@pytest.mark.parametrize("section", [OptimSection(), ADAMW, ADAMW.model_copy(update={"decay_on": "weights"})],
                         ids=["sgd", "adamw", "weights"])
def test_frozen_parameters_are_left_out(world: World, section: OptimSection) -> None:
    """Parameters without gradients are in no group, have no state and keep their bits, weight decay or not."""
    net = make_net()
    frozen = [name for name, _ in net.named_parameters()][:4]
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)
    step = Step(wrap(net, torch.device("cpu")), create_optimizer(net, section), create_scaler("none", torch.device(
        "cpu")), amp="none", clip_norm=None, tick=lambda stage: None)
    before = state(step)
    take(step, batch(0))
    after = state(step)
    moved = {name for name, _ in net.named_parameters() if not torch.equal(after[name], before[name])}
    assert moved == {name for name, _ in net.named_parameters()} - set(frozen)
    for tensors in named_state(net, step.optimizer).values():
        assert tensors.keys() == moved
