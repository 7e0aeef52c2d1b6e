"""`alexnet-ddp demo`: the main job on data made on the spot, with a stop and an exact resume on the way.

It types the commands a user would type, and shows them; nothing in it is special to the demo but the data.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from alexnet_ddp import config as recipes
from alexnet_ddp.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, UserError
from alexnet_ddp.runfiles import METRICS

RECIPE = Path("configs/demo.yaml")
CLASSES = 12


def demo(runs: str) -> int:
    """Runs the demo; returns the exit code. Raises UserError when it isn't started in the project's folder."""
    if not RECIPE.exists():
        raise UserError(f"The demo is started in the project's folder, the one with {RECIPE}.")
    from alexnet_ddp.data.tools.demo import make_demo

    began = time.monotonic()
    recipe = recipes.load(RECIPE)
    _title("Pictures of twelve kinds, drawn on the spot")
    make_demo(Path(recipe.data.train).parent)
    print(f"{recipe.data.train} and {recipe.data.val} ({time.monotonic() - began:.0f} s)")

    _title("1. Train on two ranks, and stop half-way (USR1, as a cluster would send it)")
    # A demo is shown from its beginning; what an earlier one left is kept under another name.
    code = _run(["train", str(RECIPE), f"runs={runs}", "--nproc-per-node", "2", "--fresh"],
                run=Path(runs) / recipe.name, stop_at=0.5)
    if code != EXIT_STOPPED:
        return _unexpected("the stopped run", code)
    _title("2. The same command again: it goes on where it stopped")
    code = _run(["train", str(RECIPE), f"runs={runs}", "--nproc-per-node", "2"])
    if code != EXIT_FINISHED:
        return _unexpected("the resumed run", code)
    _title("3. The same run again under another name, never stopped, to compare")
    code = _run(["train", str(RECIPE), f"runs={runs}", "name=demo_unstopped", "--nproc-per-node", "2", "--fresh"])
    if code != EXIT_FINISHED:
        return _unexpected("the run that was never stopped", code)
    return _verdict(Path(runs) / recipe.name, Path(runs) / "demo_unstopped", seconds=time.monotonic() - began)


def _verdict(stopped: Path, unstopped: Path, *, seconds: float) -> int:
    one, other = _fingerprint(stopped), _fingerprint(unstopped)
    found = [json.loads(line) for line in (stopped / METRICS).read_text().splitlines()]
    last = [record for record in found if record["kind"] == "evaluate"][-1]
    _title("Verdict")
    for name in sorted(one):
        print(f"  {name:24} stopped and resumed {one[name][:16]}   never stopped {other[name][:16]}   "
              f"{'equal' if one[name] == other[name] else 'DIFFERENT'}")
    print(f"  held-out top-1: {last['top1']:.1%} ({last['correct1']} of {last['samples']} images; "
          f"guessing gives {1 / CLASSES:.1%}), {seconds:.0f} s in all")
    print(f"  curves: tensorboard --logdir {stopped}/tensorboard")
    if one != other:
        print("The resumed run is not the run that was never stopped: this is a bug, please report it.",
              file=sys.stderr)
        return EXIT_FAILED
    if last["top1"] < 3 / CLASSES:
        print("The net has not learned: less than three times the rate of guessing.", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_FINISHED


def _fingerprint(run: Path) -> dict[str, str]:
    """sha256 of the last checkpoint's tensors, from its manifest, by file."""
    last = sorted((run / "checkpoints").glob("step_*"))[-1]
    files: dict[str, dict[str, Any]] = json.loads((last / "manifest.json").read_text())["files"]
    return {name: written["sha256"] for name, written in files.items() if name.endswith(".safetensors")}


def _run(words: list[str], *, run: Path | None = None, stop_at: float | None = None) -> int:
    """Runs a command of ours as a user would; with `stop_at` it gets USR1 at that share of its steps."""
    print("$ alexnet-ddp", *words, flush=True)
    process = subprocess.Popen([sys.executable, "-m", "alexnet_ddp", *words])
    try:
        while stop_at is not None and run is not None and process.poll() is None:
            time.sleep(0.2)
            if _share_done(run) >= stop_at:
                process.send_signal(signal.SIGUSR1)
                stop_at = None
        return process.wait()
    except BaseException:  # Ctrl-C reaches the run as well: let it save and leave
        process.wait()
        raise


def _share_done(run: Path) -> float:
    """How much of a run its metrics show, 0 to 1."""
    from alexnet_ddp.sinks import read_records

    try:
        state = json.loads((run / "state.json").read_text())
        records = read_records(run / METRICS)
        return float(records[-1]["step"] / state["total_steps"]) if state["status"] == "running" and records else 0.0
    except (OSError, ValueError, KeyError):
        return 0.0


def _unexpected(what: str, code: int) -> int:
    print(f"The demo ends here: {what} left with exit code {code}.", file=sys.stderr)
    return code or EXIT_FAILED


def _title(text: str) -> None:
    print(f"\n=== {text}", flush=True)
