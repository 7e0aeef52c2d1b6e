"""The optimizer: fused SGD with its momentum in place from the start, and the scaler that finds infinities."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alexnet_ddp.sections import OptimSection

FP16_SCALE = 2.0**16  # torch's GradScaler starts there and halves until nothing overflows


def create_optimizer(net: nn.Module, section: OptimSection) -> torch.optim.SGD:
    """Fused SGD over all parameters. The momentum exists before the first step, as zeros.

    torch would create it lazily from the first gradient, which is the same number, but a run whose first update is
    skipped, saved or resumed would then differ in kind from one that has stepped.
    """
    optimizer = torch.optim.SGD(net.parameters(), lr=section.lr, momentum=section.momentum,
                                weight_decay=section.weight_decay, nesterov=section.nesterov, fused=True)
    if section.momentum > 0:
        for parameter in net.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def create_scaler(amp: str, device: torch.device) -> torch.amp.GradScaler:
    """The scaler of fp16; in the other precisions one that stands at 1 and only finds non-finite gradients."""
    if amp == "fp16":
        return torch.amp.GradScaler(device.type, init_scale=FP16_SCALE)
    return torch.amp.GradScaler(device.type, init_scale=1.0)


def named_state(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The optimizer's live tensors: state name -> parameter name -> tensor."""
    named: dict[str, dict[str, Tensor]] = {}
    for name, parameter in net.named_parameters():
        for state, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                named.setdefault(state, {})[name] = value
    return named
