"""Pieces of the package called on forked ranks, for what no recipe can ask for: float64, nets with ties.

    found = on_ranks(train_in_float64, 20, world=3)      # what each rank returned
"""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness


def on_ranks(work: Callable[..., Any], *arguments: Any, world: int, timeout: float = 60.0,
             environments: Sequence[dict[str, str]] = (), listening: bool = False) -> list[Any]:
    """Calls `work(world: World, *arguments)` on every rank of a group and returns what each returned, by rank.

    `environments`: more variables, by rank. `listening`: rank 0 holds the port already, and hands its socket over.
    """
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(harness.free_port()),
             "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        answers = [Path(folder) / str(rank) for rank in range(world)]
        own = [*environments] or [dict[str, str]() for _ in range(world)]
        processes = [harness._context.Process(
            target=_rank, args=(work, arguments, {**place, "RANK": str(rank), **own[rank]}, answer,
                                listening and rank == 0))
            for rank, answer in enumerate(answers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
            process.kill()
        found = [pickle.loads(answer.read_bytes()) if answer.exists() else "no answer" for answer in answers]
    for rank, answer in enumerate(found):
        assert not isinstance(answer, str), f"rank {rank}: {answer}"
    return found


def _rank(work: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], answer: Path,
          listening: bool) -> None:
    os.environ.update(environment)
    if listening:
        listener = socket.socket()
        listener.bind((environment["MASTER_ADDR"], int(environment["MASTER_PORT"])))
        listener.listen()
        os.environ["ALEXNET_STORE_FD"] = str(listener.detach())
    import torch

    from alexnet_ddp.distributed import join, leave

    torch.set_num_threads(1)
    try:
        result = work(join(device="cpu", timeout=60), *arguments)
        leave()
    except BaseException:
        result = traceback.format_exc()
    answer.write_bytes(pickle.dumps(result))


def nodes_of(world: Any) -> int:
    """How many nodes a rank says there are."""
    return int(world.nodes)


def meet_and_sum(world: Any) -> tuple[float, str]:
    """(sum of rank + 1 over the ranks, what rank 0 told in the watchdog's own connection to the store)."""
    import torch
    import torch.distributed as dist

    from alexnet_ddp.watchdog import _connect

    value, store = torch.tensor(world.rank + 1.0), _connect()
    dist.all_reduce(value)
    if world.rank == 0:
        store.set("word", "told by 0")
    word = store.get("word").decode()
    dist.barrier()
    return value.item(), word


def let_go_slowly(world: Any, folder: str) -> bool:
    """Whether the run directory, which rank 0 takes a second to give back, is free when `train.let_go` returns."""
    import time

    from alexnet_ddp.train import let_go

    class SlowDirectory:
        def close(self) -> None:
            time.sleep(1.0)
            (Path(folder) / "lease.json").unlink()

    let_go(world, None, SlowDirectory() if world.rank == 0 else None)  # type: ignore[arg-type]
    return not (Path(folder) / "lease.json").exists()


# --- one float64 training run -----------------------------------------------------------------------------------

CLASSES, SIZE, SAMPLES = 4, 64, 26  # by 10: two whole batches and one of 6


def train_in_float64(world: Any, steps: int, micro_batch: int, inf_at: tuple[int, int] = (-1, -1),
                     damaged: tuple[int, ...] = ()) -> tuple[list[float], dict[str, Any], list[int]]:
    """Steps of the package's own step on a float64 net: (loss of each step, last weights, updates skipped).

    At `inf_at`, (step, rank), one pixel of one sample is infinite. `damaged` samples are left out.
    """
    import numpy as np
    import torch

    from alexnet_ddp.damage import left_out
    from alexnet_ddp.data.loader import micro_batches
    from alexnet_ddp.data.order import Order
    from alexnet_ddp.data.randomness import dropout_rows
    from alexnet_ddp.loss import Targets
    from alexnet_ddp.metrics import Window
    from alexnet_ddp.optim import create_optimizer, create_scaler
    from alexnet_ddp.sections import OptimSection
    from alexnet_ddp.step import MicroBatch, Step, wrap

    pixels, labels = _material()
    order = Order(SAMPLES, global_batch=10, seed=1, shards=4, identity="0123456789abcdef")
    net = _net()
    step = Step(wrap(net, world.device), create_optimizer(net, OptimSection(lr=0.02)),
                create_scaler("none", world.device), amp="none", clip_norm=None, tick=lambda _: None)
    window, losses = Window(1, device=world.device), []
    for number in range(steps):
        mine = order.batch(number)[order.part(number, rank=world.rank, world=world.size)]
        cuts = micro_batches(mine, micro_batch)
        rows = torch.from_numpy(dropout_rows(mine, seed=1, step=number))
        shown = pixels[mine]
        if inf_at == (number, world.rank):
            shown[0, 0, SIZE // 2, SIZE // 2] = float("inf")
        bad = np.isin(mine, damaged)
        parts = [(shown[cut], Targets(labels[mine[cut]])) for cut in cuts]
        parts = [left_out(*part, damaged=bad[cut]) if bad[cut].any() else part
                 for part, cut in zip(parts, cuts, strict=True)]
        step((MicroBatch(*part, rows[cut], cut is cuts[-1]) for part, cut in zip(parts, cuts, strict=True)),
             lr=0.02, planned=order.plan(number).count, window=window)
        losses.append(window.summary().loss)
    return losses, {name: tensor.numpy() for name, tensor in net.state_dict().items()}, list(window.counts())


def train_by_the_formula(steps: int, *, skip: int = -1, damaged: tuple[int, ...] = ()
                         ) -> tuple[list[float], dict[str, Any]]:
    """The same in plain torch: whole batches, mean loss, no DDP, SGD by hand; step `skip` moves nothing.

    Damaged samples are taken out of their batches, and the sum of the others' losses is divided by the planned size.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F

    from alexnet_ddp.data.order import Order
    from alexnet_ddp.data.randomness import dropout_rows
    from alexnet_ddp.models.dropout import set_dropout_rows

    pixels, labels = _material()
    order = Order(SAMPLES, global_batch=10, seed=1, shards=4, identity="0123456789abcdef")
    net, losses = _net(), []
    velocity = {name: torch.zeros_like(parameter) for name, parameter in net.named_parameters()}
    for number in range(steps):
        planned = order.batch(number)
        samples = planned[~np.isin(planned, damaged)]
        set_dropout_rows(net, torch.from_numpy(dropout_rows(samples, seed=1, step=number)))
        net.zero_grad()
        loss = F.cross_entropy(net(pixels[samples]), labels[samples])  # the mean over the whole global batch
        (loss * len(samples) / len(planned)).backward()
        losses.append(loss.item())
        if number == skip:
            continue
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                assert parameter.grad is not None
                velocity[name] = 0.9 * velocity[name] + parameter.grad + 5e-4 * parameter
                parameter -= 0.02 * velocity[name]
    return losses, {name: tensor.numpy() for name, tensor in net.state_dict().items()}


def _net() -> Any:
    import torch

    from alexnet_ddp.models import create_model

    torch.manual_seed(0)
    return create_model("alexnet_single", num_classes=CLASSES, width=0.05, image_size=SIZE).double()


def _material() -> tuple[Any, Any]:
    import torch

    random = torch.Generator().manual_seed(2)
    return (torch.randn(SAMPLES, 3, SIZE, SIZE, dtype=torch.float64, generator=random),
            torch.arange(SAMPLES) % CLASSES)


# --- an evaluation of a net whose logits tie --------------------------------------------------------------------


def evaluate_ties(world: Any, folder: str, batch: int) -> tuple[int, int, int, float, int, int]:
    """(samples, top-1, top-5, loss) of a net whose logits are 0 for six classes and 1 for the last two, and (top-1,
    top-5) of one that is evaluated beside it, whose logits are 1 for the first two."""
    import torch

    from alexnet_ddp.data.augment import Augment
    from alexnet_ddp.data.decoding.decode import create_decoder
    from alexnet_ddp.data.index import open_index
    from alexnet_ddp.data.loader import Loader
    from alexnet_ddp.data.records import StoredRecords
    from alexnet_ddp.data.transfer import Transfer
    from alexnet_ddp.evaluate import TILE, evaluate, view_of
    from alexnet_ddp.models import create_model
    from alexnet_ddp.sections import AugmentSection, EvaluateSection

    net = create_model("alexnet_single", num_classes=8, width=0.05, image_size=SIZE)
    name, last = [pair for pair in net.named_modules() if isinstance(pair[1], torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.0] * 6 + [1.0] * 2))
    beside = {f"{name}.bias": last.bias.detach().flip(0)}
    section = AugmentSection(size=SIZE)
    with open_index(folder) as index, Loader(StoredRecords(index, "original"), index.labels, create_decoder("auto"),
                                             rows=batch * TILE, shape=(SIZE, SIZE, 3), threads=1,
                                             prefetch=2) as loader:
        found = evaluate(net, loader, samples=len(index), batch=batch, choose=view_of(EvaluateSection(), section),
                         augment=Augment(section, channels=3, device=world.device), world=world,
                         transfer=Transfer(world.device, is_raw=False, size=SIZE, channels=3),
                         carry_on=lambda: True, tick=lambda _: None, weights=[{}, beside])
        assert found is not None and net.training
        own, other = found
        assert last.bias.tolist() == [0.0] * 6 + [1.0] * 2
        return own.samples, own.correct1, own.correct5, own.loss, other.correct1, other.correct5
