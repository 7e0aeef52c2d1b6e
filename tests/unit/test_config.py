"""Recipes: what is refused and in which words, what YAML's traps become, and what a changed field means."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from alexnet_ddp import config as recipes
from alexnet_ddp import dialect, rules
from alexnet_ddp.changes import differences, flatten
from alexnet_ddp.config import Config
from alexnet_ddp.errors import UserError
from alexnet_ddp.models.recipe import create_for

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The smallest recipe there is."""
    path = tmp_path / "small.yaml"
    path.write_text("data: {train: /images}\n")
    return path


def load(path: Path, *overrides: str, text: str | None = None) -> Config:
    if text is not None:
        path.write_text(text)
    return recipes.load(path, overrides)


def value(config: Config, path: str) -> Any:
    return flatten(config.model_dump(mode="json"))[path]


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrong", "said"), [
    ("optim.momentun=0.9", "did you mean 'optim.momentum'?"),
    ("epoch=3", "did you mean 'epochs'?"),
    ("globalbatch=3", "did you mean 'global_batch'?"),
    ("num_classes=3", "did you mean 'model.num_classes'?"),  # in another section
    ("train=/x", "did you mean 'data.train'?"),
    ("evaluate.batch_size=4", "did you mean 'evaluate.batch'?"),  # not the advice on a training batch
    ("batch_size=32", "use global_batch, the total over all ranks"),
    ("data.batch-size=32", "key=value"),
    ("lr=0.1", "use optim.lr"),
    ("norm_weight_decay=0", "use optim.decay_on=weights"),
    ("pct_start=0.3", "use schedule.rise"),
    ("model_ema_decay=0.99", "use ema.decay"),  # and not what is near in name, 'model'
    ("decay_epochs=30", "use schedule.step_epochs"),
    ("optimizer=adamw", "use optim.name"),
    ("optim.learning_rate=0.1", "use optim.lr"),
    ("model.pretrained=true", "use init_from=torchvision:NAME"),
    ("finetune=runs/a", "use init_from="),
    ("freeze_layers=features", "did you mean 'freeze'?"),
    ("data.num_workers=8", "use data.threads"),
    ("checkpoint.interval=3", "known: minutes, epochs, steps, keep"),  # nothing is near: what there is
])
def test_unknown_key_names_the_right_one(recipe: Path, wrong: str, said: str) -> None:
    """An unknown key is refused with the nearest key there is, or with what other trainers' word is called here."""
    with pytest.raises(UserError) as error:
        load(recipe, wrong)
    assert said in str(error.value)
    assert wrong.partition("=")[0] in str(error.value)


@pytest.mark.parametrize(("wrong", "said"), [
    ("epochs=ten", "epochs: must be a whole number, got 'ten'"),
    ("epochs=10.5", "epochs: must be a whole number, got 10.5"),
    ("epochs=true", "epochs: must be a number, got True"),
    ("optim.lr=true", "optim.lr: must be a number, got True"),
    ("clip_norm=false", "clip_norm: must be a number, got False"),
    ("optim.lr=fast", "optim.lr: must be a number, got 'fast'"),
    ("optim.lr=1e999", "optim.lr: must be a finite number, got inf"),
    ("optim.lr=.nan", "optim.lr: must be a number, got '.nan'"),
    ("optim.lr=0", "optim.lr: must be greater than 0, got 0"),
    ("model.dropout=1", "model.dropout: must be less than 1, got 1"),
    ("data.train=", "data.train: must be a string, got None"),
    ("data.train=[a, b]", "data.train: must be a string, got ['a', 'b']"),
    ("optim.lr.x=1", "optim.lr: must be a number, got {'x': 1}"),
    ("optim.name=sdg", "must be 'sgd' or 'adamw', got 'sdg'; did you mean 'sgd'?"),
    ("optim.betas=[0.9, 1]", "optim.betas: must be less than 1, got 1"),
    ("data.threads=many", "data.threads: must be 'auto', or must be a whole number, got 'many'"),
    ("augment.scale=[0.5]", "augment.scale: must be a list of as many values as its default has, got [0.5]"),
    ("augment.scale=[0.5, 0.6, 0.7]", "augment.scale: must be a list of as many values as its default has"),
    ("augment.color_jitter=[0, 0, 0, 0.6]", "augment.color_jitter: must be less than or equal to 0.5, got 0.6"),
    ("deterministic=maybe", "deterministic: must be a boolean"),
    ("optim=0.1", "'optim' is a section"),
    ("optim={lr: 0.1}", "'optim' is a section"),
    ("freeze={features: 1}", "freeze: must be a list, got {'features': 1}"),
    ("init_from=''", "init_from: "),
    ("x={[1]: 2}", "a key must be a word"),
    ("seed", "written key=value"),
    ("=3", "written key=value"),
])
def test_wrong_value_states_rule_and_finding(recipe: Path, wrong: str, said: str) -> None:
    """A value of the wrong type or out of bounds is refused with its key, the rule and what was found, in one line."""
    with pytest.raises(UserError) as error:
        load(recipe, wrong)
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


