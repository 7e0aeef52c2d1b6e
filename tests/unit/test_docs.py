"""What README.md and docs/ name is there: links, files, commands, keys.

Run as a program (`python tests/unit/test_docs.py`), it writes docs/fields.md.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from alexnet_ddp import cli, config
from alexnet_ddp.errors import EXIT_FINISHED

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FIELDS = ROOT / "docs" / "fields.md"
WITH_ACTIONS = ("data", "doctor", "models")
FOLDERS = ("alexnet_ddp", "launch", "configs", "tests", "docs", "benchmarks")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

# --- docs/fields.md, made from the code -------------------------------------------------------------------------

FIELDS_HEAD = """# Every field of a recipe

Made from `alexnet_ddp/sections.py` and `alexnet_ddp/config.py` by `python tests/unit/test_docs.py`; a test fails when
this page is out of date. A field is set in the YAML file, or on the command line, as in `optim.lr=0.02`.

*On resume* says what a changed value does to a run that has a checkpoint: **free** is accepted silently (it moves no
bit of the result); **bits** is accepted, and the attempt says `exact: no` (same samples and crops, other rounding);
**order** is refused, because it would make another experiment of the run. [resume.md](resume.md) has the ways out.
"""


def fields_page() -> str:
    """docs/fields.md as the code has it: the run's own fields, then section by section."""
    tables: dict[str, list[str]] = {"": []}
    for path, info in config.fields():
        default = as_yaml(info.get_default(call_default_factory=True)) if path != "name" else "the file's name"
        cells = [f"`{path}`", default, values(info), info.json_schema_extra["resume"], info.description]
        row = " | ".join(cell.replace("|", "\\|") for cell in cells)
        tables.setdefault(path.rpartition(".")[0], []).append(f"| {row} |")
    lines = [FIELDS_HEAD]
    for section, rows in tables.items():
        lines += [f"## {section or 'the run'}", "", "| field | default | values | on resume | meaning |",
                  "|---|---|---|---|---|", *rows, ""]
    return "\n".join(lines).rstrip() + "\n"


def as_yaml(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "[" + ", ".join(f"{item:.4g}" for item in value) + "]"
    return yaml.safe_dump(value).removesuffix("\n...\n").strip() if value != "" else ""


def values(info: Any) -> str:
    """What pydantic accepts, in a few words."""
    annotation = str(info.annotation)
    if words := re.findall(r"'(\w+)'", annotation.removeprefix("<class ")) if "Literal" in annotation else []:
        return ", ".join(f"`{word}`" for word in words) + (", or a whole number" if "int" in annotation else "")
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = [f"{sign} {bound:g}" for rule in info.metadata for name, sign in signs.items()
              if (bound := getattr(rule, name, None)) is not None and bound < 2**31]
    if "list[str]" in annotation:
        return "list of names"
    kinds = {"list": "list of numbers", "tuple": "list of numbers", "bool": "`true`, `false`", "int": "whole number",
             "float": "number", "Literal": "1"}
    kind = next((words for name, words in kinds.items() if name in annotation), "text")
    return " ".join([kind, " and ".join(bounds)]).strip() + (
        ", or `null`" if type(None) in get_args(info.annotation) else "")


def test_fields_page_is_the_codes() -> None:
    """docs/fields.md is what the code says today."""
    assert FIELDS.read_text() == fields_page(), "run: python tests/unit/test_docs.py"


# --- links, files, keys -----------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def code_lines(page: Path) -> Iterator[str]:
    """The lines of a page's code blocks, continued lines joined, without prompts and comments."""
    for block in re.findall(r"^```\w*\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ ")


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page leads to a file that exists, and to a heading in it."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not link.startswith(("http://", "https://")):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: no heading for {link}"


@pages
def test_files_named_exist(page: Path) -> None:
    """Every file of the project that a page names exists, and so does every make target."""
    text = page.read_text()
    for name in re.findall(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w./-]*\w)", text):
        assert (ROOT / name).exists(), f"{page.name}: {name}"
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for target in re.findall(r"(?:`|^)make ([a-z]+)", text, flags=re.MULTILINE):
        assert target in targets, f"{page.name}: make {target}"


@pages
def test_keys_named_exist(page: Path) -> None:
    """Every recipe key that a page names in its text exists."""
    known = {path for path, _ in config.fields()} | set(config.Config.model_fields)
    sections = {path.partition(".")[0] for path in known if "." in path}
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        for key in re.findall(r"(?:^|\s)([a-z_]+(?:\.[a-z_0-9]+)?)=", code):
            assert key in known | {"key"} or "(" in code, f"{page.name}: `{code}`"
        if re.fullmatch(rf"(?:{'|'.join(sections)})\.[a-z_0-9]+", code):
            assert code in known, f"{page.name}: `{code}`"


# --- commands ---------------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[list[str]]:
    """What follows `alexnet-ddp` or `-m alexnet_ddp` in a page's code blocks, as words."""
    for line in code_lines(page):
        match = re.match(r"(?:(?:\w+=\S+ )*torchrun .*-m alexnet_ddp|alexnet-ddp) (.*)", line)
        if match:
            yield shlex.split(match[1])


@pages
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command in a code block exists; those that train or submit have a recipe, flags and keys that hold."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm, and nobody's profile
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for words in commands(page):
        told = io.StringIO()
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            if words[0] == "train":
                assert cli.main([*words, "--print-config"]) == EXIT_FINISHED, f"{page.name}: {words}: {told.getvalue()}"
                continue
            if words[0] == "submit":
                words += [f"runs={tmp_path}", "--dry-run"]  # whatever has been trained here
                assert cli.main(words) == EXIT_FINISHED, f"{page.name}: {words}: {told.getvalue()}"
                continue
            assert words[0] in cli.COMMANDS or words[0].startswith("--"), f"{page.name}: {words}"
            if words[0] in cli.COMMANDS:
                with pytest.raises(SystemExit):
                    cli.main([words[0], "--help"])
        # `data index WHERE`: an action. `predict MODEL --top 3`: flags, all of which --help tells
        known = words[1:2] if words[0] in WITH_ACTIONS else [word for word in words[1:] if word.startswith("--")]
        for word in known:
            assert word in told.getvalue(), f"{page.name}: {words}"


if __name__ == "__main__":
    FIELDS.write_text(fields_page())
