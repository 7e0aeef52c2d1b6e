"""Weights that are zero: counted, and kept zero in training by a rule that needs no memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alexnet_ddp.errors import UserError
from alexnet_ddp.models import create_model, sparsity
from alexnet_ddp.models.sparsity import Sparsity
from alexnet_ddp.optim import create_optimizer
from alexnet_ddp.sections import OptimSection

OPTIMIZERS: list[dict[str, Any]] = [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True},
                                    {"name": "adamw", "lr": 0.01}]


def sparse_net() -> nn.Module:
    """A small net with a third of its weights, drawn by lot, at zero; its biases all are."""
    torch.manual_seed(0)
    net = create_model("alexnet_bn", num_classes=3, width=0.05, image_size=64, dropout=0.0)
    with torch.no_grad():
        for _, module in sparsity.layers(net):
            module.weight.mul_(torch.rand_like(module.weight) > 1 / 3)
    return net


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, *, seeds: range) -> Iterator[None]:
    for seed in seeds:
        pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        net(pixels).logsumexp(1).sum().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        yield


def zeros(net: nn.Module) -> dict[str, Tensor]:
    return {name: module.weight.detach() == 0 for name, module in sparsity.layers(net)}


@pytest.mark.parametrize("section", OPTIMIZERS, ids=str)
def test_zeros_stay_and_the_rest_learns(section: dict[str, Any]) -> None:
    """With weight decay, momentum and clipping: exactly the weights that were zero are, and their optimizer state too;
    all biases, which begin at zero, learn."""
    net = sparse_net()
    before = zeros(net)
    sparsity.keep_zeros(net)
    optimizer = create_optimizer(net, OptimSection(weight_decay=0.01, **section))
    for _ in steps(net, optimizer, seeds=range(4)):
        pass
    assert all(torch.equal(mask, before[name]) and mask.any() for name, mask in zeros(net).items())
    for name, module in sparsity.layers(net):
        for state, value in optimizer.state[module.weight].items():
            assert state == "step" or not value[before[name]].any(), (name, state)
    assert all(bias.abs().max() > 0 for name, bias in net.named_parameters() if name.endswith("bias"))


def test_no_mask_need_be_saved() -> None:
    """A weight that is zero by chance in mid-run, with momentum: a run that goes on from weights and optimizer state
    alone has the bits of the one that went straight through."""
    net = sparse_net()
    sparsity.keep_zeros(net)
    section = OptimSection(momentum=0.9)
    optimizer = create_optimizer(net, section)
    for number, _ in enumerate(steps(net, optimizer, seeds=range(6))):
        if number == 2:
            with torch.no_grad():
                net.get_submodule("classifier.1").weight[0] = 0.0
            saved = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    other = sparse_net()
    sparsity.keep_zeros(other)
    going_on = create_optimizer(other, section)
    other.load_state_dict(saved[0])
    going_on.load_state_dict(saved[1])
    for _ in steps(other, going_on, seeds=range(3, 6)):
        pass
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in net.state_dict().items())
    assert net.get_submodule("classifier.1").weight[0].any()  # momentum has moved it: it is no pruned weight


def test_counts() -> None:
    """Zeros are counted by layer and over all, biases and batch norms left out."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Linear(2, 2))
    with torch.no_grad():
        net[0].weight[0] = 0.0
    found = sparsity.sparsity(net)
    assert found == [Sparsity("0", 1, 2), Sparsity("2", 0, 4)]
    assert sparsity.overall(found) == Sparsity("all", 1, 6)
    assert "1 of 6 weights are zero (16.7%)" in sparsity.told(net)


def test_a_layer_that_could_never_learn() -> None:
    """Nothing but zeros in a layer is refused, unless it is frozen anyway."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        net[1].weight.zero_()
    with pytest.raises(UserError, match="leave 1 at zero"):
        sparsity.told(net)
    net[1].requires_grad_(False)
    sparsity.told(net)
    sparsity.keep_zeros(net)
