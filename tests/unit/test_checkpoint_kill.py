"""Saves that are really killed: the newest complete checkpoint always loads."""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODES = ("calls", "moments")

# Imports torch once and, having a single thread, can fork a writer per kill. The writer saves steps 1, 2, 3
# ... (each twice, as before and after an evaluation), deletes old ones, and tells every finished step through
# a pipe.
SCRIPT = """
import json, os, random, select, shutil, signal, sys, time
from pathlib import Path
import torch
from alexnet_ddp.checkpoint import choose, files, store
from alexnet_ddp.checkpoint.state import TrainState

torch.set_num_threads(1)
directory = Path(sys.argv[1])
CALLS = ("open", "fsync", "rename", "mkdir", "rmdir", "unlink", "replace")

def state(step):
    tensors = {"w": torch.full((100_000,), float(step))}
    return TrainState(step=step, model=tensors, optimizer={"m": {"w": tensors["w"] + 1}})

def save_forever(first, attempt, finished):
    for step in range(first, first + 1000):
        for _ in range(2):
            path = store.write(
                state(step), directory=directory, attempt=attempt, lineage={}, guard=lambda: None
            )
            os.write(finished, b"%d " % step)
            choose.retain(directory, keep=2, verified=path)

def killed_before(call_number):
    # SIGKILL ourselves right before the n-th file operation.
    done = 0
    def wrap(real):
        def wrapped(*args, **options):
            nonlocal done
            done += 1
            if done == call_number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)
        return wrapped
    for call in CALLS:
        setattr(os, call, wrap(getattr(os, call)))
    files.open = wrap(open)

outcomes = []
last = 0
for number, mode in enumerate(["calls"] * 60 + ["moments"] * 20):
    finished, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(finished)
        if mode == "calls":
            killed_before(number + 1)
        save_forever(last + 1, number, writing)
        os._exit(1)
    os.close(writing)
    if mode == "moments":
        start = time.monotonic()
        select.select([finished], [], [])  # the first save is done: the kill comes in one of the next four
        time.sleep(random.Random(number).uniform(0, 4 * (time.monotonic() - start)))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    told = os.read(finished, 1 << 16).split()
    os.close(finished)
    told = int(told[-1]) if told else last
    left = sorted(os.listdir(directory)) if directory.exists() else []
    choice = choose.choose(directory)
    assert choice.damaged == [], (number, choice, left)
    found = 0
    if choice.path is not None:
        loaded, _ = store.load(choice.path)
        found = loaded.step
        assert loaded.model["w"].eq(found).all() and loaded.optimizer["m"]["w"].eq(found + 1).all()
    assert told <= found <= told + 1, (number, told, found, left)
    assert not [name for name in os.listdir(directory) if name.startswith(".")]
    outcomes.append({"mode": mode, "left": left})
    last = found
print(json.dumps(outcomes))
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    """An empty directory, in memory where there is one: a kill is the same there, and fsync is free."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def test_sigkill_in_a_save_never_costs_a_finished_checkpoint(directory: Path) -> None:
    """SIGKILL before each file operation of a save, and at random moments: the newest whole one loads."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, directory], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr  # the script checks what each kill left
    results = json.loads(done.stdout)
    assert len(results) == 80
    left = {
        mode: " ".join(name for r in results if r["mode"] == mode for name in r["left"]) for mode in MODES
    }
    assert ".tmp-" in left["moments"]
    # In mid-save, in mid-deletion of an old one, of a replaced one, and between the renames of a replacement.
    for pattern in (
        r"\.tmp-",
        r"\.trash-step_\d+( |$)",
        r"\.trash-step_\d+\.previous",
        r"(^| )step_\d+\.previous",
    ):
        assert re.search(pattern, left["calls"]), f"no kill left {pattern}"
