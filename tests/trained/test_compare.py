"""Nets side by side. No test looks at how long anything took: only at what is measured, and what is made of it."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from alexnet_ddp import cli, load_model
from alexnet_ddp.errors import OutOfMemory, UserError
from alexnet_ddp.trained import comparison, entry, scatter, trial
from alexnet_ddp.trained.export import SUFFIXES, Format, export
from alexnet_ddp.trained.trial import Prepared, Tried
from trained_nets import Trained

SMALL = ["model.width=0.0625", "augment.size=64", "model.num_classes=10"]


# --- what is known without measuring ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("resnet18", 224), ("efficientnet_b0", 224), ("mobilenet_v2", 224),
                                            ("inception_v3", 299), ("regnet_y_400mf", 224), ("vit_b_16", 224)])
def test_torchvisions_nets_are_known_without_weights(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, top-1 and MACs are those that torchvision publishes (of inception_v3 it counts the auxiliary head,
    and of vit no attention); images have the weights' own size; nothing is fetched."""
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("weights were fetched"))
    found, told = entry.look(f"torchvision:{name}"), torchvision.models.get_model_weights(name).DEFAULT
    assert found.size == size and found.classes == 1000 and found.file_bytes is not None
    assert found.top1 == pytest.approx(told.meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100)
    assert told.name in found.source and "fresh weights" in found.notes[0]
    if name != "inception_v3":
        assert found.parameters == told.meta["num_params"]
    assert found.macs == pytest.approx(1e9 * told.meta["_ops"], rel=0.02)


def test_our_alexnet_has_torchvisions_accuracy_and_no_other() -> None:
    """The net that takes torchvision's weights unchanged is told with theirs; another size, width or net is not."""
    assert entry.look("alexnet_torchvision").top1 == pytest.approx(0.56522)
    assert entry.look("torchvision:alexnet").parameters == entry.look("alexnet_torchvision").parameters == 61_100_840
    for other in (entry.look("alexnet_torchvision", ["augment.size=192"]), entry.look("alexnet_single"),
                  entry.look("alexnet_torchvision", ["model.num_classes=10"])):
        assert other.top1 is None and other.source == "" and "no accuracy" in other.notes[0]


def test_models_named_twice_are_measured_once(trained: Trained) -> None:
    """Whether by the same word or by another one for the same weights; a checkpoint of the run is another model."""
    run = str(trained.run)
    chosen, notes = entry.same([run, "alexnet_bn", f"{run}/", f"{run}@best", "alexnet_bn", f"{run}@last"])
    assert chosen == [run, "alexnet_bn", f"{run}@last"] and len(notes) == 3
    assert f"also as {run}" in notes[0] and notes[2] == "alexnet_bn is named twice: measured once"


