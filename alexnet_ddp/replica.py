"""The replicated training state on this rank: captured into a TrainState, or put back from one on all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alexnet_ddp.checkpoint.state import TrainState
from alexnet_ddp.distributed import World, on_rank_0
from alexnet_ddp.errors import UserError
from alexnet_ddp.metrics import Window
from alexnet_ddp.models.dropout import set_dropout_rows
from alexnet_ddp.models.fitting import put_into
from alexnet_ddp.models.frozen import within
from alexnet_ddp.models.weights import Weights
from alexnet_ddp.optim import named_state
from alexnet_ddp.step import Step

Place = dict[str, Any]  # the plain fields of a TrainState


def capture(place: Place, *, step: Step, window: Window, fp16: bool) -> TrainState:
    """The run's state between two steps, with live tensors. Collective, and waits for the device."""
    net = step.net.module
    skipped, in_a_row = window.counts()
    scaler = None
    if fp16:
        held = step.scaler.state_dict()
        scaler = {"scale": float(held["scale"]), "growth_tracker": int(held["_growth_tracker"])}
    return TrainState(
        **{**place, "skipped": skipped, "skipped_in_a_row": in_a_row}, scaler=scaler, model=net.state_dict(),
        optimizer=named_state(net, step.optimizer), ema=step.mean, window=window.summed(), window_rows=window.filled)


def begin_with(weights: Weights | None, *, world: World, net: nn.Module, recipe: dict[str, Any]
               ) -> tuple[dict[str, Any], str]:
    """Puts the weights that rank 0 has read into every rank's net (bare, on its device). Collective.

    Returns their facts, and a line for people. What keeps its fresh values has them from the seed, the same on all
    ranks. Raises UserError on all ranks when the weights don't fit.
    """
    def work() -> tuple[dict[str, Any], str]:
        assert weights is not None
        fresh = put_into(net, weights, recipe=recipe)
        still = [name for name in fresh if any(within(name, part) for part in recipe["freeze"])]
        if still:
            raise UserError(f"freeze={', '.join(recipe['freeze'])} would keep {still[0]} at the random numbers that it "
                            f"begins with: {weights.where} has another number of classes, so that the last layer "
                            f"starts fresh. Freeze parts before it, such as freeze=[features].")
        layer = f"; {fresh[0].rpartition('.')[0]} starts fresh, for other classes" if fresh else ""
        return weights.facts, f"begins with the weights of {weights.where}{layer}"

    told = on_rank_0(world, work)
    for tensor in net.state_dict().values():
        dist.broadcast(tensor, src=0)
    return told


def put_back(state: TrainState | None, *, world: World, step: Step, window: Window) -> Place:
    """Loads rank 0's state on all ranks and returns the plain fields of it. Collective.

    Raises UserError on all ranks when the checkpoint's tensors are not the net's.
    """
    net = step.net.module
    live = {"model": net.state_dict(), **named_state(net, step.optimizer), "ema": step.mean}
    box: list[Any] = [None, ""]
    if state is not None:
        # Another optimizer, or a mean, that --accept-changes has let in begins as in a new run: its state at zero, the
        # mean at the weights. What isn't kept any more is left behind.
        states = {kind: state.optimizer.get(kind, new) for kind, new in named_state(net, step.optimizer).items()}
        mean = {name: state.ema.get(name, state.model[name]) for name in live["ema"] if name in state.model}
        saved = {"model": state.model, **states, "ema": mean}
        box = [_plain(state), _difference(live, saved)]
        if not box[1]:
            for kind, tensors in live.items():
                for name, tensor in tensors.items():
                    tensor.copy_(saved[kind][name])
    dist.broadcast_object_list(box, src=0, group=world.control)
    place, difference = box
    if difference:
        raise UserError(f"The checkpoint doesn't fit the net: {difference}.\nUse the recipe it was made with, "
                        "or give the new run a name of its own (name=...).")
    if place is None:
        return _place(_plain(TrainState()))
    for tensors in live.values():
        for tensor in tensors.values():
            dist.broadcast(tensor, src=0)
    if place["scaler"] is not None:
        held = step.scaler.state_dict()
        step.scaler.load_state_dict({**held, "scale": place["scaler"]["scale"],
                                     "_growth_tracker": place["scaler"]["growth_tracker"]})
    window.restore(None if state is None else state.window, filled=place["window_rows"], skipped=place["skipped"],
                   in_a_row=place["skipped_in_a_row"], owner=world.rank == 0)
    return _place(place)


def _plain(state: TrainState) -> Place:
    return dict(state.plain())


def _place(plain: Place) -> Place:
    return {name: value for name, value in plain.items() if name not in ("scaler", "window_rows")}


def _difference(live: dict[str, dict[str, Tensor]], saved: dict[str, dict[str, Tensor]]) -> str:
    for kind in live.keys() | saved.keys():
        mine, theirs = live.get(kind, {}), saved.get(kind, {})
        for name in sorted(mine.keys() ^ theirs.keys()):
            return f"{kind} '{name}' is only in the {'net' if name in mine else 'checkpoint'}"
        for name in mine:
            if mine[name].shape != theirs[name].shape:
                return f"{kind} '{name}' is {list(theirs[name].shape)} there and {list(mine[name].shape)} here"
    return ""


def warm_up(step: Step, *, channels: int, size: int, device: torch.device) -> list[str]:
    """Two throw-away synchronised passes, after which nothing but DDP's bucket layout has changed.

    Returns the names of batch norms that see a single value per channel and sample: they can't do with one sample.

    DDP rebuilds its buckets after the first backward, and the place of a gradient in a bucket decides in which order
    an all-reduce sums the ranks. Every start, fresh or resumed, goes through here, so that the first real step of
    each uses the same layout: without it three ranks differ in the last bits.
    """
    net = step.net
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    pixels = torch.zeros(2, channels, size, size, device=device).contiguous(memory_format=torch.channels_last)
    lone: list[str] = []

    def look(name: str, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0][0, 0].numel() == 1 and name not in lone and net.module.get_submodule(name).training:
            lone.append(name)

    handles = [module.register_forward_pre_hook(lambda _, inputs, name=name: look(name, inputs))
               for name, module in net.module.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for _ in range(2):
        set_dropout_rows(net.module, torch.zeros(2, dtype=torch.int64, device=device))
        with step.autocast():
            output = net(pixels)
        output.float().sum().backward()
    net.zero_grad(set_to_none=True)
    for name, buffer in net.named_buffers():
        buffer.copy_(buffers[name])
    for handle in handles:
        handle.remove()
    return lone


def has_torch_dropout(net: nn.Module) -> bool:
    """Whether a net draws from torch's generators in training, as torchvision's own do."""
    return any(isinstance(module, nn.Dropout) or "StochasticDepth" in type(module).__name__
               for module in net.modules())
