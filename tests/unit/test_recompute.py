"""memory.checkpoint: blocks computed again in backward, without moving a bit, in less memory."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from alexnet_ddp.errors import UserError
from alexnet_ddp.models import create_model
from alexnet_ddp.models.dropout import KeyedDropout, set_dropout_rows
from alexnet_ddp.models.recompute import RecomputedBlocks, _segments, recompute_blocks
from alexnet_ddp.models.zoo import OURS

SIZE = 64


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("torchvision:"):
        return create_model(name, num_classes=10, image_size=SIZE)
    return create_model(name, num_classes=10, width=0.1, image_size=SIZE)


def recomputing(net: nn.Module) -> nn.Module:
    twin = copy.deepcopy(net)
    recompute_blocks(twin, name="twin")
    return twin


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def passed(net: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """Loss, gradients and buffers after one training pass of a step."""
    torch.manual_seed(2)  # of torchvision's dropout
    set_dropout_rows(net, torch.arange(len(pixels)))
    loss = functional.cross_entropy(net(pixels), torch.arange(len(pixels)) % 10, reduction="sum")
    loss.backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(net.parameters()))
    return {"loss": loss.detach(), **gradients, **{f"buffer {name}": b for name, b in net.named_buffers()}}


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("name", [*OURS, "torchvision:squeezenet1_1"])
def test_not_a_bit_moves(name: str) -> None:
    """Loss, every gradient and every running statistic, of two steps, are those of the net that keeps everything."""
    plain = small(name)
    twin = recomputing(plain)
    assert list(twin.state_dict()) == list(plain.state_dict())
    for _ in range(2):  # the second adds to the first's gradients
        check_equal(passed(twin, images()), passed(plain, images()))
    with torch.inference_mode():
        assert torch.equal(twin.eval()(images()), plain.eval()(images()))


class Dropped(nn.Module):
    """Two blocks, each with a dropout within: torch's, whose masks come from a generator, and the keyed one."""

    def __init__(self) -> None:
        super().__init__()
        block = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(0.5), KeyedDropout(0.5, layer=layer), nn.ReLU(),
                               nn.Conv2d(8, 3, 3)) for layer in (0, 1)]
        self.features = nn.Sequential(*block)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).flatten(1)[:, :10]


def test_masks_are_drawn_alike() -> None:
    """Both kinds of dropout within a block have, when it is computed again, the masks of the first time."""
    torch.manual_seed(0)
    plain = Dropped()
    twin = recomputing(plain)
    found, expected = passed(twin, images()), passed(plain, images())
    check_equal(found, expected)
    assert found["features.0.0.weight"].any() and found["features.1.4.weight"].any()
    assert torch.equal(torch.rand(1), torch.rand(1, generator=_after(plain)))


def _after(net: nn.Module) -> torch.Generator:
    """torch's generator as a step of `net` leaves it."""
    passed(net, images())
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    return generator


def kept(net: nn.Module, pixels: Tensor) -> int:
    """Bytes that a forward keeps for backward, besides parameters and the pixels."""
    own = {p.untyped_storage().data_ptr() for p in (*net.parameters(), *net.buffers(), pixels)}
    sizes: dict[int, int] = {}
    held = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held.append(tensor)
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(pixels)
    return sum(sizes.values())


@pytest.mark.parametrize(("name", "share"), [
    ("alexnet_paper", 0.35), ("alexnet_single", 0.3), ("alexnet_bn", 0.3), ("alexnet_torchvision", 0.5)])
def test_keeps_less(name: str, share: float) -> None:
    """Of 16 images at 64 pixels, less than such a share of the bytes is kept between the passes."""
    plain = small(name)
    assert 0 < kept(recomputing(plain), images(16)) < share * kept(plain, images(16))


def test_blocks_of_bare_layers_end_in_pools() -> None:
    """torchvision's VGG, one Sequential of bare layers, has five blocks; ResNet has those of its four stages."""
    for name, blocks in (("torchvision:vgg11", 5), ("torchvision:resnet18", 8), ("alexnet_torchvision", 3)):
        with torch.device("meta"):
            net = create_model(name, num_classes=10, image_size=64)
        recompute_blocks(net, name=name)
        sequences = [list(m) for m in net.modules() if isinstance(m, RecomputedBlocks)]
        assert [is_block for layers in sequences for _, is_block in _segments(layers)] == [True] * blocks


@pytest.mark.parametrize("name", ["torchvision:googlenet", "torchvision:inception_v3"])
def test_nets_without_a_sequence_of_blocks_are_refused(name: str) -> None:
    """A net whose blocks aren't in a sequence is refused by name, with what saves memory instead."""
    with torch.device("meta"):
        net = create_model(name, num_classes=10, image_size=96)
    with pytest.raises(UserError, match=rf"{name} has none.*\n.*smaller micro_batch"):
        recompute_blocks(net, name=name)