@pytest.mark.parametrize(("text", "said"), [
    ("data: {train: /x}\nepochs: 3\nepochs: 4\n", "line 3: key 'epochs' is given twice"),
    ("data: {train: /x, train: /y}\n", "line 1: key 'train' is given twice"),
    ("data: {train: /x}\n1: 2\n", "line 2: a key must be a word, got 1"),
    ("? [a, b]\n: 1\n", "a key must be a word"),
    ("- a\n- b\n", "must be a mapping"),
    ("data: {train: /x}\noptim:\nepochs: 3\n", "optim: must be a section"),
    ("data: 7\n", "data: must be a section"),
    ("data: {train: /x\n", "not valid YAML"),
    ("\tepochs: 3\n", "not valid YAML"),
    ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ("a: &a {b: *a}\n", "not valid YAML"),
    ("--- {}\n--- {}\n", "not valid YAML"),
    ("", "data.train must say where"),
])
def test_malformed_file_is_one_message(recipe: Path, text: str, said: str) -> None:
    """A key given twice, a key that is no word, a section without fields and broken YAML are each a UserError."""
    with pytest.raises(UserError) as error:
        load(recipe, text=text)
    assert said in str(error.value)


def test_other_files_are_called_by_their_name(recipe: Path) -> None:
    """What isn't a recipe isn't called one, and no recipe is offered in its place."""
    with pytest.raises(UserError, match=r"^No profile at .*smal\.yaml\.$"):
        dialect.read_yaml(recipe.with_name("smal.yaml"), what="profile")
    for text, said in (("[", "is not valid YAML"), ("- a", "must be a mapping")):
        recipe.write_text(text)
        with pytest.raises(UserError, match=rf"^The profile .* {said}"):
            dialect.read_yaml(recipe, what="profile")


def test_file_that_is_not_there(recipe: Path) -> None:
    """A missing recipe names the nearest file beside it; a folder or bytes that are no text are refused too."""
    with pytest.raises(UserError, match=r"No recipe at .*smal\.yaml.*Did you mean .*small\.yaml\?"):
        recipes.load(recipe.with_name("smal.yaml"))
    with pytest.raises(UserError, match="can't be read"):
        recipes.load(recipe.parent)
    recipe.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(UserError, match="can't be read"):
        recipes.load(recipe)


def test_all_mistakes_are_told_at_once(recipe: Path) -> None:
    """Several mistakes in one recipe come in one message, a line each."""
    with pytest.raises(UserError) as error:
        load(recipe, "epochs=x", "optim.lr=-1", "modell.name=a", "data.threads=x")
    lines = str(error.value).splitlines()
    assert lines[0] == "The recipe has 4 mistakes:"
    assert len(lines) == 5


