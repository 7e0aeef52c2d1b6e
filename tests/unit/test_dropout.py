"""Keyed dropout: what its masks depend on, and that they are random enough."""

import copy

import pytest
import torch
from torch import Tensor, nn

from alexnet_ddp.errors import UserError
from alexnet_ddp.models import pieces as pieces_module
from alexnet_ddp.models.dropout import KeyedDropout, dropout_mask, set_dropout_rows


def random_rows(count: int, *, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**32, (count,), generator=torch.Generator().manual_seed(seed))


def reference_hash(row: int, layer: int, unit: int) -> int:
    """The docstring's formula in Python's own integers."""

    def mix(h: int) -> int:
        h ^= h >> 16
        h = h * 0x7FEB352D % 2**32
        h ^= h >> 15
        h = h * 0x846CA68B % 2**32
        return h ^ h >> 16

    key = mix((mix(row) + 0x9E3779B1 * layer) % 2**32)
    return mix(key ^ 0x9E3779B1 * unit % 2**32)


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two masks as random signs; of n independent fair bits it is normal with deviation 1 / sqrt(n)."""
    return ((1 - 2 * a.double()) * (1 - 2 * b.double())).mean().item()


def test_equals_the_written_formula() -> None:
    """Every bit of the mask follows the documented integer formula, for keys over the whole 32-bit range."""
    rows = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 123456789]
    for p in (0.5, 0.1, 0.9):
        for layer in (0, 1, 5):
            mask = dropout_mask(torch.tensor(rows), units=50, p=p, layer=layer)
            for i, row in enumerate(rows):
                hashes = [reference_hash(row, layer, unit) for unit in range(50)]
                signed = [h - 2**32 if h >= 2**31 else h for h in hashes]
                assert mask[i].tolist() == [h < round(p * 2**32) - 2**31 for h in signed]


def test_golden_mask() -> None:
    """A fixed example stays what it was: a change of the hash would change every run that resumes."""
    mask = dropout_mask(torch.tensor([0, 1, 4294967295]), units=24, p=0.5, layer=1)
    assert ["".join(".x"[bit] for bit in row) for row in mask.int().tolist()] == [
        "x.xx..xxxxx.x.x.xxxxx..x",
        ".x..x..x..xx.xxx...x.x..",
        "xxx...x..xx....xxxxx....",
    ]


@pytest.mark.parametrize("p", [0.5, 0.1, 0.73])
def test_drop_rate(p: float) -> None:
    """Of two million units the share dropped is p within four standard deviations, overall and per layer."""
    for layer in (0, 1):
        mask = dropout_mask(random_rows(500), units=4096, p=p, layer=layer)
        deviation = (p * (1 - p) / mask.numel()) ** 0.5
        assert abs(mask.double().mean().item() - p) < 4 * deviation


def test_every_row_and_unit_has_the_rate() -> None:
    """Rates per row and per unit scatter as binomials do: chi-squared per degree of freedom is about 1."""
    mask = dropout_mask(random_rows(1000), units=4096, p=0.5, layer=0).double()
    for dim in (0, 1):
        rates = mask.mean(dim)
        chi_squared = ((rates - 0.5) ** 2 * 4 * mask.shape[dim]).mean().item()
        assert 0.9 < chi_squared < 1.1


@pytest.mark.parametrize("rows", [random_rows(512), torch.arange(512), torch.arange(512) * 2**23])
def test_masks_are_independent(rows: Tensor) -> None:
    """Layers, rows and units, near and far, are uncorrelated within 4.5 deviations, whatever the keys."""
    masks = [dropout_mask(rows, units=4096, p=0.5, layer=layer) for layer in (0, 1)]
    bound = 4.5 / (511 * 4096 - 4096) ** 0.5
    assert abs(correlation(*masks)) < bound
    for distance in (1, 2, 3, 16, 256):
        assert abs(correlation(masks[0][:-distance], masks[0][distance:])) < 2 * bound
        assert abs(correlation(masks[0][:, :-distance], masks[0][:, distance:])) < bound
        assert abs(correlation(masks[0][:-distance], masks[1][distance:])) < 2 * bound
    squares = masks[0][:-1, :-1] ^ masks[0][1:, 1:], masks[0][:-1, 1:] ^ masks[0][1:, :-1]
    assert abs(correlation(*squares)) < bound  # four corners: key and unit meet in an exclusive or


def test_micro_batches_give_the_same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample's mask depends on its own key alone: batches cut and ordered anyhow give the same rows."""
    rows = random_rows(64)
    whole = dropout_mask(rows, units=100, p=0.5, layer=0)
    parts = [dropout_mask(part, units=100, p=0.5, layer=0) for part in rows.split([1, 30, 33])]
    assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(dropout_mask(rows[order], units=100, p=0.5, layer=0), whole[order])
    monkeypatch.setattr(pieces_module, "PIECE", 700)
    assert torch.equal(dropout_mask(rows, units=100, p=0.5, layer=0), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_layer_applies_mask_and_scale(dtype: torch.dtype) -> None:
    """Dropped units are 0, kept ones x / (1 - p) in x's dtype; the gradient has the same mask and scale."""
    layer = KeyedDropout(0.25, layer=3)
    set_dropout_rows(layer, random_rows(8))
    x = (torch.rand(8, 4, 5, dtype=torch.float64) + 1).to(dtype).requires_grad_()
    out = layer(x)
    out.sum().backward()
    dropped = dropout_mask(random_rows(8), units=20, p=0.25, layer=3).view(8, 4, 5)
    assert out.dtype == dtype and x.grad is not None
    assert torch.equal(out == 0, dropped)
    assert torch.equal(out, (x * (1 / 0.75)).masked_fill(dropped, 0))
    assert torch.equal(x.grad, torch.full_like(x, 1 / 0.75).masked_fill(dropped, 0))


def test_saves_one_byte_per_unit() -> None:
    """Backward keeps the mask as bytes and nothing else."""
    layer = KeyedDropout(0.5)
    set_dropout_rows(layer, random_rows(8))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        layer(torch.rand(8, 20, requires_grad=True))
    assert [t.dtype for t in saved] == [torch.bool]


def test_identity_when_off() -> None:
    """In evaluation, and with p = 0, the input itself comes back."""
    x = torch.rand(4, 5)
    layer = KeyedDropout(0.5)
    set_dropout_rows(layer, random_rows(4))
    assert layer.eval()(x) is x
    assert KeyedDropout(0.0)(x) is x


def test_without_rows_it_is_torchs() -> None:
    """With rows None the mask comes from torch's generator, as nn.Dropout's does."""
    model = nn.Sequential(KeyedDropout(0.5, layer=0), KeyedDropout(0.5, layer=1))
    set_dropout_rows(model, random_rows(4))
    set_dropout_rows(model, None)
    x = torch.rand(4, 50)
    torch.manual_seed(3)
    ours = model[0](x)
    torch.manual_seed(3)
    assert torch.equal(ours, nn.Dropout(0.5)(x))


def test_rows_reach_every_layer_and_leave_the_state_alone() -> None:
    """set_dropout_rows finds layers inside wrappers; keys stay out of the state dict, copies work."""
    model = nn.ModuleDict({"module": nn.Sequential(nn.Linear(4, 4), KeyedDropout(0.5, layer=0))})
    set_dropout_rows(model, random_rows(3))
    assert sorted(model.state_dict()) == ["module.0.bias", "module.0.weight"]
    x = torch.rand(3, 4)
    assert torch.equal(copy.deepcopy(model)["module"](x), model["module"](x))


def test_empty_batch() -> None:
    """A batch of no samples goes through, forward and backward."""
    layer = KeyedDropout(0.5)
    set_dropout_rows(layer, torch.empty(0, dtype=torch.int64))
    x = torch.empty(0, 256, 6, 6, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


def test_mistakes_are_named() -> None:
    """Wrong probabilities, key dtypes and key counts are refused with the rule."""
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="0 <= dropout < 1"):
            KeyedDropout(p)
    layer = KeyedDropout(0.5)
    with pytest.raises(UserError, match="int64"):
        set_dropout_rows(layer, torch.zeros(4))
    set_dropout_rows(layer, random_rows(3))
    with pytest.raises(UserError, match="3 keys for a batch of 4"):
        layer(torch.rand(4, 5))
