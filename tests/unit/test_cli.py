"""The command line: quick and without torch where it can be, teaching where users err, with the documented codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import harness
from alexnet_ddp import __version__, cli, words
from alexnet_ddp import config as recipes
from alexnet_ddp.errors import EXIT_FINISHED, EXIT_STOPPED, EXIT_USER

HEAVY = ("torch", "torchvision", "numpy", "tensorboard", "PIL")
QUICK = ["alexnet_ddp", "alexnet_ddp.errors", "alexnet_ddp.cli", "alexnet_ddp.words", "alexnet_ddp.invocation",
         "alexnet_ddp.stop", "launch", "launch.agent",
         "alexnet_ddp.sections", "alexnet_ddp.config", "alexnet_ddp.schedule", "alexnet_ddp.curve",
         "alexnet_ddp.runfiles", "launch.demo",
         "launch.submit", "launch.status", "launch.doctor", "launch.job", "launch.attempts", "launch.snapshot"]


@pytest.fixture(autouse=True)
def no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are nobody's rank."""
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(f"data: {{train: {tmp_path}/images}}\nruns: {tmp_path}/runs\n")
    return path


def python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONWARNINGS": "error"})


def error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command says that is a user's mistake: on stderr, once, with code 2 and without a traceback."""
    assert cli.main(list(words)) == EXIT_USER
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("alexnet-ddp: error: ")
    assert err.count("error:") == 1
    assert "Traceback" not in err
    return err.removeprefix("alexnet-ddp: error: ").strip()


# --- without torch ----------------------------------------------------------------------------------------------


def test_imports_are_light() -> None:
    """Importing the package, launch, the recipe and the stop handlers imports neither torch nor anything as heavy."""
    code = ("import importlib, sys\n"
            "for name in sys.argv[1].split():\n"
            "    importlib.import_module(name)\n"
            f"    print(name, [heavy for heavy in {HEAVY} if heavy in sys.modules])\n")
    done = python(code, " ".join(QUICK))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} []" for name in QUICK]


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["models", "--help"], [],
                                   ["train", "RECIPE", "--print-config"],
                                   ["train", "RECIPE", "--print-schedule", "--samples", "1000"],
                                   ["train", "nowhere.yaml"], ["tain"]])
def test_quick_answers_import_no_torch(words: list[str], recipe: Path) -> None:
    """Help, version, the effective recipe and users' mistakes are answered without importing torch or NumPy."""
    code = ("import sys\nfrom alexnet_ddp.cli import main\n"
            "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
            f"print('HEAVY', [heavy for heavy in {HEAVY} if heavy in sys.modules])\n")
    done = python(code, *[str(recipe) if word == "RECIPE" else word for word in words])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert len(done.stdout.splitlines() + done.stderr.splitlines()) >= 2  # and it said something


def test_module_is_the_command() -> None:
    """`python -m alexnet_ddp` is the command, and its exit code is the process's."""
    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "alexnet_ddp", *words], capture_output=True, text=True, timeout=60)

    done = command("--version")
    assert (done.returncode, done.stdout) == (EXIT_FINISHED, f"alexnet-ddp {__version__}\n")
    done = command("trian")
    assert (done.returncode, done.stdout) == (EXIT_USER, "")
    assert "Did you mean 'train'?" in done.stderr


# --- help, mistakes ---------------------------------------------------------------------------------------------


def test_help_names_every_command_and_code(capsys: pytest.CaptureFixture[str]) -> None:
    """--help lists every command and says what the exit codes mean; without a command it is a user's mistake."""
    assert cli.main(["--help"]) == EXIT_FINISHED
    out = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"\n  {name} " in out, name
    for code in ("0 finished", "75 stopped", "2 user error", "1 failed", "130 second Ctrl-C"):
        assert code in out
    assert "torchrun" in out
    assert cli.main([]) == EXIT_USER


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """COMMAND --help answers for every command."""
    with pytest.raises(SystemExit) as leaving:
        cli.main([name, "--help"])
    assert leaving.value.code == 0
    assert f"alexnet-ddp {name}" in capsys.readouterr().out


@pytest.mark.parametrize(("word", "said"), [("trian", "Did you mean 'train'?"), ("model", "Did you mean 'models'?"),
                                            ("fly", "There are: train,"), ("--fresh", "no command '--fresh'")])
