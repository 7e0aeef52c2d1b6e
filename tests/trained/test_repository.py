"""The model repository of NVIDIA Triton Inference Server: its layout, its configuration, versions, and the way back.

That server can't run here: config.pbtxt is read as text of the published message (protobuf/model_config.proto of
github.com/triton-inference-server/common), of which the fields that we write are declared below.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alexnet_ddp import cli, load_model
from alexnet_ddp.errors import EXIT_FINISHED, EXIT_USER, UserError
from alexnet_ddp.trained import repository
from alexnet_ddp.trained.export import Exported
from alexnet_ddp.trained.model import Model
from alexnet_ddp.trained.parity import Parity
from alexnet_ddp.trained.repository import publish, rollback, versions

NARROW = ["model.width=0.05", "model.num_classes=5", "augment.size=64"]
# message -> field -> (number, type); "*" repeats, enumerations by their published numbers
MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "ModelConfig": {"name": (1, "string"), "platform": (2, "string"), "version_policy": (3, "ModelVersionPolicy"),
                    "max_batch_size": (4, "int32"), "input": (5, "*ModelInput"), "output": (6, "*ModelOutput"),
                    "dynamic_batching": (11, "ModelDynamicBatching")},
    "ModelInput": {"name": (1, "string"), "data_type": (2, "DataType"), "format": (3, "Format"), "dims": (4, "*int64")},
    "ModelOutput": {"name": (1, "string"), "data_type": (2, "DataType"), "dims": (3, "*int64"),
                    "label_filename": (4, "string")},
    "ModelVersionPolicy": {"specific": (3, "Specific")},
    "Specific": {"versions": (1, "*int64")},
    "ModelDynamicBatching": {"max_queue_delay_microseconds": (2, "uint64")},
}
ENUMS = {"DataType": {"TYPE_INVALID": 0, "TYPE_FP16": 10, "TYPE_FP32": 11},
         "Format": {"FORMAT_NONE": 0, "FORMAT_NCHW": 2}}


def config_of(path: Path) -> Any:
    """config.pbtxt as the server's own parser reads it; raises ParseError."""
    pytest.importorskip("google.protobuf")
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for value, number in values.items():
            enum.value.add(name=value, number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            made = message.field.add(name=field, number=number, label=3 if kind.startswith("*") else 1)
            if (kind := kind.removeprefix("*")) in MESSAGES or kind in ENUMS:
                made.type, made.type_name = (11 if kind in MESSAGES else 14), f".inference.{kind}"
            else:
                made.type = {"string": 9, "int32": 5, "int64": 3, "uint64": 4}[kind]
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    of = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))
    return text_format.Parse(path.read_text(), of())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that writes a few bytes, for tests of what is around it."""
    def export(model: Model, out: Path, **_: Any) -> Exported:
        out.write_bytes(b"onnx")
        return Exported(out, 4, Parity(0.0, 1.0, 1e-4, 10, 10, "none"), [])

    monkeypatch.setattr(repository, "export", export)


def narrow(*more: str) -> Model:
    return load_model("alexnet_torchvision", [*NARROW, *more])


def test_a_model_is_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command: the layout, a configuration that the message accepts, a net that takes any batch."""
    pytest.importorskip("onnxruntime")
    words = ["export", "alexnet_torchvision", *NARROW, "--repo", str(tmp_path / "models"), "--name", "figures"]
    assert cli.main(words) == EXIT_FINISHED
    assert "figures: version 1 is to be served" in capsys.readouterr().out
    folder = tmp_path / "models" / "figures"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == [
        "1", "1/model.onnx", "config.pbtxt", "labels.txt"]
    config = config_of(folder / "config.pbtxt")
    assert (config.name, config.platform, config.max_batch_size) == ("figures", "onnxruntime_onnx", 32)
    assert list(config.version_policy.specific.versions) == [1] and config.HasField("dynamic_batching")
    image, answer = config.input[0], config.output[0]
    assert (image.name, image.data_type, image.format, list(image.dims)) == ("images", 11, 2, [3, 64, 64])
    assert (answer.name, answer.data_type, list(answer.dims)) == ("logits", 11, [5])
    assert (folder / answer.label_filename).read_text().splitlines() == narrow().spoken

    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx")
    shown = np.random.default_rng(0).standard_normal((config.max_batch_size, *image.dims), dtype=np.float32)
    logits, = session.run([answer.name], {image.name: shown})
    assert np.allclose(logits, narrow().net(torch.from_numpy(shown)), atol=1e-4)


