"""A pruned net that is trained on: its zeros stay zero, through kills, resumes and other numbers of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import harness
from alexnet_ddp.errors import EXIT_USER
from alexnet_ddp.models import create_model, sparsity
from recipes import ADAMW
from twins import Bench, Run, fault


@dataclass
class Sparse:
    bench: Bench
    zeros: dict[str, Tensor]  # of the weights that the runs begin with, by name
    start: Path

    def check(self, run: Run) -> None:
        """Asserts that in weights and their running mean exactly those weights are zero that were at the beginning."""
        last = run.checkpoints[-1]
        for weights in (load_file(last / "model.safetensors"), load_file(last / "ema.safetensors")):
            for name, zeros in self.zeros.items():
                assert torch.equal(weights[name] == 0, zeros), name


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Sparse:
    folder = tmp_path_factory.mktemp("sparse")
    torch.manual_seed(0)
    net = create_model("alexnet_single", num_classes=3, width=0.05, image_size=64)
    zeros = {}
    with torch.no_grad():
        for name, module in sparsity.layers(net):
            zeros[f"{name}.weight"] = torch.rand_like(module.weight) < 0.3
            module.weight[zeros[f"{name}.weight"]] = 0.0
    start = folder / "start.safetensors"
    save_file(net.state_dict(), start)
    bench = Bench(folder, world=2, held_out=40, changes={**ADAMW, "init_from": str(start), "sparsity": "keep",
                                                         "ema__decay": 0.9})
    return Sparse(bench, zeros, start)


def test_killed_and_resumed(sparse: Sparse) -> None:
    """Killed, the file it began with gone, and resumed: the bits of the undisturbed run, and the same zeros; on three
    ranks the same zeros and nearly the same losses."""
    bench = sparse.bench
    killed = bench.run()
    result = killed.go(*fault("kill", step=7))
    assert "weights are zero (30." in result.output or "weights are zero (29." in result.output, result.output
    sparse.check(bench.twin)
    sparse.start.unlink()
    three = killed.copy("three")
    output = killed.go().check().output
    assert "exact: yes" in output
    bench.check_equal(killed)
    sparse.check(killed)
    three.go(world=3).check()
    sparse.check(three)
    mine, theirs = ([record["loss"] for record in harness.metrics(each.path)] for each in (three, bench.twin))
    assert mine == pytest.approx(theirs, rel=0.2)  # in bf16 a rounding grows fast


def test_without_a_beginning(sparse: Sparse) -> None:
    """sparsity=keep of fresh weights is one message, before anything is made."""
    run = sparse.bench.run()
    result = run.go("init_from=null", world=1)
    assert result.codes == [EXIT_USER] and "init_from=FILE.safetensors" in result.output
    assert not run.path.exists()
