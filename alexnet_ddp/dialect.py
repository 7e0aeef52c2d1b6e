"""The YAML of recipes and profiles: 1.2's scalars, keys given once, errors that name the line."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from alexnet_ddp.errors import UserError


class Loader(yaml.SafeLoader):
    """YAML with 1.2's scalars: `1e-4` is a number, `off`, `no` and `on` are words; a key given twice is refused."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers
            if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:int",
                           "tag:yaml.org,2002:timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"),
                              list("tTfF"))
Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"),
                              list("-+0123456789"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"))


def _mapping(loader: Loader, node: yaml.MappingNode) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise UserError(f"{_place(key_node)}: a key must be a word, got {key!r}.")
        if key in found:
            raise UserError(f"{_place(key_node)}: key '{key}' is given twice; keep one.")
        found[key] = loader.construct_object(value_node, deep=True)
    return found


def _place(node: yaml.Node) -> str:
    return f"{node.start_mark.name}, line {node.start_mark.line + 1}"


Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_yaml(path: str | Path, *, what: str = "recipe") -> dict[str, Any]:
    """The mapping a YAML file holds. Raises UserError for a missing, unreadable or malformed file, called `what`."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, Loader=Loader)
    except FileNotFoundError:
        raise UserError(f"No {what} at {path}.{_recipes_nearby(path) if what == 'recipe' else ''}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The {what} {path} can't be read: {error}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"The {what} {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"The {what} {path} must be a mapping of keys to values, got {type(content).__name__}.")
    return content


def _recipes_nearby(path: Path) -> str:
    for folder in (path.parent, Path("configs")):
        names = sorted(str(found) for found in folder.glob("*.yaml")) if folder.is_dir() else []
        if names:
            near = difflib.get_close_matches(str(path), names, n=1, cutoff=0.4)
            return f" Did you mean {near[0]}?" if near else f" There are: {', '.join(names[:8])}."
    return ""


class Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would take for something else than a string (`off` and `1e4`)."""


Dumper.yaml_implicit_resolvers = {
    first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) + Loader.yaml_implicit_resolvers.get(first, [])
    for first in yaml.SafeDumper.yaml_implicit_resolvers.keys() | Loader.yaml_implicit_resolvers.keys()
}