# --- YAML's traps, overrides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("written", "path", "read"), [
    ("1e-4", "optim.lr", 1e-4), ("1E4", "optim.lr", 1e4), ("5.0e-4", "optim.lr", 5e-4), (".5", "optim.lr", 0.5),
    ("1.", "optim.lr", 1.0), ("2", "optim.lr", 2.0), ("1_000", "epochs", 1000), ("+7", "epochs", 7),
    ("off", "model.name", "off"), ("no", "data.train", "no"), ("on", "data.train", "on"), ("y", "name", "y"),
    ("true", "deterministic", True), ("off", "deterministic", False),
    ("12:30:45", "deadline", "12:30:45"), ("1:30", "deadline", "1:30"), ("45", "deadline", "45"),
    ("2026-01-01", "name", "2026-01-01"), ("5", "name", "5"), ("0x10", "name", "0x10"),
    ("null", "clip_norm", None), ("~", "data.val", None), ("*.tar", "data.train", "*.tar"),
    ("a-{00..12}.tar", "data.train", "a-{00..12}.tar"), ("/a.tar::train", "data.train", "/a.tar::train"),
    ("[0.1, 0.2, 0.3, 0]", "augment.color_jitter", [0.1, 0.2, 0.3, 0.0]),
    ("features", "freeze", ["features"]), ("features, classifier.1", "freeze", ["features", "classifier.1"]),
    ("[features, classifier.1]", "freeze", ["features", "classifier.1"]), ("", "freeze", []), ("", "init_from", None),
    ("torchvision:alexnet", "init_from", "torchvision:alexnet"), ("runs/a@last", "init_from", "runs/a@last"),
])
def test_scalars_mean_what_they_look_like(recipe: Path, written: str, path: str, read: Any) -> None:
    """`1e-4` is a number; `off`, dates and times are words; so on the command line as in a file."""
    found = value(load(recipe, f"{path}={written}"), path)
    assert found == read
    assert type(found) is type(read)


def test_traps_in_a_file(recipe: Path) -> None:
    """In a file, too: 1e-4 is a float, off is no false, and `amp: off` is refused with the word that was meant."""
    config = load(recipe, text="data: {train: off}\noptim: {lr: 1e-4}\ndeadline: 12:00:00\n")
    assert (config.data.train, config.optim.lr, config.deadline) == ("off", 1e-4, "12:00:00")
    with pytest.raises(UserError, match="got 'off'; did you mean 'none'"):
        load(recipe, "amp=off")
    with pytest.raises(UserError, match="got False; did you mean 'none'"):
        load(recipe, "amp=false")


def test_overrides_lie_over_the_file(recipe: Path) -> None:
    """Overrides win over the file, the last one over those before, and leave the section's other fields alone."""
    config = load(recipe, "optim.lr=0.2", "optim.lr=0.3", text="data: {train: /x}\noptim: {lr: 0.1, momentum: 0.5}\n")
    assert (config.optim.lr, config.optim.momentum) == (0.3, 0.5)
    assert config.data.train == "/x"
    tree = {"optim": {"lr": 0.1}}
    recipes.apply_overrides(tree, ["optim.lr=0.2"])
    assert tree == {"optim": {"lr": 0.1}}  # a copy was changed


def test_name_is_the_files(recipe: Path) -> None:
    """A run without a name is named after its recipe's file, and lies in runs/."""
    assert load(recipe).run_dir == Path("runs/small")
    assert load(recipe, "name=other", "runs=/r").run_dir == Path("/r/other")


# --- rules over several fields, durations -----------------------------------------------------------------------


@pytest.mark.parametrize(("overrides", "said"), [
    (["augment.scale=[0.9, 0.2]"], "augment.scale must be"),
    (["augment.scale=[0.5, 1.5]"], "<= 1"),
    (["augment.ratio=[0, 1]"], "augment.ratio must be"),
    (["augment.std=[0.2, 0, 0.2]"], "augment.std must be above 0"),
    (["augment.pca_eigenvalues=[0.2, 0.02, 0.002]"], "got only one of them"),
    (["augment.pca_eigenvalues=[1, 1, 1]", "augment.pca_eigenvectors=[[1,0,0],[0,1,0],[0,1,0]]"],
     "got a product of 1.000 of rows 2 and 3"),
    (["augment.pca_eigenvalues=[1, 1, 1]", "augment.pca_eigenvectors=[[1,0,0],[0,2,0],[0,0,1]]"],
     "got a product of 4.000 of rows 2 and 2"),
    (["augment.mixup=0.2", "global_batch=1"], "Use a larger global_batch"),
    (["augment.cutmix=1", "global_batch=1"], "Use a larger global_batch"),
    (["epochs=3", "schedule.warmup_epochs=3"], "schedule.warmup_epochs must be under epochs"),
    (["schedule.name=cosine", "schedule.eta_min=0.5", "optim.lr=0.1"], "schedule.eta_min must not exceed"),
    (["schedule.name=polynomial", "schedule.eta_min=0.5", "optim.lr=0.1"], "schedule.eta_min must not exceed"),
    (["schedule.name=multistep", "schedule.milestones=[30, 20]"], "milestones must ascend, each epoch named once, got"),
    (["schedule.name=multistep", "schedule.milestones=[3, 3]"], "schedule.milestones must ascend"),
    (["schedule.name=multistep", "epochs=60"], "milestones must lie below epochs, got [30, 60, 80] in a run of 60"),
    (["schedule.name=exponential"], "schedule.gamma=0.926 would leave a thousandth"),
    (["optim.nesterov=true", "optim.momentum=0"], "optim.nesterov needs"),
    (["optim.nesterov=true", "optim.name=adamw"], "got optim.name=adamw"),
    (["model.in_channels=2"], "model.in_channels must be 3"),
    (["data.stored=raw256", "augment.crop=squash"], "data.stored=raw256"),
    (["name=../up"], "name must be letters"),
    (["name=a/b"], "name must be letters"),
    (["deadline=soon"], "A duration is written"),
    (["deterministic=true", "device=cuda", "model.name=torchvision:vgg16_bn"], "AdaptiveAvgPool2d to 7x7"),
])
def test_rules_across_fields(recipe: Path, overrides: list[str], said: str) -> None:
    """Fields that are right alone but wrong together are refused."""
    with pytest.raises(UserError) as error:
        load(recipe, *overrides)
    assert said in str(error.value)


