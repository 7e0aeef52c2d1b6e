"""What a rank computes on: its cores, its memory, and kernels that repeat their bits."""

from __future__ import annotations

import os
import resource

import torch

from alexnet_ddp import distributed
from alexnet_ddp.config import Config
from alexnet_ddp.cores import usable_cores
from alexnet_ddp.data.training import largest_part
from alexnet_ddp.distributed import World


def prepare_torch(config: Config, world: World) -> None:
    """Threads, and the kernels that repeat their bits when asked to."""
    torch.set_num_threads(config.torch_threads or cores(world))
    if world.on_gpu:
        torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def cores(world: World) -> int:
    """Cores that this rank has."""
    return distributed.cores_of_a_rank(usable_cores(), local_size=world.local_size, environment=os.environ)


def memory_peak(world: World) -> int:
    """Bytes: the device's allocations on CUDA, this process's resident memory on the CPU."""
    if world.on_gpu:
        return torch.cuda.max_memory_allocated(world.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def out_of_memory(config: Config, world: World) -> str:
    """What to change when memory runs out: never the global batch."""
    smaller = largest_part(config, world=world.size) // 2
    fix = (f"Set micro_batch={smaller}; the global batch stays {config.global_batch}." if smaller else
           "Not even one sample fits: use a smaller net or augment.size.")
    return f"out of memory with micro_batch={config.micro_batch}, peak {memory_peak(world) / 2**20:.0f} MB. {fix}"
