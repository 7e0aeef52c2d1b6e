"""The optimizer: fused, with its whole state in place from the start, and the scaler that finds infinities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alexnet_ddp.sections import OptimSection

FP16_SCALE = 2.0**16  # torch's GradScaler starts there and halves until nothing overflows


def create_optimizer(net: nn.Module, section: OptimSection) -> torch.optim.Optimizer:
    """A fused optimizer over all parameters that take gradients, in the groups of `parameter_groups`.

    sgd    v = momentum v + (g + weight_decay w);  w -= lr v, or lr (g + weight_decay w + momentum v) with nesterov
           (Sutskever et al. 2013, section 2, in torch's form)
    adamw  Loshchilov and Hutter 2019, algorithm 2 without its schedule multiplier, as torch has it: m and s are running
           means of g and g^2;  w -= lr weight_decay w;  w -= lr m' / (sqrt(s') + eps) with m', s' free of their bias

    Its state exists before the first step, as zeros. torch would create it lazily from the first gradient, which is the
    same number, but a run whose first update is skipped, saved or resumed would then differ in kind from one that has
    stepped. A skipped update leaves all of it alone, AdamW's count of steps included.
    """
    groups = parameter_groups(net, section)
    states: list[str] = []
    optimizer: torch.optim.Optimizer
    if section.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=section.lr, momentum=section.momentum,
                                    weight_decay=section.weight_decay, nesterov=section.nesterov, fused=True)
        states = ["momentum_buffer"] if section.momentum > 0 else []
    else:
        optimizer = torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps,
                                      weight_decay=section.weight_decay, fused=True)
        states = ["exp_avg", "exp_avg_sq"]
    for parameter in (each for group in optimizer.param_groups for each in group["params"]):
        if section.name == "adamw":  # float32 on the parameter's device, as the fused kernel wants it
            optimizer.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for state in states:
            optimizer.state[parameter][state] = torch.zeros_like(parameter)
    return optimizer


def parameter_groups(net: nn.Module, section: OptimSection) -> list[dict[str, Any]]:
    """torch's parameter groups: one, or with `decay_on: weights` a second one without weight decay.

    Weights are what has two dimensions or more (filters, matrices); biases and the scales of normalisation layers have
    one, and are left alone (He et al. 2019, Bag of Tricks, section 3.1, "no bias decay").
    """
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if section.decay_on == "all":
        return [{"params": trained}]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1]},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def create_scaler(amp: str, device: torch.device) -> torch.amp.GradScaler:
    """The scaler of fp16; in the other precisions one that stands at 1 and only finds non-finite gradients."""
    if amp == "fp16":
        return torch.amp.GradScaler(device.type, init_scale=FP16_SCALE)
    return torch.amp.GradScaler(device.type, init_scale=1.0)


def named_state(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The optimizer's live tensors: state name -> parameter name -> tensor."""
    named: dict[str, dict[str, Tensor]] = {}
    for name, parameter in net.named_parameters():
        for state, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                named.setdefault(state, {})[name] = value
    return named