@pytest.mark.parametrize(("text", "seconds"), [
    ("90m", 5400), ("4h", 14400), ("1h30m", 5400), ("2d", 172800), ("30s", 30), ("1.5h", 5400), ("45", 2700),
    ("10:30", 630), ("1:30:00", 5400), ("100:00:00", 360000), ("1-12", 129600), ("1-12:30", 131400),
    ("1-12:00:05", 129605), (" 90m ", 5400), ("0", 0),
])
def test_durations(text: str, seconds: float) -> None:
    """Durations in words and in Slurm's forms are read as `man sbatch` has them: a bare number is minutes."""
    assert rules.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "4 hours", "1h-2", "-5", "1:2:3:4", "1-2-3", "1e3", "ten"])
def test_wrong_durations(text: str) -> None:
    """What is no duration is refused with the forms there are."""
    with pytest.raises(UserError, match="90m, 4h"):
        rules.parse_duration(text)


# --- writing and comparing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["plain", "off", "1e4", "123e456", "null", "~", "0o17", "2026-01-01", "1_0", "5", "",
                                  "a: b", "# no comment", "'", '"', "*.tar", "{a}", "true", "é", "a\nb", "12:30:45"])
def test_dump_reads_back(recipe: Path, word: str) -> None:
    """What is dumped reads back to an equal recipe, with whatever words and numbers it holds."""
    tree = {"name": "n", "data": {"train": "/x", "val": word}, "deadline": "1-12:00:00", "clip_norm": 1e-30,
            "optim": {"lr": 1e-5, "weight_decay": 1e22}, "seed": 2**63 - 1, "model": {"lrn_after": []}}
    config = recipes.build(tree)
    recipe.write_text(recipes.dump(config), encoding="utf-8")
    assert recipes.load(recipe) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path, recipe: Path) -> None:
    """Every file in configs/ is a valid recipe whose name is the file's, and reads back from its dump."""
    config = recipes.load(path)
    assert config.name == path.stem
    recipe.write_text(recipes.dump(config))
    assert recipes.load(recipe) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_says_what_is_known_of_it(path: Path) -> None:
    """The head of each file in configs/ has a command that trains it, hardware, and of time and accuracy a figure or
    that it isn't measured yet."""
    head = path.read_text().partition("\nname:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"train configs/{path.stem}.yaml" in head or f"make {path.stem}" in head
    for word in ("Hardware:", "Time", "ccuracy"):
        assert word in head
    assert "not yet measured" in head or re.search(r"\d+ s\b", head)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_recipe_has_a_rate_that_diverges(path: Path) -> None:
    """No file in configs/ has a learning rate of 0.1 or more for a net without batch norm (user pains: it diverges)."""
    config = recipes.load(path)
    with torch.device("meta"):
        net = create_for(config, on_gpu=True)
    normalised = any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in net.modules())
    assert normalised or config.optim.lr < 0.1


def test_every_field_says_what_it_is() -> None:
    """Every field of a recipe has a one-line meaning and one of the three effects on resume."""
    assert CONFIGS
    sections = [(name, info) for name, info in Config.model_fields.items()]
    for path, info in [*recipes.fields(), *sections]:
        assert info.description, path
        assert "\n" not in info.description, path
        assert info.json_schema_extra["resume"] in ("free", "bits", "order"), path


