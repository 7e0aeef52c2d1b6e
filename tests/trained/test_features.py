"""`alexnet-ddp features`: the right layer, the same bits on any number of ranks and after kills, files that any reader
of safetensors reads."""

import json
import os
import shutil
import signal
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch

import harness
from alexnet_ddp import cli, load_model, read_features
from alexnet_ddp.checkpoint import files
from alexnet_ddp.data.index import open_index
from alexnet_ddp.errors import EXIT_FINISHED, EXIT_USER, UserError
from alexnet_ddp.models import create_model
from alexnet_ddp.trained import feature_file, feature_work, features, probe
from alexnet_ddp.trained.feature_file import Features, Names, Part
from alexnet_ddp.trained.features import extract_features
from alexnet_ddp.trained.graph import ExportedNet, Signature
from alexnet_ddp.trained.layers import Tap, find_layer
from alexnet_ddp.trained.probe import linear_probe
from alexnet_ddp.trained.pruning import prune
from alexnet_ddp.trained.quantization import quantize
from trained_nets import Trained

ALEXNETS = ["alexnet_single", "alexnet_paper", "alexnet_bn", "alexnet_torchvision", "torchvision:alexnet"]


# --- layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALEXNETS)
def test_sizes_at_full_width(name: str) -> None:
    """avgpool is 9216 features, fc6 and fc7 are 4096, in all AlexNets at 224 pixels."""
    with torch.device("meta"):
        net = create_model(name).eval()
        images = torch.empty(2, 3, 224, 224)
    for layer, size in (("avgpool", 9216), ("fc6", 4096), ("fc7", 4096)):
        with Tap(net, find_layer(net, layer)) as tap:
            assert tap(images).shape == (2, size)


@pytest.mark.parametrize("name", ALEXNETS[:4])
def test_what_the_layers_are(name: str) -> None:
    """The features are what goes on to the logits: avgpool through the whole classifier, fc6 and fc7 (after the ReLU)
    through its rest, give them bit by bit; the linear layer under fc7 is read before the ReLU overwrites it."""
    torch.manual_seed(0)
    net = create_model(name, num_classes=5, width=0.1, image_size=64).eval().requires_grad_(False)
    images = torch.randn(3, 3, 64, 64)
    taken = {}
    for layer in ("avgpool", "fc6", "fc7"):
        with Tap(net, find_layer(net, layer)) as tap:
            taken[layer] = tap(images)
    relu6, relu7 = [place for place, child in enumerate(net.classifier) if isinstance(child, torch.nn.ReLU)]
    logits = net(images)
    assert torch.equal(net.classifier(taken["avgpool"]), logits)
    assert torch.equal(net.classifier[relu6 + 1:](taken["fc6"]), logits)
    assert torch.equal(net.classifier[relu7 + 1:](taken["fc7"]), logits)
    with Tap(net, find_layer(net, f"classifier.{relu7 - 1}")) as tap:
        linear = tap(images)
    assert (linear < 0).any() and torch.equal(linear.relu(), taken["fc7"])


def test_other_layers() -> None:
    """Any module's name will do; a near miss is told, and so is a module that runs twice or not at all."""
    net = create_model("torchvision:resnet18", num_classes=5).eval()
    with Tap(net, find_layer(net, "avgpool")) as tap:
        assert tap(torch.zeros(2, 3, 64, 64)).shape == (2, 512)
    with pytest.raises(UserError, match="no 'fc7'"):
        find_layer(net, "fc7")
    with pytest.raises(UserError, match=r"no 'layer4.1.con2'. Did you mean layer4.1.conv2"):
        find_layer(net, "layer4.1.con2")
    with pytest.raises(UserError, match="runs 2 times"), Tap(net, find_layer(net, "layer1.0.relu")) as tap:
        tap(torch.zeros(2, 3, 64, 64))
    with pytest.raises(UserError, match="Did you mean fc7"):
        find_layer(create_model("alexnet_bn", num_classes=5, width=0.1), "fc77")


def test_exported_nets_have_no_layers() -> None:
    """They are refused by what they are, not with an empty list of names: neither read, nor quantized, nor pruned."""
    net = ExportedNet(lambda images: images, signature=Signature(None, 3, (64, 64), 5), classes=5)
    with pytest.raises(UserError, match="fc7: an exported net is one graph.*exported from"):
        find_layer(net, "fc7")
    model = replace(load_model("alexnet_single", ["model.width=0.1", "model.num_classes=5", "augment.size=64"]),
                    net=net, where="net.onnx")
    with pytest.raises(UserError, match="net.onnx: an exported net is one graph.*quantized.*exported from"):
        quantize(model, scheme="int8-weight-only")
    with pytest.raises(UserError, match="net.onnx: an exported net is one graph.*pruned.*exported from"):
        prune(model, amount=0.2)