def test_versions_and_the_way_back(tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers go up, also after a rollback; a rollback names the version before and removes none; edits stay."""
    model, config = narrow(), tmp_path / "net" / "config.pbtxt"
    assert [publish(model, tmp_path, name="net").version for _ in range(3)] == [1, 2, 3]
    config.write_text(config.read_text() + "instance_group [ { count: 2 } ]\n")
    words = ["export", "--repo", str(tmp_path), "--name", "net", "--rollback"]
    assert cli.main(words) == EXIT_FINISHED
    assert "version 2 is to be served, no longer version 3" in capsys.readouterr().out
    assert rollback(tmp_path, name="net") == (2, 1)
    with pytest.raises(UserError, match="none before it"):
        rollback(tmp_path, name="net")
    assert "versions: [ 1 ]" in config.read_text() and versions(tmp_path / "net") == [1, 2, 3]
    done = publish(model, tmp_path, name="net")
    assert (done.version, done.before) == (4, 1)
    assert rollback(tmp_path, name="net") == (4, 1)  # not to 3, which was rolled back from
    with pytest.raises(UserError, match="none before it"):
        rollback(tmp_path, name="net")
    assert [publish(model, tmp_path, name="net").before for _ in range(2)] == [1, 5]
    shutil.rmtree(tmp_path / "net" / "5")
    assert rollback(tmp_path, name="net") == (6, 1)  # 5 is gone
    config.write_text(config.read_text().replace("versions: [ 1 ] } }", "versions: [ 4 ] } }"))  # by hand
    assert rollback(tmp_path, name="net") == (4, 3)
    assert publish(model, tmp_path, name="net").version == 7
    assert config.read_text().endswith("instance_group [ { count: 2 } ]\n") and "versions: [ 7 ]" in config.read_text()
    assert cli.main([*words[:4], "other", "--rollback"]) == EXIT_USER
    assert "There are: net." in capsys.readouterr().err


def test_an_export_while_another_is_made(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that another export had served meanwhile is the one that a rollback goes back to."""
    model, export = narrow(), repository.export
    publish(model, tmp_path, name="net")

    def interrupted(*args: Any, **options: Any) -> Exported:
        monkeypatch.setattr(repository, "export", export)
        assert publish(model, tmp_path, name="net").version == 2
        return export(*args, **options)

    monkeypatch.setattr(repository, "export", interrupted)
    done = publish(model, tmp_path, name="net")
    assert (done.version, done.before) == (3, 2)
    assert [rollback(tmp_path, name="net") for _ in range(2)] == [(3, 2), (2, 1)]


def test_a_net_that_fails_parity_changes_nothing(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was served is served still; a model that there wasn't leaves no folder."""
    publish(narrow(), tmp_path, name="net")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fails(model: Model, out: Path, **_: Any) -> Exported:
        out.write_bytes(b"half")
        raise UserError("parity")

    monkeypatch.setattr(repository, "export", fails)
    for name in ("net", "new"):
        with pytest.raises(UserError, match="parity"):
            publish(narrow(), tmp_path, name=name)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_a_kill_before_the_switch(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version without its line in config.pbtxt isn't served, and the next export takes another number."""
    model = narrow()
    publish(model, tmp_path, name="net")
    with monkeypatch.context() as patch:
        patch.setattr(repository, "_serve", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            publish(model, tmp_path, name="net")
    assert "versions: [ 1 ]" in (tmp_path / "net" / "config.pbtxt").read_text()
    assert publish(model, tmp_path, name="net").version == 3


def test_a_kill_before_the_first_version_is_served(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
                                                  ) -> None:
    """Names of classes that it left behind aren't taken for those of the net that is published next."""
    with monkeypatch.context() as patch:
        patch.setattr(repository, "_config", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            publish(narrow(), tmp_path, name="net")
    labels = tmp_path / "net" / "labels.txt"
    assert labels.is_file() and not (tmp_path / "net" / "config.pbtxt").exists()
    other = replace(narrow(), classes=("a", "b", "c", "d", "e"))
    publish(other, tmp_path, name="net")
    assert labels.read_text().splitlines() == other.spoken != narrow().spoken
    with pytest.raises(UserError, match="names other classes"):
        publish(narrow(), tmp_path, name="net")


def test_exports_of_equal_process_ids(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two containers, say, at a time: each has a staging folder of its own, and both versions appear."""
    export, model = repository.export, narrow()

    def meanwhile(*args: Any, **more: Any) -> Exported:
        monkeypatch.setattr(repository, "export", export)
        assert publish(model, tmp_path, name="net").version == 1
        return export(*args, **more)

    monkeypatch.setattr(repository, "export", meanwhile)
    assert publish(model, tmp_path, name="net").version == 2


def test_unlike_nets_and_strange_folders(tmp_path: Path, quick: None) -> None:
    """One config.pbtxt holds for all versions: another size, normalisation or number of classes needs another name."""
    publish(narrow(), tmp_path, name="net")
    for other in (["augment.size=80"], ["augment.mean=[0,0,0]"], ["model.num_classes=6"]):
        with pytest.raises(UserError, match="another --name"):
            publish(narrow(*other), tmp_path, name="net")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "letters.txt").touch()
    with pytest.raises(UserError, match="letters.txt"):
        publish(narrow(), tmp_path, name="strange")
    with pytest.raises(UserError, match="part of an address"):
        publish(narrow(), tmp_path, name="../net")
