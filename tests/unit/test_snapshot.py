"""Snapshots: what a job runs is what was submitted, whatever happens to the checkout meanwhile."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alexnet_ddp import config as recipes
from alexnet_ddp.config import Config
from alexnet_ddp.errors import EXIT_FINISHED, EXIT_USER, UserError
from launch import snapshot

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "GIT_DIR", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return recipes.build({"name": "a", "runs": str(tmp_path / "runs"), "data": {"train": "/data"}, "seed": 7})


def freeze(config: Config, tmp_path: Path, **more: object) -> Path:
    return snapshot.freeze(config, cwd=tmp_path, command="alexnet-ddp submit a.yaml", lead=120.0, caps={},
                           **more)  # type: ignore[arg-type]


def git(*words: str, where: Path) -> str:
    return subprocess.run(["git", "-C", str(where), "-c", "user.name=x", "-c", "user.email=x@y", *words], check=True,
                          capture_output=True, text=True, timeout=30).stdout


# --- what is in it ----------------------------------------------------------------------------------------------


def test_facts(config: Config, tmp_path: Path) -> None:
    """A snapshot reads back as it was made, and its recipe is the effective one."""
    path = freeze(config, tmp_path, job="12", accept_changes=True, python="/usr/bin/python3.12")
    found = snapshot.load(path)
    assert found.path == path == tmp_path / "runs" / "a" / "snapshots" / found.id
    assert (found.run_dir, found.cwd) == (tmp_path / "runs" / "a", tmp_path)
    assert (found.command, found.lead, found.caps) == ("alexnet-ddp submit a.yaml", 120.0, {})
    assert (found.job, found.accept_changes, found.python) == ("12", True, "/usr/bin/python3.12")
    assert recipes.load(path / "recipe.yaml") == config


def test_run_directory_is_absolute(tmp_path: Path) -> None:
    """A relative runs= is meant from the folder the command is given in: the batch shell may be elsewhere."""
    path = freeze(recipes.build({"name": "a", "runs": "x/../runs", "data": {"train": "d"}}), tmp_path)
    assert snapshot.load(path).run_dir == tmp_path / "runs" / "a"


@pytest.mark.parametrize("folder", ["runs/10:30", "50%jobs"])
def test_path_that_a_job_cannot_have(tmp_path: Path, folder: str) -> None:
    """A ':' would hide the frozen code from Python, and the job would run the checkout's; a '%' is one of Slurm's."""
    with pytest.raises(UserError, match=r"has no '[:%]' in it, .*runs=\.\.\."):
        freeze(recipes.build({"name": "a", "runs": folder, "data": {"train": "d"}}), tmp_path)
    assert not (tmp_path / folder).exists()


def test_code_is_whole(config: Config, tmp_path: Path) -> None:
    """All sources of both packages are in it, and nothing that Python has made of them."""
    path = freeze(config, tmp_path)
    for package in ("alexnet_ddp", "launch"):
        want = {file.relative_to(ROOT) for file in (ROOT / package).rglob("*.py")}
        assert {file.relative_to(path) for file in (path / package).rglob("*.py")} == want
    assert not list(path.rglob("__pycache__"))


def test_code_is_the_one_that_runs(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code that is frozen is the imported one, not what lies in the current folder."""
    (tmp_path / "alexnet_ddp").mkdir()
    (tmp_path / "alexnet_ddp" / "__init__.py").write_text("raise SystemExit('the wrong one')\n")
    monkeypatch.chdir(tmp_path)
    path = freeze(config, tmp_path)
    assert (path / "alexnet_ddp" / "__init__.py").read_bytes() == (ROOT / "alexnet_ddp" / "__init__.py").read_bytes()


def test_job_runs_the_frozen_text(config: Config, tmp_path: Path) -> None:
    """With the snapshot first on PYTHONPATH and -P, as the batch shell has it, the frozen text is imported."""
    path = freeze(config, tmp_path)
    with (path / "alexnet_ddp" / "__init__.py").open("a") as file:
        file.write("\nMARK = 'frozen'\n")
    done = subprocess.run([sys.executable, "-P", "-c", "import alexnet_ddp; print(alexnet_ddp.MARK)"], cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(path)}, capture_output=True, text=True, timeout=30)
    assert done.stdout == "frozen\n"


