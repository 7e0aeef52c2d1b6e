"""A site's habits in YAML, so that nobody types them each time: partition, modules, containers, keys of sbatch.

    ~/.config/alexnet-ddp/profiles/default.yaml     taken unless --profile names another
    --profile NAME                                  NAME.yaml beside it
    --profile path/to/site.yaml                     any file; examples in slurm/profiles/

What is said on the command line wins over the profile.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from alexnet_ddp.dialect import read_yaml
from alexnet_ddp.errors import UserError

STYLES = "gpus-per-node, gpus-per-task, gres or gres:TYPE"

# Keys of sbatch that are not for a profile's `slurm:`, nor for --slurm: what is to be done instead.
NOT_FREE = {
    "signal": "the lead time is set by --lead-time; its signal has to reach the ranks, and not the batch shell",
    "requeue": "every job may be requeued: without that no time limit and no preemption is survived",
    "no-requeue": "every job may be requeued: without that no time limit and no preemption is survived",
    "open-mode": "the log is appended to over requeues, always",
    "output": "the log lies in the run directory, in slurm/",
    "error": "the log lies in the run directory, in slurm/; errors go into the same file",
    "array": "use --seeds",
    "chdir": "the job runs in the folder it is submitted from",
    "wrap": "the script is made by submit",
    "export": "set variables under env:; the tasks get the job's environment",
    "ntasks": "there is one task per GPU: use --nodes and --gpus-per-node",
    "ntasks-per-node": "there is one task per GPU: use --gpus-per-node, or --tasks-per-node on CPUs",
    "nodes": "use --nodes",
    "gpus": "use --gpus-per-node, with the site's way to ask for GPUs in the profile's gpus:",
    "gpus-per-node": "use --gpus-per-node, with the site's way to ask for GPUs in the profile's gpus:",
    "gpus-per-task": "use --gpus-per-node, with gpus: gpus-per-task in the profile",
    "gres": "use --gpus-per-node, with gpus: gres or gres:TYPE in the profile",
    "job-name": "use --job-name",
    "dependency": "use --dependency",
    "nodelist": "use --nodelist",
    "exclude": "use --exclude",
    **{name: f"use --{name}, or {name.replace('-', '_')}: in the profile"
       for name in ("partition", "account", "qos", "constraint", "time", "mem", "cpus-per-task")},
}

Value = str | int | float | bool | None


class Profile(BaseModel):
    """A site profile."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    partition: str | None = Field(default=None, description="partition, or several with commas")
    account: str | None = Field(default=None, description="whom the time is charged to")
    qos: str | None = Field(default=None, description="quality of service")
    constraint: str | None = Field(default=None, description="features that nodes must have")
    time: str | None = Field(default=None, description="time limit of a job: 4h, 1-12:00:00")
    mem: str | None = Field(default=None, description="memory of a node: 64G")
    cpus_per_task: Annotated[int, Field(ge=1)] | None = Field(default=None, description="CPUs of a rank")
    gpus: str = Field(default="gpus-per-node", description=f"how GPUs are asked for here: {STYLES}")
    setup: list[str] = Field(default_factory=list, description="lines of bash before the run: module load ...")
    env: dict[str, str] = Field(default_factory=dict, description="environment variables, taken as they are")
    srun_args: list[str] = Field(default_factory=list, description="more arguments of srun, such as a container's")
    slurm: dict[str, Value] = Field(default_factory=dict, description="any other key of sbatch; true for a bare one")
    python: str | None = Field(default=None, description="interpreter of the ranks, where it is another than submit's")

    @field_validator("gpus")
    @classmethod
    def _known_style(cls, value: str) -> str:
        if not re.fullmatch(r"gpus-per-node|gpus-per-task|gres(?::[\w.-]+)?", value):
            raise PydanticCustomError("style", "must be {styles}", {"styles": STYLES})
        return value

    @field_validator("setup")
    @classmethod
    def _shell_lives(cls, lines: list[str]) -> list[str]:
        for line in lines:
            if re.search(r"(?:^|[;&|]\s*)\s*(?:set\s+(?:-\w*e|-o\s+errexit)|exec\s|exit\b)", line):
                raise PydanticCustomError("shell", "must leave the batch shell alive, which decides about the requeue "
                                          "after the run ('{line}' would end it)", {"line": line})
        return lines

    @field_validator("env")
    @classmethod
    def _variables(cls, values: dict[str, str]) -> dict[str, str]:
        for name in values:
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                raise PydanticCustomError("variable", "must be names of environment variables with their values "
                                          "('{name}' is none)", {"name": name})
        return values

    @field_validator("srun_args")
    @classmethod
    def _one_word_each(cls, words: list[str]) -> list[str]:
        for word in words:
            if re.match(r"--?[\w-]+\s", word):
                raise PydanticCustomError("words", "must be single words ('{word}' reaches srun as one): write "
                                          "--name=value, or two entries", {"word": word})
        return words

    @field_validator("slurm")
    @classmethod
    def _free_keys(cls, keys: dict[str, Value]) -> dict[str, Value]:
        return {check_key(key): value for key, value in keys.items()}


