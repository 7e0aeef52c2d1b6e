"""Dropout whose masks depend on the sample, not on a generator's state.

A unit is dropped by an integer hash of (row key of the sample, number of the dropout layer, number of the
unit). The mask of a sample is therefore the same on a CPU and on a GPU, on any rank, in any micro-batch, and
after a resume.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from alexnet_ddp.errors import UserError
from alexnet_ddp.models.pieces import pieces

GOLDEN = 0x9E3779B1  # odd and near 2**32 / golden ratio: spreads consecutive numbers evenly over 32 bits


class KeyedDropout(nn.Module):
    """Zeroes each unit of a sample with probability p and scales the others by 1 / (1 - p), while training.

    Input [batch, units ...] of any floating dtype; the output has its shape and dtype. Without row keys (see
    `set_dropout_rows`) it is torch's own dropout. The probability is exact to 2**-32.
    """

    rows: Tensor | None

    def __init__(self, p: float = 0.5, *, layer: int = 0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise UserError(f"dropout is a probability, 0 <= dropout < 1; got {p}")
        self.p = p
        self.layer = layer
        self.rows = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if self.rows is None:
            return functional.dropout(x, self.p)
        if len(self.rows) != len(x):
            raise UserError(
                f"dropout needs one row key per sample; got {len(self.rows)} keys for a batch of {len(x)}.\n"
                "Call set_dropout_rows(model, rows) with this batch's keys, or with None for torch's dropout."
            )
        dropped = dropout_mask(self.rows, units=math.prod(x.shape[1:]), p=self.p, layer=self.layer)
        # Written so that backward keeps the bool mask and nothing else.
        return x.masked_fill(dropped.view(x.shape), 0).mul_(1 / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}, layer={self.layer}"


def set_dropout_rows(model: nn.Module, rows: Tensor | None) -> None:
    """Give every `KeyedDropout` in `model` (wrapped or not) the row keys of the batch that comes next.

    rows: int64 [batch] on the model's device, 0 <= key < 2**32, one key per sample, in the batch's order.
    None puts torch's own dropout back. Nothing is copied and nothing is synchronised.
    """
    if rows is not None and (rows.dtype != torch.int64 or rows.dim() != 1):
        raise UserError(f"row keys are int64 [batch]; got {rows.dtype} {list(rows.shape)}")
    for module in model.modules():
        if isinstance(module, KeyedDropout):
            module.rows = rows


def dropout_mask(rows: Tensor, *, units: int, p: float, layer: int) -> Tensor:
    """The units to drop: bool [batch, units] on the device of `rows`, true with probability p (0 <= p < 1).

    True where `mix(mix(mix(row) + GOLDEN * layer) ^ GOLDEN * unit) < p * 2**32 - 2**31`: the left side
    modulo 2**32, read as a signed number, `mix` being lowbias32.
    """
    row_key = _mix(_mix(_signed(rows)).add_(_signed_number(GOLDEN * layer))).unsqueeze(1)
    unit_key = torch.arange(units, dtype=torch.int32, device=rows.device).mul_(_signed_number(GOLDEN))
    threshold = min(round(p * 2**32) - 2**31, 2**31 - 1)
    dropped = torch.empty(len(rows), units, dtype=torch.bool, device=rows.device)
    for dropped_part, row_part in pieces(dropped, row_key):
        torch.lt(_mix(row_part ^ unit_key), threshold, out=dropped_part)
    return dropped


def _mix(h: Tensor) -> Tensor:
    """lowbias32 (Chris Wellons, "Prospecting for Hash Functions"), in place on an int32 tensor."""
    shifted = torch.empty_like(h)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        torch.bitwise_right_shift(h, shift, out=shifted)  # copies the sign, where the hash brings in zeros
        h ^= shifted.bitwise_and_(2 ** (32 - shift) - 1)
        if factor != 1:
            h *= _signed_number(factor)
    return h


def _signed(rows: Tensor) -> Tensor:
    """The low 32 bits of int64 values as int32, without a cast that overflows."""
    return (((rows & 0xFFFFFFFF) ^ 2**31) - 2**31).to(torch.int32)


def _signed_number(value: int) -> int:
    return ((value & 0xFFFFFFFF) ^ 2**31) - 2**31