def test_ids_sort_by_time(config: Config, tmp_path: Path) -> None:
    """Snapshots made one after the other sort in that order, also within a second."""
    made = [freeze(config, tmp_path).name for _ in range(3)]
    assert made == sorted(made)
    assert len(set(made)) == 3


def test_whole_or_none(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted at any of its renames and writes it leaves no snapshot, nor a part of one."""
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for place in ((snapshot, "git_state"), (recipes, "dump"), (os, "rename")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(*place, interrupted)
            freeze(config, tmp_path)
        assert list((tmp_path / "runs" / "a" / "snapshots").iterdir()) == []


def test_no_place(config: Config, tmp_path: Path) -> None:
    """A run directory that can't be made is a user's mistake, with the way out."""
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match="can't be written: Not a directory. Choose another with runs="):
        freeze(config, tmp_path)


def test_folder_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder behind a link keeps the name that the user knows, unless PWD is of another one."""
    (tmp_path / "real").mkdir()
    (tmp_path / "name").symlink_to("real")
    monkeypatch.chdir(tmp_path / "name")
    monkeypatch.setenv("PWD", str(tmp_path / "name"))
    assert snapshot.working_directory() == tmp_path / "name"
    for told in (str(tmp_path), "/nowhere", "name", ""):
        monkeypatch.setenv("PWD", told)
        assert snapshot.working_directory() == (tmp_path / "real").resolve()


# --- git --------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with the two packages, in miniature."""
    home = tmp_path / "checkout"
    for package in ("alexnet_ddp", "launch"):
        (home / package).mkdir(parents=True)
        (home / package / "__init__.py").write_text("ONE = 1\n")
    (home / "README").write_text("text\n")
    git("init", "--quiet", "--initial-branch=work", where=home)
    git("add", ".", where=home)
    git("commit", "--quiet", "-m", "first", where=home)
    return home


def test_git_clean(checkout: Path) -> None:
    """An unchanged checkout: commit, branch, no changes, an empty patch."""
    known, patch = snapshot.git_state(checkout / "alexnet_ddp")
    assert known == {"commit": git("rev-parse", "HEAD", where=checkout).strip(), "branch": "work", "changed": []}
    assert patch == b""


def test_patch_makes_the_same_tree(checkout: Path, tmp_path: Path) -> None:
    """Commit and patch give the very sources that were submitted: changed, new, staged and deleted ones."""
    (checkout / "README").write_text("other text\n")
    (checkout / "launch" / "__init__.py").unlink()
    (checkout / "launch" / "new file.py").write_text("TWO = 'ä'\n")
    (checkout / "alexnet_ddp" / "sub").mkdir()
    (checkout / "alexnet_ddp" / "sub" / "staged.py").write_text("THREE = 3\n")
    git("add", "alexnet_ddp/sub/staged.py", where=checkout)
    (checkout / "alexnet_ddp" / "sub" / "staged.py").write_text("THREE = 4\n")
    git("config", "diff.noprefix", "true", where=checkout)  # the user's taste must not matter
    before = git("status", "--porcelain", where=checkout)
    known, patch = snapshot.git_state(checkout / "alexnet_ddp")
    assert git("status", "--porcelain", where=checkout) == before  # the user's index is as it was
    assert known is not None
    assert known["changed"] == before.splitlines()
    (tmp_path / "changes.patch").write_bytes(patch)
    git("clone", "--quiet", str(checkout), str(tmp_path / "clone"), where=tmp_path)
    git("apply", str(tmp_path / "changes.patch"), where=tmp_path / "clone")
    for name in ("README", "launch/new file.py", "alexnet_ddp/sub/staged.py", "alexnet_ddp/__init__.py"):
        assert (tmp_path / "clone" / name).read_bytes() == (checkout / name).read_bytes()
    assert not (tmp_path / "clone" / "launch" / "__init__.py").exists()


def test_somebody_elses_checkout(checkout: Path) -> None:
    """A package that is merely installed below a repository, in its .venv say, isn't that repository's."""
    (checkout / ".gitignore").write_text(".venv\n")
    shutil.copytree(checkout / "alexnet_ddp", checkout / ".venv" / "alexnet_ddp")
    assert snapshot.git_state(checkout / ".venv" / "alexnet_ddp") == (None, b"")


def test_no_git(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a repository, or without git, there is no git state, and no complaint."""
    shutil.rmtree(checkout / ".git")
    assert snapshot.git_state(checkout / "alexnet_ddp") == (None, b"")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert snapshot.git_state(checkout / "alexnet_ddp") == (None, b"")


# --- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"run_dir": 5}', '{"run_dir": "/r", "cwd": "/c", "more": 1}'])
def test_no_snapshot(tmp_path: Path, text: str | None) -> None:
    """What isn't a snapshot is said to be none."""
    if text is not None:
        (tmp_path / "snapshot.json").write_text(text)
    with pytest.raises(UserError, match="A snapshot is a folder such as RUN/snapshots/"):
        snapshot.load(tmp_path)


# --- in the batch shell of an sbatch script ---------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(f"data: {{train: {tmp_path}/images}}\nruns: {tmp_path}/runs\n")
    return path


def made(capsys: pytest.CaptureFixture[str], *words: str) -> Path:
    """The one path that the command prints."""
    assert snapshot.main([*words]) == EXIT_FINISHED
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    return Path(out.strip())


def test_command(recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's first start makes a snapshot, its later ones take that; another job makes its own."""
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    first = made(capsys, str(recipe), "seed=3", "--lead-time", "5m", "--accept-changes")
    found = snapshot.load(first)
    assert (found.job, found.lead, found.accept_changes) == ("41", 300.0, True)
    assert recipes.load(first / "recipe.yaml").seed == 3
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    recipe.write_text(recipe.read_text() + "epochs: 5\n")  # edited meanwhile
    assert made(capsys, str(recipe), "seed=3") == first
    assert made(capsys, str(recipe), "seed=3", "name=another") == first
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    second = made(capsys, str(recipe), "seed=3")  # was killed before it could make one
    assert second != first
    assert recipes.load(second / "recipe.yaml").epochs == 5
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert made(capsys, str(recipe)) not in (first, second)  # the number of an old job, given anew


@pytest.mark.parametrize("words", [[], ["runs=here"], ["name=a"]])
def test_restart_needs_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                                 words: list[str]) -> None:
    """A job that comes back finds its snapshot also when the recipe has been broken, or deleted, meanwhile."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    (tmp_path / "small.yaml").write_text("data: {train: images}\n")
    first = made(capsys, "small.yaml", *words)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (tmp_path / "small.yaml").write_text("not: [yaml")
    assert made(capsys, "small.yaml", *words) == first
    (tmp_path / "small.yaml").unlink()
    assert made(capsys, "small.yaml", *words) == first


def test_command_passes_over_what_is_broken(recipe: Path, capsys: pytest.CaptureFixture[str],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot.json that a power-off has cut, or a foreign one, doesn't keep a restarted job from its own."""
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    first = made(capsys, str(recipe))
    for name, text in (("99990101-000000-000000", '{"job": "4'), ("99990102-000000-000000", json.dumps(["41"]))):
        (first.parent / name).mkdir()
        (first.parent / name / "snapshot.json").write_text(text)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert made(capsys, str(recipe)) == first


def test_command_mistake(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake goes to stderr with code 2: stdout is what the shell takes for a path."""
    assert snapshot.main([str(recipe), "sed=3"]) == EXIT_USER
    out, err = capsys.readouterr()
    assert out == ""
    assert "did you mean 'seed'?" in err