# --- files ------------------------------------------------------------------------------------------------------


def extract(trained: Trained, data: Path, out: Path, **options: Any) -> Path:
    found = extract_features(load_model(trained.run), str(data), out=out, **{"layer": "fc7", "part": 64, **options})
    assert found == out
    return out


@pytest.fixture(scope="module")
def val_file(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extract(trained, trained.val, tmp_path_factory.mktemp("features") / "val.safetensors")


def test_contents(trained: Trained, val_file: Path) -> None:
    """Features, labels and names are those of the samples, in order, as any reader of safetensors sees them; nothing
    is left beside the file."""
    model = load_model(trained.run)
    found = read_features(val_file)
    with open_index(str(trained.val)) as index:
        assert list(found.names) == [index.name(sample) for sample in range(len(index))]
        assert found.names[-1] == index.name(len(index) - 1) and found.names[1:3] == [index.name(1), index.name(2)]
        assert np.array_equal(found.labels, index.labels) and list(found.classes) == index.classes
    last = list(model.net.classifier)[-1]
    answers = last(torch.from_numpy(np.array(found.features))).argmax(1).numpy()
    assert (answers == found.labels).mean() == json.loads((trained.run / "best.json").read_text())["top1"]
    assert found.whole.all() and not found.damaged and not found.features.flags.writeable
    with safetensors.safe_open(val_file, framework="numpy") as file:
        assert set(file.keys()) == {"features", "labels", "names", "name_ends", "whole"}
        for name in ("features", "labels", "whole"):
            assert np.array_equal(file.get_tensor(name), getattr(found, name))
    assert [path.name for path in val_file.parent.iterdir()] == [val_file.name]


def test_float16(trained: Trained, val_file: Path, tmp_path: Path) -> None:
    """--dtype float16 holds the float32 features rounded; one that is too large is refused, not written as inf."""
    half = read_features(extract(trained, trained.val, tmp_path / "half.safetensors", dtype="float16"))
    assert half.features.dtype == np.float16
    assert np.array_equal(half.features, read_features(val_file).features.astype(np.float16))
    with pytest.raises(UserError, match="doesn't fit float16"):
        features._as(np.dtype(np.float16), np.array([[1.0, 7e4]], np.float32))


def test_damaged_image(trained: Trained, val_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its features are zeros, `whole` is false, and it is told where it lies; the others are as ever. The probe counts
    it as wrong, and fits without it."""
    data = shutil.copytree(trained.val, tmp_path / "val")
    with open_index(str(data)) as index:
        broken = 70
        path = Path(index.where(broken))
    path.write_bytes(path.read_bytes()[:40])
    out = tmp_path / "val.safetensors"
    assert cli.main(["features", str(trained.run), str(data), "--layer", "fc7", "--out", str(out), "--part", "64",
                     "--device", "cpu"]) == EXIT_FINISHED
    assert f"damaged images: 1; their features are zeros, and `whole` says false\n  {path}: " in capsys.readouterr().out
    found, intact = read_features(out), read_features(val_file)
    assert np.flatnonzero(~found.whole).tolist() == [broken] == list(found.damaged)
    assert not found.features[broken].any() and intact.features[broken].any()
    others = np.arange(len(found)) != broken
    assert np.array_equal(found.features[others], intact.features[others])
    probe = linear_probe(found, found)
    assert probe.trained_on == len(found) - 1 and probe.accuracy <= 1 - 1 / len(found)


def test_refusals(trained: Trained, val_file: Path, tmp_path: Path) -> None:
    """Other features under the same name, a beginning of others, a wrong ending, a file of another kind."""
    before = val_file.read_bytes()
    with pytest.raises(UserError, match=r"holds other features .*layer: fc7 there, fc6 here"):
        extract(trained, trained.val, val_file, layer="fc6")
    assert val_file.read_bytes() == before
    work = tmp_path / "x.safetensors.parts"
    work.mkdir()
    (work / "task.json").write_text(json.dumps({**read_features(val_file).task, "part": 64, "data": "another"}))
    with pytest.raises(UserError, match="is the beginning of other features .data: another there"):
        extract(trained, trained.val, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="ends in .safetensors"):
        extract(trained, trained.val, tmp_path / "x.npy")
    with pytest.raises(UserError, match="multiple of 32, got 33"):
        extract(trained, trained.val, tmp_path / "y.safetensors", part=33)
    with pytest.raises(UserError, match="no features of ours"):
        read_features(trained.run / "best.safetensors")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(before[:-10])
    with pytest.raises(UserError, match="cut off"):
        read_features(torn)


def test_no_room(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that holds the parts but not the file as well is refused before anything is computed."""
    monkeypatch.setattr(feature_work.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 150_000))
    with pytest.raises(UserError, match="need .* 150 kB are free"):
        extract(trained, trained.val, tmp_path / "x.safetensors", layer="fc6")


def test_one_process_at_a_time(trained: Trained, tmp_path: Path) -> None:
    """A second process with the same name is refused and changes nothing; where there is no room nothing is begun, so
    that other features may be."""
    out = tmp_path / "x.safetensors"
    work = tmp_path / "x.safetensors.parts"
    work.mkdir()
    with files.locked(work / "lock", otherwise="held"), pytest.raises(UserError, match="another process is computing"):
        extract(trained, trained.val, out)
    assert [path.name for path in work.iterdir()] == ["lock"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_work.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))
        with pytest.raises(UserError, match="or --dtype float16"):
            extract(trained, trained.val, out)
    assert not work.exists()
    assert read_features(extract(trained, trained.val, out, dtype="float16")).features.dtype == np.float16


