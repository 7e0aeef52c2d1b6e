"""Site profiles: found by name or as a file, checked, and taught when they are wrong."""

from pathlib import Path

import pytest

from alexnet_ddp.errors import UserError
from launch import profiles
from launch.profiles import Profile

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "slurm" / "profiles").glob("*.yaml"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's profiles, and nobody else's."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "alexnet-ddp" / "profiles"
    folder.mkdir(parents=True)
    return folder


def mistake(path: Path, text: str) -> str:
    """What is said about a profile with this text."""
    path.write_text(text)
    with pytest.raises(UserError) as error:
        profiles.load(str(path))
    return str(error.value)


# --- finding ----------------------------------------------------------------------------------------------------


def test_none(home: Path) -> None:
    """Without a profile and a default everything is left to the command line and the site."""
    assert profiles.load(None) == (Profile(), None)


def test_default(home: Path) -> None:
    """default.yaml in the user's folder counts where no other is named."""
    (home / "default.yaml").write_text("partition: here\n")
    (home / "other.yaml").write_text("partition: there\n")
    assert profiles.load(None) == (Profile(partition="here"), home / "default.yaml")
    assert profiles.load("other")[0].partition == "there"


def test_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is XDG's: ~/.config unless XDG_CONFIG_HOME says otherwise; a relative one is to be ignored."""
    for told in ("", "relative/path"):
        monkeypatch.setenv("XDG_CONFIG_HOME", told)
        assert profiles.folder() == Path.home() / ".config" / "alexnet-ddp" / "profiles"
    monkeypatch.setenv("XDG_CONFIG_HOME", "/elsewhere")
    assert profiles.folder() == Path("/elsewhere/alexnet-ddp/profiles")


def test_wrong_name(home: Path) -> None:
    """A name that isn't there is answered by the nearest, or by those there are."""
    (home / "jupiter.yaml").write_text("")
    with pytest.raises(UserError, match="no profile 'jupyter' .* Did you mean jupiter?"):
        profiles.load("jupyter")
    with pytest.raises(UserError, match="There are: jupiter"):
        profiles.load("x")


def test_wrong_file(tmp_path: Path) -> None:
    """A file that isn't there is answered by the nearest beside it."""
    (tmp_path / "site.yaml").write_text("")
    with pytest.raises(UserError, match=f"no profile at {tmp_path}/sita.yaml. Did you mean {tmp_path}/site.yaml"):
        profiles.load(f"{tmp_path}/sita.yaml")


# --- reading ----------------------------------------------------------------------------------------------------


def test_all_keys(tmp_path: Path) -> None:
    """Every key arrives with its type; numbers and words of YAML become the text that Slurm is given."""
    path = tmp_path / "site.yaml"
    path.write_text("partition: gpu,long\naccount: 12\nqos: high\nconstraint: a100\ntime: 24:00:00\nmem: 64G\n"
                    "cpus_per_task: 8\ngpus: gres:a100\nsetup: [module load cuda]\nenv: {NCCL_IB_DISABLE: 1}\n"
                    "srun_args: [--mpi=none]\nslurm: {mail_type: END, exclusive: true, nice: 10}\npython: python3\n")
    profile, found = profiles.load(str(path))
    assert found == path
    assert profile.model_dump() == {
        "partition": "gpu,long", "account": "12", "qos": "high", "constraint": "a100", "time": "24:00:00", "mem": "64G",
        "cpus_per_task": 8, "gpus": "gres:a100", "setup": ["module load cuda"], "env": {"NCCL_IB_DISABLE": "1"},
        "srun_args": ["--mpi=none"], "slurm": {"mail-type": "END", "exclusive": True, "nice": 10}, "python": "python3"}


@pytest.mark.parametrize(("text", "said"), [
    ("partitions: gpu", "partitions: unknown key; did you mean 'partition'?"),
    ("cpus-per-task: 4", "cpus-per-task: unknown key; did you mean 'cpus_per_task'?"),
    ("reservation: r1", "reservation: unknown key; known: partition, account"),
    ("gpus: nodes", "gpus: must be gpus-per-node, gpus-per-task, gres or gres:TYPE, got 'nodes'"),
    ("cpus_per_task: many", "cpus_per_task: must be a valid integer"),
    ("cpus_per_task: 0", "cpus_per_task: must be greater than or equal to 1, got 0"),
    ("setup: module load cuda", "setup: must be a list, one entry a line with '- ' before it, got 'module load cuda'"),
    ("setup: [set -e]", "setup: must leave the batch shell alive"),
    ("setup: [module load x && set -euo pipefail]", "setup: must leave the batch shell alive"),
    ("setup: [exit 3]", "setup: must leave the batch shell alive"),
    ("env: [A, B]", "env: must be names with their values, indented under it"),
    ("env: {NCCL-IB: 1}", "env: must be names of environment variables with their values ('NCCL-IB' is none)"),
    ("env: {NCCL_IB_DISABLE: true}", "env.NCCL_IB_DISABLE: must be text, got true; write \"true\" in quotes"),
    ("srun_args: ['--container-image x']", "srun_args: must be single words"),
    ("slurm: {signal: B:USR1@60}", "slurm: 'signal' can't be set here: the lead time is set by --lead-time"),
    ("slurm: {requeue: false}", "slurm: 'requeue' can't be set here: every job may be requeued"),
    ("slurm: {no-requeue: true}", "slurm: 'no-requeue' can't be set here: every job may be requeued"),
    ("slurm: {open_mode: truncate}", "slurm: 'open-mode' can't be set here: the log is appended to"),
    ("slurm: {time: 1h}", "slurm: 'time' can't be set here: use --time, or time: in the profile"),
    ("slurm: {Foo Bar: 1}", "slurm: 'Foo Bar' is no key of sbatch"),
    ("- partition", "The profile"),
    ("partition: [", "is not valid YAML"),
    ("partition: a\npartition: b", "line 2: key 'partition' is given twice"),
])
def test_mistakes(tmp_path: Path, text: str, said: str) -> None:
    """A mistake is named with its key, what is wanted and what was found; never a traceback."""
    answer = mistake(tmp_path / "site.yaml", text)
    assert said in answer
    assert "recipe" not in answer


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    """Two mistakes are told together."""
    answer = mistake(tmp_path / "site.yaml", "partion: gpu\ncpus_per_task: 0\n")
    assert answer.splitlines()[0].endswith("has 2 mistakes:")
    assert len(answer.splitlines()) == 3


# --- keys of sbatch ---------------------------------------------------------------------------------------------


def test_key_of_the_command_line() -> None:
    """--slurm takes KEY=VALUE and a bare KEY, in sbatch's spelling or with _; values may hold = and be empty."""
    assert profiles.parse_key("mail-type=END") == ("mail-type", "END")
    assert profiles.parse_key("--mail_user=a=b@c") == ("mail-user", "a=b@c")
    assert profiles.parse_key("exclusive") == ("exclusive", True)
    assert profiles.parse_key("comment=") == ("comment", "")


@pytest.mark.parametrize("key", sorted(profiles.NOT_FREE))
def test_keys_that_are_submits(key: str) -> None:
    """Whatever submit sets itself can't be overruled by --slurm, however it is spelt."""
    for spelt in (key, f"--{key}", key.replace("-", "_")):
        with pytest.raises(UserError, match=f"'{key}' can't be set here: "):
            profiles.parse_key(f"{spelt}=x")


# --- the examples -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path: Path) -> None:
    """Every example is a valid profile whose head says how it is used."""
    profile, _ = profiles.load(str(path))
    assert profile != Profile()
    head = "".join(line for line in path.read_text().splitlines(keepends=True)[:12] if line.startswith("#"))
    assert "alexnet-ddp submit" in head


def test_examples_show_every_style() -> None:
    """There is an example for each way to ask for GPUs, for a container, and for none; together they show every key."""
    loaded = {path.stem: profiles.load(str(path))[0] for path in EXAMPLES}
    assert set(loaded) == {"gpus-per-node", "gres", "gpus-per-task", "container", "cpu"}
    assert {profile.gpus for profile in loaded.values()} == {"gpus-per-node", "gres:a100", "gpus-per-task"}
    assert any("--container-image" in word for word in loaded["container"].srun_args)
    assert any(line.startswith("module load") for line in loaded["cpu"].setup)
    assert any(name.startswith("NCCL_") for name in loaded["cpu"].env)
    shown = {name for profile in loaded.values() for name in profile.model_fields_set}
    assert shown == set(Profile.model_fields)
