"""The words of a command line: a parser whose mistakes teach, and how a user's mistake is told."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from alexnet_ddp.errors import EXIT_FINISHED, EXIT_INTERRUPTED, UserError

# Flags people know from other trainers, and what to write here.
ELSEWHERE = {
    "--batch-size": "use global_batch=..., the total over all ranks; torchvision's and timm's is per GPU",
    "-b": "use global_batch=..., the total over all ranks; torchvision's and timm's is per GPU",
    "--lr": "use optim.lr=..., for the global batch as it is",
    "--epochs": "use epochs=...",
    "--workers": "use data.threads=...: images are decoded by threads",
    "-j": "use data.threads=...: images are decoded by threads",
    "--resume": "leave it out: a run whose directory has a checkpoint is resumed; --fresh starts over",
    "--seed": "use seed=...",
    "--data": "use data.train=... and data.val=...",
    "--amp": "use amp=bf16 or amp=fp16",
    "--output-dir": "use runs=... (the folder of all runs) and name=...",
    "--name": "use name=...",
    "--gpus": "use --nproc-per-node N",
}


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors that teach."""

    def error(self, message: str) -> NoReturn:
        for flag, advice in ELSEWHERE.items():
            if message.startswith("unrecognized arguments:") and any(
                    word.partition("=")[0].replace("_", "-") == flag for word in message.split()[2:]):
                raise UserError(f"{flag} is not known here: {advice}.")
        raise UserError(f"{message}. See: {self.prog} --help")


def answer(command: Callable[[list[str]], int], words: list[str]) -> int:
    """Runs a command and returns its exit code; a user's mistake is one clear message, once, on rank 0."""
    try:
        code = command(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # ... | head: who reads has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FINISHED
    except KeyboardInterrupt:  # of a command that has nothing to save; training handles its own
        return EXIT_INTERRUPTED
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"alexnet-ddp: error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(2.0)  # the first rank that leaves makes torchrun kill the others: let rank 0 speak first
        return error.code


def leave(code: int) -> NoReturn:
    """Ends this process now: taking torch down takes seconds, and Slurm's KillWait may be all there is left."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
