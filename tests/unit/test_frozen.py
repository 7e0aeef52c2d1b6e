"""Freezing: what a name covers, what a frozen part still does, what is refused."""

import pytest
import torch
from torch import nn

from alexnet_ddp.distributed import World
from alexnet_ddp.errors import UserError
from alexnet_ddp.models import create_model
from alexnet_ddp.models.frozen import Frozen, freeze
from alexnet_ddp.models.weights import Weights
from alexnet_ddp.replica import begin_with


def tiny() -> nn.Module:
    return create_model("alexnet_single", num_classes=3, width=0.05, image_size=64)


@pytest.mark.parametrize(("names", "frozen"), [
    ([], []),
    (["features.block1"], ["features.block1.conv.weight", "features.block1.conv.bias"]),
    (["classifier.1", "features.block2.conv"], ["features.block2.conv.weight", "features.block2.conv.bias",
                                                "classifier.1.weight", "classifier.1.bias"]),
    (["classifier.6.bias"], ["classifier.6.bias"]),
])
def test_a_name_covers_what_lies_in_it(names: list[str], frozen: list[str]) -> None:
    """Modules, their beginnings and single parameters: these and no others take no gradient; the counts are theirs."""
    net = tiny()
    found = freeze(net, names)
    assert list(found.parameters) == frozen
    assert [name for name, each in net.named_parameters() if not each.requires_grad] == frozen
    assert found.size == sum(net.get_parameter(name).numel() for name in frozen)
    assert found.of == sum(each.numel() for each in net.parameters())


def test_a_name_is_no_part_of_a_name() -> None:
    """`classifier.1` is not classifier.10, nor `block1` features.block1."""
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(11)))
    assert freeze(net, ["1"]).parameters == ("1.weight", "1.bias")
    with pytest.raises(UserError, match="no part 'block1'. Did you mean 'features.block1'"):
        freeze(tiny(), ["block1"])


@pytest.mark.parametrize(("names", "said"), [
    (["feature"], "the net has no part 'feature'. Did you mean 'features'?"),
    (["features", "zzz"], "the net has no part 'zzz'. Its parts are features, classifier."),
    (["classifier.0"], "'classifier.0' (KeyedDropout) has nothing that learns. Name one of: features.block1.conv"),
    ([""], "the net has no part ''"),
    (["features", "classifier"], "freeze=features, classifier leaves nothing to learn. Leave out one of the net's "
                                 "parts: features, classifier."),
])
def test_refusals(names: list[str], said: str) -> None:
    """A name of nothing, of nothing that learns, and of everything: refused with the names there are, net unharmed."""
    net = tiny()
    with pytest.raises(UserError) as error:
        freeze(net, names)
    assert said in str(error.value)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_frozen_batch_norm_stands_still() -> None:
    """Statistics of frozen batch norms don't move in training; those of the others do."""
    net = create_model("torchvision:shufflenet_v2_x0_5", num_classes=3, image_size=64)
    found = freeze(net, ["conv1", "stage2.0"])
    norms = [name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert list(found.norms) == [name for name in norms if name.startswith(("conv1.", "stage2.0."))]
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    net(torch.randn(4, 3, 64, 64)).sum().backward()
    moved = {name.rpartition(".")[0] for name, buffer in net.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == set(norms) - set(found.norms)


def test_dropout_goes_on() -> None:
    """Dropout in a frozen part still drops in training."""
    net = tiny()
    freeze(net, ["classifier.1", "classifier.4"])
    images = torch.randn(1, 3, 64, 64)
    assert net.get_submodule("classifier.0").training
    assert not torch.equal(net(images), net(images))


def test_notes() -> None:
    """What is frozen is said in one line, and that random weights stay random in another; else nothing."""
    assert Frozen().notes(fresh=True) == []
    found = Frozen(("features",), ("features.0.weight",), ("features.1",), 1200, 3400)
    assert found.notes(fresh=False) == ["frozen: features (1,200 of 3,400 parameters, 1 batch norm)"]
    assert "freeze without init_from" in found.notes(fresh=True)[1]


def test_a_fresh_last_layer_must_learn(world: World) -> None:
    """Weights of another number of classes with the last layer frozen, which then would stay random: refused; not with
    the same number, and not where only parts before it are frozen."""
    def net(classes: int) -> nn.Module:
        return create_model("alexnet_single", num_classes=classes, width=0.05, image_size=64)

    source = Weights(net(3).state_dict(), "x")
    for frozen in (["classifier"], ["features", "classifier.6.weight"]):
        with pytest.raises(UserError, match=r"would keep classifier.6.weight at the random numbers"):
            begin_with(source, world=world, net=net(4), recipe={"freeze": frozen})
        begin_with(source, world=world, net=net(3), recipe={"freeze": frozen})
    begin_with(source, world=world, net=net(4), recipe={"freeze": ["features"]})