def test_every_field_is_compared() -> None:
    """Each field that is changed, and it alone, is reported with the effect that it declares."""
    other: dict[str, Any] = {
        "init_from": "runs/b", "freeze": ["features"], "sparsity": "keep",
        "name": "b", "runs": "r", "model.name": "alexnet_torchvision", "model.lrn_after": [5], "data.train": "/y",
        "data.val": "/v", "data.limit": 5, "data.stored": "short256", "data.on_error": "skip", "data.decoder": "pillow",
        "data.threads": 2, "data.assignment": "owner", "augment.crop": "center",
        "augment.scale": [0.1, 1.0], "augment.ratio": [0.5, 2.0],
        "augment.color_jitter": [0.1, 0, 0, 0], "augment.mean": [0.5, 0.5, 0.5], "augment.std": [0.5, 0.5, 0.5],
        "optim.name": "adamw", "optim.betas": [0.9, 0.99], "optim.decay_on": "weights",
        "ema.decay": 0.9, "memory.checkpoint": "blocks", "schedule.name": "cosine", "schedule.milestones": [5.0],
        "amp": "bf16", "clip_norm": 1.0, "checkpoint.minutes": None, "checkpoint.steps": 7,
        "evaluate.crop": "squash", "device": "cpu", "deadline": "4h", "fault.kind": "inf", "fault.at": "save",
        "fault.signal": "INT", "model.in_channels": 1, "model.dropout": 0.25, "augment.flip": 0.25,
        "augment.policy": "trivial", "augment.pca_eigenvalues": [0.2, 0.02, 0.002],
        "augment.pca_eigenvectors": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    }
    alone = {"data.cache", "augment.resize", "evaluate.crops"}  # one value so far
    base = recipes.build({"name": "a", "data": {"train": "/x"}})
    plain = base.model_dump(mode="json")
    effects = {path: info.json_schema_extra["resume"] for path, info in recipes.fields()}
    for path, before in flatten(plain).items():
        if path in alone:
            continue
        now = other.get(path, not before if isinstance(before, bool) else before + 1 if isinstance(before, int) else
                        before / 2 + 0.25 if isinstance(before, float) else 1)
        tree = base.model_dump(mode="json")
        here = tree
        *sections, last = path.split(".")
        for section in sections:
            here = here[section]
        here[last] = now
        changes = differences(plain, Config.model_validate(tree))
        assert [(change.path, change.effect) for change in changes] == [(path, effects[path])]
    assert differences(plain, base) == []


def test_differences_over_versions() -> None:
    """A field that the stored recipe doesn't know counts with its default; one that is gone is passed over."""
    now = recipes.build({"name": "a", "data": {"train": "/x"}, "optim": {"momentum": 0.5}})
    stored = now.model_dump(mode="json")
    del stored["optim"]["momentum"], stored["limits"]
    stored["optim"]["forgotten"] = 3
    stored["gone"] = {"away": 1}
    change, = differences(stored, now)
    assert (change.path, change.before, change.now) == ("optim.momentum", 0.9, 0.5)
    assert str(change) == "optim.momentum: 0.9 -> 0.5"


@pytest.mark.parametrize(("path", "effect"), [
    ("optim.lr", "order"), ("global_batch", "order"), ("seed", "order"), ("model.width", "order"),
    ("augment.size", "order"), ("data.shards", "order"), ("data.stored", "order"), ("schedule.gamma", "order"),
    ("clip_norm", "order"), ("micro_batch", "bits"), ("amp", "bits"), ("data.decoder", "bits"), ("device", "bits"),
    ("data.threads", "free"), ("data.train", "free"), ("runs", "free"), ("checkpoint.minutes", "free"),
    ("evaluate.batch", "free"), ("deadline", "free"),
])
def test_effects_are_what_they_must_be(path: str, effect: str) -> None:
    """What moves the experiment is refused on resume, what moves bits is said, what moves nothing is free."""
    assert {name: info.json_schema_extra["resume"] for name, info in recipes.fields()}[path] == effect


def test_defaults_are_valid() -> None:
    """The defaults alone, with a place for the data, are a recipe."""
    config = recipes.build({"data": {"train": "/x"}})
    assert config.global_batch == 256
    assert math.isclose(config.augment.ratio[1], 4 / 3)