def test_half_written_files_take_no_room(trained: Trained, val_file: Path, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill left half written, of the whole and of a part, is gone before free space is asked for; a full disk
    leaves no half of the file behind."""
    out = tmp_path / "x.safetensors"
    left = [tmp_path / ".tmp-4567cdef-x.safetensors", tmp_path / "x.safetensors.parts" / ".tmp-000003-0123abcd"]
    asked = []

    def usage(path: Path) -> Any:
        asked.append([one.exists() for one in left])
        return shutil._ntuple_diskusage(0, 0, 10**9)

    def full(*args: object, **options: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(feature_work.shutil, "disk_usage", usage)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="Make room"):
        patch.setattr(os, "fsync", lambda file: full() if list(tmp_path.glob(".tmp-*")) else None)
        extract(trained, trained.val, out)
    assert not list(tmp_path.glob(".tmp-*")) and left[1].parent.is_dir()
    for path in left:
        path.write_bytes(b"half")
    assert extract(trained, trained.val, out).read_bytes() == val_file.read_bytes()
    assert asked == [[False, False]] * 2 and [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_finished_file_says_so(trained: Trained, val_file: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    """A rerun computes nothing and leaves the file as it is."""
    monkeypatch.setattr(features, "tiles", None)
    before = val_file.stat()
    assert cli.main(["features", str(trained.run), str(trained.val), "--layer", "fc7", "--out", str(val_file),
                     "--device", "cpu"]) == EXIT_FINISHED
    assert "it was finished already; nothing was computed" in capsys.readouterr().out
    assert val_file.stat().st_mtime_ns == before.st_mtime_ns


def test_memory_is_bounded(tmp_path: Path, trained: Trained) -> None:
    """Putting 40 parts of 1 MB together takes the memory of a few of them."""
    with open_index(str(trained.val)) as index:
        part = Part(np.ones((5, 50_000), np.float32), np.ones(5, np.bool_), {})
        tracemalloc.start()
        feature_file.write_whole(tmp_path / "x.safetensors", index=index, task={}, dimension=50_000, dtype="float32",
                                 damaged={}, parts=lambda: (Part(part.features.copy(), part.whole, {})
                                                            for _ in range(40)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(index) == 200 and (tmp_path / "x.safetensors").stat().st_size > 40e6
    assert peak < 8e6


# --- ranks and kills --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1000 small images of classes that the net doesn't know: 32 parts of one tile, the last one cut short."""
    return harness.make_images(tmp_path_factory.mktemp("many"), samples=1000)


@pytest.fixture(scope="module")
def straight(trained: Trained, many: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return extract(trained, many, tmp_path_factory.mktemp("straight") / "x.safetensors", part=32).read_bytes()


def words(trained: Trained, data: Path, out: Path) -> list[str]:
    return ["features", str(trained.run), str(data), "--layer", "fc7", "--out", str(out), "--part", "32",
            "--device", "cpu"]


def test_killed_and_gone_on_with(trained: Trained, many: Path, straight: bytes, tmp_path: Path) -> None:
    """Two ranks killed half-way (SIGKILL), a part damaged meanwhile, then three ranks go on: the file is that of one
    process which went straight through, byte by byte, and the parts are gone."""
    out = tmp_path / "x.safetensors"
    parts = tmp_path / "x.safetensors.parts"
    ranks = harness.start(words(trained, many, out), world=2)
    deadline = time.monotonic() + 60
    while len(list(parts.glob("0*.safetensors"))) < 4:
        assert time.monotonic() < deadline, ranks.output()
        time.sleep(0.002)
    for rank in range(2):
        ranks.signal(signal.SIGKILL, rank=rank)
    assert ranks.wait().codes == [-9, -9] and not out.exists()
    done = sorted(parts.glob("0*.safetensors"))
    assert 4 <= len(done) < 32
    torn = bytearray(done[1].read_bytes())
    torn[-40] ^= 1
    done[1].write_bytes(torn)
    result = harness.run(words(trained, many, out), world=3).check()
    assert f"going on: {32 * (len(done) - 1):,} of 1,000 images were done" in result.output
    assert out.read_bytes() == straight and not parts.exists()


def test_killed_while_it_is_put_together(trained: Trained, many: Path, straight: bytes, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill before the file has its name leaves the parts, one after that a file which is done: both end alike."""
    out = tmp_path / "x.safetensors"

    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    def kill_at_the_name(source: Path, target: Path) -> None:
        os.rename(source, target) if target != out else killed()

    with monkeypatch.context() as patch:
        patch.setattr(feature_file.os, "replace", kill_at_the_name)
        with pytest.raises(KeyboardInterrupt):
            extract(trained, many, out, part=32)
    assert not out.exists() and len(list((tmp_path / "x.safetensors.parts").glob("0*"))) == 32
    with monkeypatch.context() as patch:
        patch.setattr(features.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            extract(trained, many, out, part=32)
    assert out.read_bytes() == straight and (tmp_path / "x.safetensors.parts").exists()
    extract(trained, many, out, part=32)
    assert out.read_bytes() == straight and not (tmp_path / "x.safetensors.parts").exists()


def test_a_mistake_is_told_once(trained: Trained, tmp_path: Path) -> None:
    """Under two ranks a layer that isn't there is one message, and both leave with 2."""
    out = tmp_path / "x.safetensors"
    result = harness.run([*words(trained, trained.val, out), "--layer", "fc9"], world=2)
    assert result.codes == [EXIT_USER] * 2
    assert result.output.count("this net has no 'fc9'") == 1 and "fc7" in result.output


# --- the probe --------------------------------------------------------------------------------------------------


def test_linear_probe(trained: Trained, val_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The accuracy told is that of scikit-learn's own pipeline at the C told, well above chance; features of another
    layer are refused before anything is computed."""
    pytest.importorskip("sklearn", reason="the extra `probe` isn't installed")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    train_file = extract(trained, trained.data / "train", tmp_path / "train.safetensors")
    assert cli.main(["features", str(trained.run), str(trained.val), "--layer", "fc7", "--out", str(val_file),
                     "--device", "cpu", "--linear-probe", str(train_file)]) == EXIT_FINISHED
    said = capsys.readouterr().out
    train, val = read_features(train_file), read_features(val_file)
    probe = linear_probe(train, val)
    assert probe.told in said and (probe.samples, probe.trained_on, probe.classes) == (len(val), len(train), 4)
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=probe.c, max_iter=200))
    with threadpool_limits(1):
        reference.fit(np.array(train.features), train.labels)
    assert probe.accuracy == reference.score(np.array(val.features), val.labels) > 0.5
    other = tmp_path / "other.safetensors"
    assert cli.main(["features", str(trained.run), str(trained.val), "--layer", "fc6", "--out", str(other),
                     "--device", "cpu", "--linear-probe", str(train_file)]) == EXIT_USER
    assert "fc7 there, fc6 here" in capsys.readouterr().err and not list(tmp_path.glob("other*"))


def made(labels: list[int], classes: tuple[str, ...]) -> Features:
    values = np.random.default_rng(0).normal(size=(len(labels), 3)).astype(np.float32)
    names = Names(np.zeros(0, np.uint8), np.zeros(len(labels), np.int64))
    return Features(values, np.array(labels, np.int64), names, classes, np.ones(len(labels), np.bool_), {}, {})


def test_a_class_of_few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the one image of a class stands, both classes are fitted to; also where the images that choose the
    regularisation are too few to have it."""
    pytest.importorskip("sklearn", reason="the extra `probe` isn't installed")
    for few in (probe.CHOOSING, 5):
        monkeypatch.setattr(probe, "CHOOSING", few)
        for place in range(8):
            part = made([int(number == place) for number in range(8)], ("a", "b"))
            found = linear_probe(part, part)
            assert (found.trained_on, found.classes) == (8, 2) and found.accuracy > 0.5


def test_classes_that_the_probe_does_not_know(val_file: Path) -> None:
    """Are told before features are computed; fewer classes than it knows are not refused."""
    pytest.importorskip("sklearn", reason="the extra `probe` isn't installed")
    found = read_features(val_file)
    probe.check_probe(val_file, found.task, classes=found.classes[:2])
    with pytest.raises(UserError, match="1 of the data's 3 classes not: zebra.*Its own are"):
        probe.check_probe(val_file, found.task, classes=[*found.classes[:2], "zebra"])