def test_unknown_command(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown command is refused with the nearest one, or with those there are."""
    assert said in error(capsys, word)


@pytest.mark.parametrize(("words", "said"), [
    (["--batch-size", "256"], "use global_batch=..., the total over all ranks; torchvision's and timm's is per GPU"),
    (["--batch_size=256"], "use global_batch="), (["-b", "256"], "use global_batch="),
    (["--lr", "0.1"], "use optim.lr="),
    (["--epochs", "90"], "use epochs="), (["--workers", "8"], "use data.threads="), (["-j", "8"], "use data.threads="),
    (["--resume", "x.pt"], "a run whose directory has a checkpoint is resumed"), (["--seed", "1"], "use seed="),
    (["--amp"], "use amp=bf16"), (["--data", "/x"], "use data.train="), (["--gpus", "2"], "use --nproc-per-node"),
    (["--output-dir", "x"], "use runs="), (["--name", "x"], "use name="),
])
def test_flags_from_elsewhere_teach(words: list[str], said: str, recipe: Path,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    """Flags that people know from other trainers are answered with what to write here, before or after the recipe."""
    for line in ([str(recipe), *words], [str(recipe), "seed=1", *words]):
        told = error(capsys, "train", *line)
        assert said in told
        assert told.startswith(words[0].partition("=")[0].replace("_", "-"))


@pytest.mark.parametrize(("words", "said"), [
    ([], "CONFIG"), (["RECIPE", "--wings"], "unrecognized arguments: --wings"),
    (["RECIPE", "epoch=3"], "did you mean 'epochs'?"), (["RECIPE", "seed"], "written key=value"),
    (["nowhere.yaml"], "No recipe at nowhere.yaml"), (["RECIPE", "--overfit", "0"], "--overfit takes a number"),
    (["RECIPE", "--overfit", "some"], "--overfit"), (["RECIPE", "--nproc-per-node", "0"], "a number of ranks above 0"),
    (["RECIPE", "--nproc-per-node", "many"], "a number of ranks above 0, or auto, got 'many'"),
])
def test_mistakes_in_train(words: list[str], said: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mistakes on train's command line are one message with what was found, and nothing is started or written."""
    assert said in error(capsys, "train", *[str(recipe) if word == "RECIPE" else word for word in words])
    assert not (recipe.parent / "runs").exists()


def test_nproc_within_torchrun(recipe: Path, capsys: pytest.CaptureFixture[str],
                               monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of torchrun that is told to start ranks refuses; only rank 0 says so."""
    monkeypatch.setattr(words.time, "sleep", lambda _: None)
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["train", str(recipe), "--nproc-per-node", "2"]) == EXIT_USER
        assert capsys.readouterr().err.count("already a rank of torchrun") == lines


@pytest.mark.parametrize(("words", "said"), [
    (["models", "show"], "takes a NAME"), (["models", "fly"], "invalid choice"),
    (["models", "show", "alexnet_sinlge"], "alexnet_single"), (["data"], "required"),
    (["data", "index", "/nowhere"], "/nowhere"), (["data", "download", "imagenet"], "imagenet"),
])
def test_mistakes_elsewhere(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The other commands' mistakes are UserErrors, too."""
    assert said in error(capsys, *words)


# --- what works -------------------------------------------------------------------------------------------------


def test_print_config(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--print-config prints the effective recipe with its overrides, reads back to itself, and starts nothing."""
    words = ["train", str(recipe), "optim.lr=2e-2", "model.width=0.5", "--print-config"]
    assert cli.main(words) == EXIT_FINISHED
    out = capsys.readouterr().out
    recipe.write_text(out)
    config = recipes.load(recipe)
    assert (config.name, config.optim.lr, config.model.width) == ("small", 0.02, 0.5)
    assert recipes.dump(config) == out
    assert not config.run_dir.exists()


def test_overfit_is_a_recipe(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--overfit N is a run of its own on N samples without any randomness or regularisation."""
    assert cli.main(["train", str(recipe), "--overfit", "64", "--print-config"]) == EXIT_FINISHED
    recipe.write_text(capsys.readouterr().out)
    config = recipes.load(recipe)
    assert config.name == "small-overfit"
    assert (config.data.limit, config.global_batch, config.data.val) == (64, 64, None)
    assert (config.model.dropout, config.optim.weight_decay, config.augment.flip) == (0, 0, 0)
    assert (config.augment.crop, config.schedule.name) == ("center", "constant")


@pytest.mark.parametrize(("elastic", "code", "left_with"), [
    (False, EXIT_FINISHED, EXIT_FINISHED), (False, EXIT_STOPPED, EXIT_STOPPED), (True, EXIT_STOPPED, EXIT_FINISHED),
])
def test_a_stop_under_torchrun_is_0(elastic: bool, code: int, left_with: int, recipe: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped run exits 75, but 0 under a bare torchrun, which would kill the other ranks for any other code."""
    from alexnet_ddp import stop
    from alexnet_ddp import train as story

    monkeypatch.setattr(stop.StopRequests, "install", lambda self: self)
    monkeypatch.setattr(story, "train", lambda *_, **__: code)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    if elastic:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert cli.main(["train", str(recipe)]) == left_with


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    """models lists the nets; models show prints layers, parameters and MACs with the options given."""
    assert cli.main(["models"]) == EXIT_FINISHED
    assert "alexnet_single" in capsys.readouterr().out.splitlines()
    assert cli.main(["models", "show", "alexnet_single", "num_classes=10"]) == EXIT_FINISHED
    assert "58,322,314" in capsys.readouterr().out  # 62,378,344 - 990 x 4097
    assert cli.main(["models", "show", "alexnet_paper", "image_size=227"]) == EXIT_FINISHED
    assert "60,965,224" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "said"), [
    ("widht=0.5", "did you mean 'model.width'"), ("width=abc", "model.width: must be a number"),
    ("lrn_after=[1]", "alexnet_bn has no such option"), ("image_size=20", "at least 63 pixels"),
])
def test_models_show_refuses(option: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An option that isn't one, that has no such value, or that the net hasn't is one message."""
    assert cli.main(["models", "show", "alexnet_bn", option]) == EXIT_USER
    assert said in capsys.readouterr().err


def test_data_index(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """data index says what lies in a folder."""
    monkeypatch.setenv("ALEXNET_DDP_CACHE", str(tmp_path / "cache"))
    harness.make_images(tmp_path / "train", samples=7)
    assert cli.main(["data", "index", str(tmp_path / "train")]) == EXIT_FINISHED
    out = capsys.readouterr().out
    assert "samples   7" in out
    assert "classes   3" in out


def test_create_model_is_the_package_s() -> None:
    """alexnet_ddp.create_model is there without an import of its own, and other names aren't."""
    import alexnet_ddp

    net = alexnet_ddp.create_model("alexnet_single", num_classes=3, width=0.05, image_size=64)
    assert sum(parameter.numel() for parameter in net.parameters()) > 0
    with pytest.raises(AttributeError, match="create_modell"):
        _ = alexnet_ddp.create_modell
