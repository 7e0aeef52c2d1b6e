"""Pruned nets: which weights, on what share, what is refused, and the command with training on."""

from __future__ import annotations

import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alexnet_ddp import cli, config, load_model, seeds
from alexnet_ddp.errors import EXIT_FINISHED, EXIT_STOPPED, EXIT_USER, UserError
from alexnet_ddp.models import sparsity
from alexnet_ddp.trained import pruning, shrinkage
from alexnet_ddp.trained.model import Model
from alexnet_ddp.trained.pruning import prune, tune, tuning
from alexnet_ddp.trained.quantization import quantize
from trained_nets import Trained, command

SMALL = ["model.width=0.125", "model.num_classes=5", "augment.size=64"]


def test_the_smallest_of_all_weights() -> None:
    """A share of all weights together: those below one threshold are zero, the others are as they were, as are biases;
    the model itself stays."""
    model = load_model("alexnet_bn", SMALL)
    whole = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    pruned = prune(model, amount=0.3)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.net.state_dict().items())
    assert pruned.net.state_dict().keys() == whole.keys()
    weights = torch.cat([module.weight.flatten().abs() for _, module in sparsity.layers(model.net)])
    limit = weights.kthvalue(round(0.3 * len(weights))).values
    for name, tensor in pruned.net.state_dict().items():
        pruned_here = name in {f"{layer}.weight" for layer, _ in sparsity.layers(model.net)}
        expected = torch.where(whole[name].abs() <= limit, 0, whole[name]) if pruned_here else whole[name]
        assert torch.equal(tensor, expected), name
    assert sparsity.overall(sparsity.sparsity(pruned.net)).share == pytest.approx(0.3, abs=1e-5)
    assert pruned.facts["pruning"]["structure"] == "weights" and pruned.facts["top1"] is None


def test_whole_channels() -> None:
    """A quarter of each layer's output channels, those of the smallest sum of magnitudes; the last is whole."""
    model = load_model("alexnet_single", SMALL)
    pruned = prune(model, amount=0.25, structure="channels")
    named = list(sparsity.layers(pruned.net))
    for name, module in named[:-1]:
        size = model.net.get_submodule(name).weight.flatten(1).abs().sum(1)
        least = set(size.argsort()[:round(0.25 * len(size))].tolist())
        assert set((module.weight.flatten(1) == 0).all(1).nonzero().flatten().tolist()) == least, name
    assert not (named[-1][1].weight == 0).any()


@pytest.mark.parametrize("amount", [0.0, 1.0, 1.5, -0.1, float("nan")])
def test_amounts_that_are_none(amount: float) -> None:
    """Are refused, with an example."""
    with pytest.raises(UserError, match="between 0 and 1.*--amount 0.2"):
        prune(load_model("alexnet_single", SMALL), amount=amount)


def test_what_cannot_be_pruned() -> None:
    """A quantized net, one without layers of weights, a share that leaves a layer nothing."""
    model = load_model("alexnet_single", SMALL)
    with pytest.raises(UserError, match="quantize the result"):
        prune(quantize(model, scheme="int8-weight-only"), amount=0.2)
    with pytest.raises(UserError, match="neither convolutions"):
        prune(replace(model, net=torch.nn.ReLU()), amount=0.2)
    with pytest.raises(UserError, match="none of the 16 channels of features.block1"):
        prune(model, amount=0.99, structure="channels")


def test_a_pruned_net_can_be_quantized(tmp_path: Path) -> None:
    """Its zeros are zero in int8, too, and both files say what was done."""
    pruned = prune(load_model("alexnet_single", SMALL), amount=0.4)
    smaller = quantize(pruned, scheme="int8-weight-only")
    name = "classifier.1"
    assert not smaller.net.get_submodule(name).weight.qdata[pruned.net.get_submodule(name).weight == 0].any()
    smaller.save(tmp_path / "small.safetensors")
    assert load_model(tmp_path / "small.safetensors").facts["made_from"]["pruning"]["amount"] == 0.4


def test_the_recipe_of_training_on() -> None:
    """Its own name, the pruned weights, their zeros kept; what that sets can't be set."""
    config = tuning("configs/demo.yaml", ["epochs=3", "runs=/x"])
    assert (config.name, config.init_from, config.sparsity) == ("demo-pruned", "/x/demo-pruned-start.safetensors",
                                                                "keep")
    with pytest.raises(UserError, match="init_from, sparsity"):
        tuning("configs/demo.yaml", ["sparsity=free", "init_from=x"])


