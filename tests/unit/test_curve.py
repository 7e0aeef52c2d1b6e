"""--print-schedule: rows and pictures of the rates a run will really use, without importing torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import harness
from alexnet_ddp import cli, curve
from alexnet_ddp.errors import EXIT_FINISHED, EXIT_USER
from alexnet_ddp.schedule import learning_rate
from alexnet_ddp.sections import ScheduleSection


def rates(name: str, *, steps_per_epoch: int = 10, epochs: int = 90, warmup: float = 0.0) -> list[float]:
    schedule = ScheduleSection(name=name, warmup_epochs=warmup)
    return [learning_rate(step, base=0.1, schedule=schedule, steps_per_epoch=steps_per_epoch, epochs=epochs)
            for step in range(epochs * steps_per_epoch)]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(f"data: {{train: {tmp_path}/images}}\nruns: {tmp_path}/runs\nepochs: 4\nglobal_batch: 10\n"
                    "schedule: {name: step, step_epochs: 1, gamma: 0.5}\noptim: {lr: 0.1}\n")
    return path


def rows(lines: list[str]) -> list[tuple[int, float, float]]:
    return [(int(step), float(epochs), float(rate)) for step, epochs, rate in map(str.split, lines[1:])]


def test_table_has_every_change() -> None:
    """A rate that changes now and then: the steps at which it does, and nothing else; with a warmup its last step."""
    assert rows(curve.table(rates("multistep"), steps_per_epoch=10)) == [
        (0, 0.0, 0.1), (300, 30.0, 0.01), (600, 60.0, 0.001), (800, 80.0, 0.0001)]
    assert rows(curve.table(rates("constant"), steps_per_epoch=10)) == [(0, 0.0, 0.1)]
    warm = rows(curve.table(rates("multistep", warmup=5.0), steps_per_epoch=10))
    assert {(0, 0.0, 0.002), (49, 4.9, 0.1), (300, 30.0, 0.01), (600, 60.0, 0.001), (800, 80.0, 0.0001)} <= set(warm)
    assert len(warm) == 6  # and one within the warmup


@pytest.mark.parametrize("name", ["cosine", "one_cycle", "exponential", "polynomial"])
def test_table_of_a_rate_that_always_changes(name: str) -> None:
    """Some twenty rows over the whole run, its first, highest and last step among them, with their rates."""
    wanted = rates(name)
    found = rows(curve.table(wanted, steps_per_epoch=10))
    assert 18 <= len(found) <= 30
    assert all(rate == pytest.approx(wanted[step], rel=1e-5) and epochs == pytest.approx(step / 10, abs=0.01)
               for step, epochs, rate in found)
    steps = [step for step, _, _ in found]
    assert steps == sorted(steps)
    assert {0, wanted.index(max(wanted)), len(wanted) - 1} <= set(steps)


@pytest.mark.parametrize("blocks", [curve.BLOCKS, curve.ASCII])
@pytest.mark.parametrize("name", ["step", "cosine", "one_cycle"])
def test_picture_is_the_curve(name: str, blocks: str) -> None:
    """The height of every column is the rate there, to half a block; what is above zero shows at least as one."""
    wanted, levels = rates(name), len(blocks) - 1
    lines = [line.partition("|")[2] for line in curve.picture(wanted, epochs=90, blocks=blocks)[:-2]]
    assert len(lines) == curve.HEIGHT and {len(line) for line in lines} == {curve.WIDTH}
    for column in range(curve.WIDTH):
        height = sum(blocks.index(line[column]) for line in lines)
        exact = wanted[int((column + 0.5) * len(wanted) / curve.WIDTH)] / max(wanted) * curve.HEIGHT * levels
        assert height == max(1, round(exact)), column
    assert len(set(lines)) > 1


def test_command_counts_the_images(recipe: Path, capsys: pytest.CaptureFixture[str], own_cache: None) -> None:
    """The steps of an epoch are those of the data (or of data.limit, or of --samples), and nothing is trained."""
    harness.make_images(recipe.parent / "images", samples=35)
    for words, steps in (([], 4), (["data.limit=20"], 2), (["--samples", "101"], 11),
                         (["--samples", "101", "data.limit=20"], 2)):
        assert cli.main(["train", str(recipe), "--print-schedule", *words]) == EXIT_FINISHED
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"small: schedule.name=step, 4 epochs of {steps} steps of 10 images"
        assert rows(lines[2:7]) == [(epoch * steps, epoch, 0.1 * 0.5**epoch) for epoch in range(4)]
    assert not (recipe.parent / "runs").exists()


def test_no_torch(recipe: Path) -> None:
    """With the images of a folder counted, torch isn't imported; where the output is no Unicode the picture is of #."""
    harness.make_images(recipe.parent / "images", samples=12)
    code = "import sys\nfrom alexnet_ddp.cli import main\nmain(sys.argv[1:])\nprint('torch' in sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", code, "train", str(recipe), "--print-schedule"], capture_output=True,
                          timeout=60, env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONWARNINGS": "error",
                                           "ALEXNET_DDP_CACHE": str(recipe.parent / "cache")})
    lines = done.stdout.decode("ascii").splitlines()
    assert done.returncode == 0 and lines[-1] == "False", done.stderr
    assert any("####" in line for line in lines)


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_picture_in_a_file(recipe: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--out writes a picture of its suffix's format, the same bytes each time."""
    pytest.importorskip("matplotlib", reason="the extra `plots` isn't installed: no picture was drawn")
    written = []
    for name in ("a", "b"):
        path = recipe.parent / (name + suffix)
        assert cli.main(["train", str(recipe), "--print-schedule", "--samples", "50", "--out", str(path)]) == 0
        written.append(path.read_bytes())
    assert written[0] == written[1]
    assert written[0].startswith(b"<?xml" if suffix == ".svg" else b"\x89PNG")
    assert suffix != ".svg" or b"learning rate" in written[0]


@pytest.mark.parametrize(("words", "said"), [
    (["--out", "x.svg"], "go with --print-schedule"),
    (["--samples", "5"], "go with --print-schedule"),
    (["--print-schedule", "--samples", "0"], "above 0, got 0"),
    (["--print-schedule", "--samples", "1e12"], "invalid int value: '1e12'"),
    (["--print-schedule", "--samples", "1000000000000"], "at most 20,000,000, got "),
    (["--print-schedule", "--samples", "5", "--out", "x.gif"], "ends in .png or .svg, got 'x.gif'"),
    (["--print-schedule", "--samples", "5", "--out", "no/where/x.svg"], "can't be written: No such file"),
    (["--print-schedule"], "--samples 1281167"),  # the folder isn't there
])
def test_mistakes(recipe: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Words that don't go together, no data, and pictures that can't be drawn are refused in a sentence."""
    if "no/where/x.svg" in words:
        pytest.importorskip("matplotlib", reason="the extra `plots` isn't installed")
    assert cli.main(["train", str(recipe), *words]) == EXIT_USER
    assert said in capsys.readouterr().err


def test_without_matplotlib(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without matplotlib --out says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ["train", str(recipe), "--print-schedule", "--samples", "5"]
    assert cli.main([*words, "--out", "x.svg"]) == EXIT_USER
    assert "pip install 'alexnet-ddp[plots]'" in capsys.readouterr().err
    assert cli.main(words) == EXIT_FINISHED