@pytest.mark.parametrize(("words", "told"), [
    (["alexnet_singel"], "There is no 'alexnet_singel'"),
    (["torchvision:resnet81"], "did you mean torchvision:resnet18"),
    (["torchvision:resnet18", "model.width=0.5"], "no such option"),
    (["alexnet_bn", "augment.size=20"], "63|pixels"),
    (["alexnet_bn", "--seconds", "-1"], "--seconds must be at least 0"),
    (["alexnet_bn", "--rounds", "0"], "--rounds must be at least 1"),
    (["alexnet_bn", "--threads", "0"], "--threads must be at least 1"),
    (["augment.size=64"], "one MODEL or more"),
    (["alexnet_bn", "--plot", "picture.pdf"], ".png or .svg"),
    (["alexnet_bn", "--plot", "/nowhere/picture.png"], "can't be written"),
])
def test_mistakes_are_told_before_anything_is_measured(words: list[str], told: str,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Misspelt names, options that a net doesn't have, and figures out of range."""
    monkeypatch.setattr(comparison, "Process", lambda *_, **__: pytest.fail("something was opened"))
    with pytest.raises(UserError, match=told):
        comparison.main(words)


def test_no_gpu_no_figures_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """--device cuda where there is none is refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="sees no GPU"):
        comparison.compare(["alexnet_bn"], device="cuda")


# --- one net ----------------------------------------------------------------------------------------------------


def test_the_best_batch_is_worth_it() -> None:
    """Two per cent more images a second make a larger batch the better one, less doesn't."""
    tried = [Tried(1, 100.0, 0), Tried(2, 101.0, 0), Tried(4, 110.0, 0), Tried(8, 111.0, 0), Tried(16, 60.0, 0)]
    assert trial.best_of(tried).batch == 4
    assert trial.best_of(tried[:1]).batch == 1


@pytest.fixture
def small() -> trial.Trial:
    return trial.Trial("alexnet_single", SMALL, device="cpu", threads=torch.get_num_threads())


def test_measuring_leaves_the_net_as_it_was(small: trial.Trial) -> None:
    """Training steps are taken at rate 0: weights and answers afterwards are those of before, to the bit."""
    images = torch.randn(4, 3, 64, 64)
    before, weights = small.net(images), [each.clone() for each in small.net.parameters()]
    found = small.prepare(train_batch=6, seconds=0.02)
    for kind in trial.KINDS:
        assert len(small.measure(kind, seconds=0.0)) == 1
    assert small.optimizer is not None and not small.net.training
    assert all(torch.equal(one, other) for one, other in zip(weights, small.net.parameters(), strict=True))
    assert torch.equal(small.net(images), before)
    assert found.memory_train is not None and found.best in [each.batch for each in found.search]
    assert [each.batch for each in found.search] == [2**place for place in range(len(found.search))]


def test_gradients_and_momentum_count_as_memory() -> None:
    """A step of a net with 16 MB of weights holds at least three times as much: weights, gradients, momentum."""
    wide = trial.Trial("alexnet_torchvision", ["model.width=0.25"], device="cpu", threads=torch.get_num_threads())
    weights = 4 * (wide.entry.parameters or 0)
    assert weights > 14_000_000
    found = wide.prepare(train_batch=1, seconds=0.0)
    assert found.memory_train is not None and found.memory_train > 2.9 * weights
    assert 0.9 * weights < found.memory_one < found.memory_train


@pytest.mark.parametrize(("left", "told"), [(10**5, "too little for the weights"), (10**6, "no training")])
def test_a_net_that_does_not_fit(left: int, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for the weights: refused before it is made. Room for inference alone: no training, and a note says so."""
    monkeypatch.setattr(trial, "memory_left", lambda: left)
    if told != "no training":
        with pytest.raises(OutOfMemory, match="for its weights alone"):
            trial.Trial("alexnet_single", SMALL, device="cpu", threads=1)
        return
    tight = trial.Trial("alexnet_single", SMALL, device="cpu", threads=torch.get_num_threads())
    found = tight.prepare(train_batch=4096, seconds=10.0)
    assert found.memory_train is None and "not trained" in found.notes[0]
    assert len(found.search) < 11 and "memory" in found.ended


def test_batch_norm_of_one_value_is_no_end() -> None:
    """A training batch that the net can't take (resnet18, one image of 32 pixels) costs the training figure alone."""
    one = trial.Trial("torchvision:resnet18", ["augment.size=32"], device="cpu", threads=torch.get_num_threads())
    found = one.prepare(train_batch=1, seconds=0.0)
    assert found.memory_train is None and "not trained at a batch of 1" in found.notes[0]
    assert len(one.measure("latency", seconds=0.0)) == 1


def test_a_net_of_one_image_is_measured_by_one(small: trial.Trial) -> None:
    """As an export without --dynamic-batch makes it: the search ends there, and nothing else."""
    net = small.net

    class Single(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if len(images) != 1:
                raise RuntimeError("expected a batch of 1")
            return net(images)

    small.net, small.entry.trainable = Single(), False
    found = small.prepare(train_batch=4, seconds=10.0)
    assert found.best == 1 and found.memory_train is None and "expected a batch of 1" in found.ended


def test_a_killed_process_is_told() -> None:
    """As the kernel ends one when memory runs out; a user's mistake comes through as it is."""
    process = trial.Process("alexnet_single", SMALL, device="cpu", threads=1)
    try:
        assert process.process.pid is not None
        os.kill(process.process.pid, signal.SIGKILL)
        with pytest.raises(trial.Died, match="memory runs out"):
            process.measure("latency", seconds=0.0)
    finally:
        process.close()
    with pytest.raises(UserError, match="There is no 'alexnet_singel'"):
        trial.Process("alexnet_singel", [], device="cpu", threads=1)


# --- several ----------------------------------------------------------------------------------------------------


class Pretended:
    """In the place of a Process: says what it was asked for; one that is called mortal ends in its second round."""

    heard: list[tuple[str, str]] = []

    def __init__(self, spec: str, overrides: Any, *, device: str, threads: int) -> None:
        if spec == "torchvision:vgg11":
            raise OutOfMemory("it is too large")
        self.entry, self.calls = entry.look(spec, overrides), 0

    def prepare(self, *, train_batch: int, seconds: float) -> Prepared:
        return Prepared(10**6, [Tried(1, 1.0, 10**6), Tried(2, 2.0, 2 * 10**6)], "there", 2, 2 * 10**6, 3 * 10**6, [])

    def measure(self, kind: str, *, seconds: float) -> list[float]:
        self.heard.append((self.entry.spec, kind))
        self.calls += 1
        if self.entry.spec == "alexnet_bn" and self.calls > 3:
            raise trial.Died("it was killed")
        return [0.01, 0.02, 0.03]

    def close(self) -> None:
        self.heard.append((self.entry.spec, "closed"))


def test_nets_take_turns_and_one_that_ends_takes_nobody_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round measures each net, beginning with another one; rows keep the order that was asked for; those of nets
    that don't fit, or die, hold what is known and no figures."""
    monkeypatch.setattr(comparison, "Process", Pretended)
    Pretended.heard = []
    found = comparison.compare(["alexnet_single", "torchvision:vgg11", "alexnet_bn", "alexnet_torchvision"], rounds=3)
    single, bn, theirs = "alexnet_single", "alexnet_bn", "alexnet_torchvision"
    turns = [spec for spec, kind in Pretended.heard if kind == "latency"]
    assert turns == [single, bn, theirs, bn, theirs, single, single, theirs]
    assert [row.entry.spec for row in found.rows] == [single, "torchvision:vgg11", bn, theirs]
    assert [sorted(row.timings) for row in found.rows] == [sorted(trial.KINDS), [], [], sorted(trial.KINDS)]
    assert found.rows[0].timings["latency"].n == 3 and found.rows[0].timings["latency"].calls == 9
    assert {spec for spec, kind in Pretended.heard if kind == "closed"} == {single, bn, theirs}
    text = found.told()
    assert "torchvision:vgg11: not measured, it is too large" in text and "alexnet_bn: not measured, it was" in text
    assert "| alexnet_torchvision | 20.0 (20.0 to 20.0) |" in text and "| 100 (100 to 100) |" in text
    assert "132,863,336" in text  # what is known without measuring, of the one that doesn't fit, too
    plain = json.loads(json.dumps(found.plain()))
    assert plain["models"][0]["timings"]["throughput"]["images_per_second"] == pytest.approx(100)


def test_a_run_by_its_own_recipe(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    """Its width, size, classes, file and best accuracy; a checkpoint's accuracy is that of its own evaluation. One
    process a net, by the command, as JSON."""
    words = ["compare", str(trained.run), f"{trained.run}@last", "--seconds", "0", "--rounds", "1", "--json"]
    assert cli.main([*words, "--train-batch", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = json.loads((trained.run / "best.json").read_text())
    run, last = found["models"]
    assert (run["size"], run["classes"], run["top1"]) == (64, 4, best["top1"])
    assert run["file_bytes"] == (trained.run / "best.safetensors").stat().st_size and run["file"] == "best.safetensors"
    assert run["parameters"] == last["parameters"] == pytest.approx(run["file_bytes"] / 4, rel=0.01)
    assert last["top1"] is not None and last["source"].startswith("small/metrics.jsonl, step")
    assert run["source"] == f"small/best.json, step {best['step']}"
    for model in (run, last):
        assert set(model["timings"]) == set(trial.KINDS) and model["timings"]["training"]["batch"] == 4
        assert model["prepared"]["memory_one"] > 0 and model["prepared"]["best"] >= 1
    assert found["machine"]["torch"] == str(torch.__version__) and found["notes"] == []


@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_exported_nets(form: Format, tmp_path: Path) -> None:
    """A graph's parameters aren't a net's to count or train, also where the program shows some; the file has a size."""
    if form == "onnx":
        pytest.importorskip("onnxscript")
    done = export(load_model("alexnet_single", SMALL), tmp_path / f"net{SUFFIXES[form]}", format=form)
    found, _ = entry.open_net(str(done.path), device=torch.device("cpu"))
    assert not found.trainable and (found.parameters, found.macs) == (None, None)
    assert (found.file_bytes, found.file, found.size, found.classes) == (done.bytes, done.path.name, 64, 10)
    assert any("can't be asked for parameters" in note for note in found.notes)


# --- the picture ------------------------------------------------------------------------------------------------


def test_the_picture_names_nets_of_known_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One point a net in each panel, one without MACs in the first alone; the others are told on stderr."""
    pytest.importorskip("matplotlib")
    points = [scatter.Point("torchvision:one", 0.7, 0.01, 10**9, 10**7), scatter.Point("two", 0.5, 0.02, None, None),
              scatter.Point("three", None, 0.02, 10**9, 10**7)]
    scatter.draw(points, tmp_path / "picture.svg", title="here")
    text = (tmp_path / "picture.svg").read_text()
    assert text.count(">one</text>") == 2 and text.count(">two</text>") == 1 and ">three</text>" not in text
    assert "three" in capsys.readouterr().err


def test_areas_go_with_parameters() -> None:
    """Twice the parameters, twice the area; nothing vanishes."""
    assert scatter.area(200, largest=200) == 2 * scatter.area(100, largest=200) == scatter.AREA
    assert scatter.area(1, largest=10**9) == scatter.area(None, largest=10) > 0