def test_how_bare_weights_see_is_told_on_the_command_line(trained: Trained, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """--finetune takes key=value for CONFIG; of weights that don't say how they see, the net is opened by them too."""
    model = load_model(trained.run)
    torch.save(model.net.state_dict(), tmp_path / "bare.pth")
    begun = []

    def tune(pruned: Model, *args: object, **options: object) -> tuple[int, None]:
        begun.append(pruned.preprocessing)
        return EXIT_STOPPED, None

    monkeypatch.setattr(pruning, "tune", tune)
    size = model.preprocessing.size
    assert cli.main(["prune", str(tmp_path / "bare.pth"), "--amount", "0.2", "--finetune", "configs/demo.yaml",
                     f"data.val={trained.val}", f"model.name={model.name}", f"model.width={model.config.model.width}",
                     f"model.num_classes={model.num_classes}", f"augment.size={size}", "augment.mean=[0.5,0.5,0.5]",
                     "--device", "cpu", f"runs={tmp_path}"]) == EXIT_STOPPED
    assert [(seen.size, seen.mean) for seen in begun] == [(size, (0.5, 0.5, 0.5))]


def test_a_run_of_that_name_is_not_taken(tmp_path: Path) -> None:
    """A run that began with something else is refused at once, with another name; one that began so goes on."""
    words = [f"runs={tmp_path}", "name=mine"]
    config = tuning("configs/demo.yaml", words)
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").write_text("init_from: null\n")
    with pytest.raises(UserError, match="did not begin with a net pruned.*name=mine_2"):
        tuning("configs/demo.yaml", words)
    (config.run_dir / "config.yaml").write_text(f"init_from: {config.init_from}\n")
    assert tuning("configs/demo.yaml", words) == config


def test_prune_train_on_and_evaluate(trained: Trained, tmp_path: Path) -> None:
    """The command, from a run to a file: three rows of measurements, zeros as many as were pruned, a file that opens
    with the run's classes and the told accuracy. The same command goes on (here: is finished): to
    another file it trains no step."""
    out = tmp_path / "sparse.safetensors"
    words = ["prune", trained.run, "--amount", "0.5", "--finetune", trained.run / "config.yaml", f"runs={tmp_path}",
             "name=sparse", "epochs=1", "evaluate.epochs=1", "schedule.warmup_epochs=0", "optim.lr=0.002"]
    done = command(*words, "--seconds", 0.1, "--out", out)
    assert done.returncode == EXIT_FINISHED, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("|")]
    names = [row[1].strip() for row in rows]
    assert {"as it is", "pruned", "trained on"} < set(names)
    whole = rows[names.index("all")]
    assert float(whole[4]) == pytest.approx(50, abs=0.01)
    model, before = load_model(out), load_model(trained.run)
    assert sparsity.overall(sparsity.sparsity(model.net)).share == pytest.approx(0.5, abs=1e-4)
    assert (model.classes, model.preprocessing) == (before.classes, before.preprocessing)
    assert f"{100 * model.facts['top1']:.2f}" == rows[names.index("trained on")][2].strip()
    assert re.search(r"begins with the weights of .*sparse-start", done.stdout + done.stderr)
    refused = command(*words, "--seconds", 0.1, "--out", out)
    assert refused.returncode == EXIT_USER and "exists already" in refused.stderr
    steps = (tmp_path / "sparse" / "metrics.jsonl").read_bytes()
    again = command(*words, "--seconds", 0.1, "--out", tmp_path / "again.safetensors")
    assert again.returncode == EXIT_FINISHED, again.stderr
    assert (tmp_path / "sparse" / "metrics.jsonl").read_bytes() == steps and b'"train"' in steps
    same = load_model(tmp_path / "again.safetensors").tensors()
    assert all(torch.equal(tensor, same[name]) for name, tensor in model.tensors().items())


def test_stop_signals_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it trains they are the queue's; after it, also after an error, who had them has them again. One that comes
    as training ends stops the command."""
    pruned = prune(load_model("alexnet_single", SMALL), amount=0.4)
    numbers = [getattr(signal, f"SIG{name}") for name in seeds.SIGNALS]
    before = [signal.getsignal(number) for number in numbers]

    def run(queue: seeds.Queue, words: list[str]) -> int:
        assert signal.getsignal(signal.SIGTERM) == queue._handle
        signal.raise_signal(signal.SIGTERM)
        return 0

    def broken(queue: seeds.Queue, words: list[str]) -> int:
        assert signal.getsignal(signal.SIGTERM) == queue._handle
        raise OSError

    monkeypatch.setattr(seeds.Queue, "run", run)
    assert tune(pruned, "configs/demo.yaml", [f"runs={tmp_path}"]) == (EXIT_STOPPED, None)
    assert [signal.getsignal(number) for number in numbers] == before
    monkeypatch.setattr(seeds.Queue, "run", broken)
    with pytest.raises(OSError):
        tune(pruned, "configs/demo.yaml", [f"runs={tmp_path}"])
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("text", ["2012", "a #b", "null", "über: {x}", None])
def test_texts_stay_texts(text: str | None) -> None:
    """Names and places that YAML would read as something else reach the recipe as they are."""
    assert config.parse_override(pruning._override("data.val", text)) == (["data", "val"], text)


def test_held_out_data_are_opened_before_training(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  ) -> None:
    """Data that aren't there, or of classes that the net doesn't know, are told before a step is trained, and what
    leaves accuracy out."""
    monkeypatch.setattr(pruning, "tune", None)
    other = tmp_path / "val" / "another"
    other.mkdir(parents=True)
    (other / "x.jpg").write_bytes(next((trained.val / "ring").iterdir()).read_bytes())
    for place, told in (("none", r"data\.val=.*none"), ("val", "the net doesn't know: another")):
        with pytest.raises(UserError, match=rf"(?s){told}.*data\.val=null"):
            pruning.main(["--amount", "0.5", "--finetune", str(trained.run / "config.yaml"), "--device", "cpu",
                          str(trained.run), f"data.val={tmp_path / place}", f"runs={tmp_path}"])


def test_each_net_by_its_own_classes(trained: Trained) -> None:
    """A net whose classes stand in another order is as accurate as before, beside the first."""
    model = load_model(trained.run)
    turned = replace(load_model(trained.run), classes=model.classes[::-1])
    with torch.no_grad():
        last = list(turned.net.classifier)[-1]
        last.weight.copy_(last.weight.flip(0))
        last.bias.copy_(last.bias.flip(0))
    first, second = shrinkage._evaluations([("a", model), ("b", turned)])
    assert first is not None and second is not None and first.correct1 == second.correct1 > 100