def check_key(key: str) -> str:
    """The name of a key of sbatch as sbatch writes it. Raises ValueError for one that is submit's to set."""
    name = key.strip().lstrip("-").replace("_", "-")
    if name in NOT_FREE:
        raise PydanticCustomError("key", "'{name}' can't be set here: {why}", {"name": name, "why": NOT_FREE[name]})
    if not re.fullmatch(r"[a-z][a-z0-9-]+", name):
        raise PydanticCustomError("key", "'{name}' is no key of sbatch; they are written as in --mail-type",
                                  {"name": key})
    return name


def parse_key(text: str) -> tuple[str, Value]:
    """`--slurm`'s KEY=VALUE, or KEY alone for a bare one. Raises UserError."""
    key, equals, value = text.partition("=")
    try:
        return check_key(key), value if equals else True
    except PydanticCustomError as error:
        raise UserError(f"--slurm: {error.message()}.") from None


# --- finding and reading ----------------------------------------------------------------------------------------


def folder() -> Path:
    """Where a user's profiles lie."""
    home = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".config") / "alexnet-ddp" / "profiles"


def find(name: str | None) -> Path | None:
    """The file of a profile: a path, or a name in the user's folder; without a name the default, None if there is none.

    Raises UserError when the one that was named isn't there.
    """
    if name is None:
        path = folder() / "default.yaml"
        return path if path.is_file() else None
    if "/" in name or name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        if path.is_file():
            return path
        nearby = sorted(str(other) for other in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise UserError(f"There is no profile at {path}.{_meant(str(path), nearby)}")
    path = folder() / f"{name}.yaml"
    if path.is_file():
        return path
    there = sorted(other.stem for other in folder().glob("*.yaml"))
    raise UserError(f"There is no profile '{name}' in {folder()}.{_meant(name, there)} A profile may also be given as "
                    "a file, such as slurm/profiles/gpus-per-node.yaml.")


def _meant(wrong: str, there: list[str]) -> str:
    near = difflib.get_close_matches(wrong, there, n=1)
    if near:
        return f" Did you mean {near[0]}?"
    return f" There are: {', '.join(there)}." if there else " There are none."


def load(name: str | None) -> tuple[Profile, Path | None]:
    """The profile of this name (see `find`) and its file; an empty one where there is none. Raises UserError."""
    path = find(name)
    if path is None:
        return Profile(), None
    try:
        content = read_yaml(path)
    except UserError as mistake:
        raise UserError(str(mistake).replace("The recipe", "The profile")) from None
    try:
        return Profile.model_validate(content), path
    except ValidationError as error:
        wrong: dict[str, str] = {}  # a value of several types has one problem for each
        for problem in error.errors():
            wrong.setdefault(".".join(str(part) for part in problem["loc"][:2]), _explain(problem))
        lines = [f"  {key}: {said}" for key, said in wrong.items()]
        raise UserError(f"The profile {path} has {'a mistake' if len(lines) == 1 else f'{len(lines)} mistakes'}:\n"
                        + "\n".join(lines)) from None


def _explain(problem: Any) -> str:
    key, got, kind = str(problem["loc"][0]), problem["input"], problem["type"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key.replace("-", "_"), Profile.model_fields, n=1)
        if near:
            return f"unknown key; did you mean '{near[0]}'?"
        known = ", ".join(Profile.model_fields)
        return f"unknown key; known: {known} (keys of sbatch go under slurm:)"
    if kind == "list_type":
        return f"must be a list, one entry a line with '- ' before it, got {got!r}"
    if kind == "dict_type":
        return f"must be names with their values, indented under it, got {got!r}"
    if kind == "string_type" and isinstance(got, bool):
        return f"must be text, got {str(got).lower()}; write \"{str(got).lower()}\" in quotes, or 1 or 0"
    if kind in ("style", "shell", "variable", "words", "key"):
        return str(problem["msg"]) + (f", got {got!r}" if kind == "style" else "")
    return str(problem["msg"]).replace("Input should be", "must be") + f", got {got!r}"
