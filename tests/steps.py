"""The package's own step on one rank: a narrow net, ten samples, what an optimizer holds."""

import itertools

import torch
from torch import Tensor, nn

from alexnet_ddp.ema import Ema
from alexnet_ddp.loss import Targets
from alexnet_ddp.metrics import Window
from alexnet_ddp.models import create_model
from alexnet_ddp.optim import create_optimizer, create_scaler, named_state
from alexnet_ddp.sections import OptimSection
from alexnet_ddp.step import MicroBatch, Step, wrap

SIZE, CLASSES, N = 64, 4, 10
SCALE = 256.0  # of fp16's losses
SECTION = OptimSection(lr=0.02, momentum=0.9, weight_decay=5e-4)
INF, NAN = float("inf"), float("nan")


def make_net(kind: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return create_model("alexnet_single", num_classes=CLASSES, width=0.05, image_size=SIZE).to(kind)


def make_step(*, amp: str = "none", clip: float | None = None, kind: torch.dtype = torch.float32,
              section: OptimSection = SECTION, mean: bool = False) -> Step:
    """With `mean`, one that keeps a running mean of the weights."""
    net, device = make_net(kind), torch.device("cpu")
    scaler = create_scaler(amp, device)
    if amp == "fp16":  # torch's first scale overflows in this net, as it may
        scaler.load_state_dict({**scaler.state_dict(), "scale": SCALE})
    return Step(wrap(net, device), create_optimizer(net, section), scaler, amp=amp, clip_norm=clip,
                tick=lambda stage: None, ema=Ema(net) if mean else None)


def batch(seed: int, *, cuts: tuple[int, ...] = (0, N), kind: torch.dtype = torch.float32) -> list[MicroBatch]:
    """Ten samples in micro-batches between the cuts; the same samples for a seed however they are cut."""
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randn(N, 3, SIZE, SIZE, generator=random, dtype=torch.float64).to(kind)
    labels = torch.randint(0, CLASSES, (N,), generator=random)
    rows = torch.randint(0, 2**32, (N,), generator=random)
    pieces = list(itertools.pairwise(cuts))
    return [MicroBatch(pixels[a:b], Targets(labels[a:b]), rows[a:b], last=number == len(pieces) - 1)
            for number, (a, b) in enumerate(pieces)]


def spoilt(batches: list[MicroBatch], number: int, value: float) -> list[MicroBatch]:
    batches[number].pixels[0, 0, 0, 0] = value
    return batches


def take(step: Step, batches: list[MicroBatch], window: Window | None = None, *, planned: int = N,
         ema_decay: float | None = None) -> Window:
    window = window or Window(20, device=torch.device("cpu"))
    step(batches, lr=0.02, planned=planned, window=window, ema_decay=ema_decay)
    return window


def state(step: Step) -> dict[str, Tensor]:
    """Weights, their running mean and what the optimizer holds by name, copied."""
    net = step.net.module
    found = {**net.state_dict(), **{f"{kind} of {name}": value for kind, tensors in
                                    named_state(net, step.optimizer).items() for name, value in tensors.items()}}
    found |= {f"mean of {name}": value for name, value in step.mean.items()}
    return {name: value.clone() for name, value in found.items()}


def differs(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference relative to the tensor's own size."""
    with torch.no_grad():
        return max(float((a[name] - b[name]).abs().max() / b[name].abs().max().clamp_min(1e-30)) for name in b)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
