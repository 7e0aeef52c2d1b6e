"""Runs that begin with trained weights, with parts that don't learn: resumed to the bit, on any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import harness
from alexnet_ddp.checkpoint import files, store
from alexnet_ddp.errors import EXIT_USER
from alexnet_ddp.models import create_model
from twins import Bench, Run, fault, resumed_at


def save_weights(path: Path, name: str, **options: Any) -> dict[str, Tensor]:
    """Weights of another number of classes, in a file as DDP's users leave it."""
    torch.manual_seed(8)
    net = create_model(name, num_classes=7, image_size=64, **options)
    for norm in (module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    torch.save({"epoch": 9, "state_dict": {f"module.{key}": value for key, value in net.state_dict().items()}}, path)
    return net.state_dict()


def last_state(run: Run) -> tuple[dict[str, Tensor], set[str], dict[str, Any]]:
    """(weights, names of the parameters that the optimizer knows, lineage) of the newest checkpoint."""
    path = run.checkpoints[-1]
    known = {name.partition("/")[2] for name in load_file(path / "optimizer.safetensors")}
    return load_file(path / "model.safetensors"), known, store.read_manifest(path).lineage


@dataclass
class Tuned:
    """Fine-tuned runs: one to the end (`bench.twin`), one killed in the middle; the file they began with is gone."""

    bench: Bench
    killed: Run
    source: dict[str, Tensor]
    init: dict[str, Any]  # what a checkpoint must say of them

    def check_frozen(self, run: Run) -> None:
        """Asserts that frozen tensors are the source's to the bit, that all others moved, and whom momentum knows."""
        parts = tuple(self.bench.changes["freeze"])
        weights, known, lineage = last_state(run)
        assert any(name.startswith(parts) for name in weights)
        for name, tensor in weights.items():
            same = tensor.shape == self.source[name].shape and torch.equal(tensor, self.source[name])
            assert same == name.startswith(parts), name
        assert known == {name for name in self.trained if not name.startswith(parts)}
        assert lineage["init"] == self.init

    @property
    def trained(self) -> list[str]:
        """All parameters: what is no batch norm's statistic."""
        statistics = ("running_mean", "running_var", "num_batches_tracked")
        return [name for name in self.source if not name.endswith(statistics)]


def tune(folder: Path, *, freeze: list[str], model: str, kill: int, samples: int = 47, **changes: Any) -> Tuned:
    path = folder / "source.pth"
    options = {"width": changes["model__width"]} if "model__width" in changes else {}
    source = save_weights(path, model, **options)
    init = {"source": str(path), "path": str(path), "sha256": files.measure(path).sha256, "step": None, "top1": None,
            "model": None}
    bench = Bench(folder, world=2, samples=samples, held_out=40,
                  changes={"init_from": str(path), "freeze": freeze, "model__name": model, **changes})
    killed = bench.run("killed")
    result = killed.go(*fault("kill", step=kill))
    assert result.codes == [-9] * 2
    assert f"begins with the weights of {path}; " in result.output
    assert " starts fresh, for other classes" in result.output
    assert f"frozen: {', '.join(freeze)} (" in result.output
    assert bench.twin.path.exists()
    path.unlink()
    return Tuned(bench, killed, source, init)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """An AlexNet whose features are frozen, with a running mean of its weights."""
    return tune(tmp_path_factory.mktemp("tuned"), freeze=["features"], model="alexnet_single", kill=7,
                model__width=0.05, ema__decay=0.9)


def test_features_stay_and_the_rest_learns(tuned: Tuned) -> None:
    """Frozen features end as they were read, to the bit: neither gradient, momentum nor weight decay touches them;
    every other tensor moves, the fresh last layer too; the checkpoint says where the weights came from."""
    tuned.check_frozen(tuned.bench.twin)


def test_the_mean_is_of_what_learns(tuned: Tuned) -> None:
    """The running mean of the weights holds the parameters that learn, and no frozen one."""
    mean = load_file(tuned.bench.twin.checkpoints[-1] / "ema.safetensors")
    assert set(mean) == {name for name in tuned.trained if not name.startswith("features.")}


def test_exact_resume_without_the_source(tuned: Tuned) -> None:
    """Killed twice and resumed, the file it began with gone: weights, momentum and metrics of the undisturbed run."""
    run = tuned.killed.copy("resumed")
    result = run.go(*fault("kill", step=12))
    assert resumed_at(result.output) in (3, 5, 6)  # the save of step 6 may have been under way
    assert "exact: yes" in result.output and "begins with" not in result.output
    run.go().check()
    tuned.bench.check_equal(run)
    tuned.check_frozen(run)


def test_other_world_size(tuned: Tuned) -> None:
    """Resumed on three ranks: the same samples and views, the frozen tensors still the source's bits."""
    run = tuned.killed.copy("three")
    run.go(world=3).check()
    assert harness.trace(run.path) == harness.trace(tuned.bench.twin.path)
    tuned.check_frozen(run)
    mine, theirs = ([record["loss"] for record in harness.metrics(each.path)] for each in (run, tuned.bench.twin))
    assert mine == pytest.approx(theirs, rel=0.2)  # in bf16 a rounding grows fast


def test_weights_that_are_not_there(tuned: Tuned) -> None:
    """A wrong path is one message, before a run directory is made."""
    run = tuned.bench.run("nothing")
    result = run.go(world=1)
    assert result.codes == [EXIT_USER] and result.output.count("error:") == 1, result.output
    assert f"There is no '{tuned.init['path']}'" in result.output and "Traceback" not in result.output
    assert not run.path.exists()


def test_frozen_batch_norm(tmp_path: Path) -> None:
    """Statistics of frozen batch norms stay what was read, through training, evaluations, a kill and a resume, which
    is exact; those of the others move."""
    tuned = tune(tmp_path, freeze=["conv1", "stage2"], model="torchvision:shufflenet_v2_x0_5", kill=4, samples=20,
                 model__width=1.0, micro_batch=10, epochs=3, evaluate__epochs=1)
    tuned.killed.go().check()
    tuned.bench.check_equal(tuned.killed)
    tuned.check_frozen(tuned.bench.twin)
