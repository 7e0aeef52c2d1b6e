"""What differs between the recipe a run was started with and the one it is resumed with, and whether it may."""

from __future__ import annotations

import math
from typing import Any

from alexnet_ddp import sections as s
from alexnet_ddp.config import Config, fields


class Change(s.Section):
    """One field that differs between the recipe a run was started with and the one it is resumed with."""

    path: str
    effect: s.Effect
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.path}: {_show(self.before)} -> {_show(self.now)}"


def _show(value: Any) -> str:
    return "null" if value is None else str(value)


def differences(before: dict[str, Any], now: Config) -> list[Change]:
    """What changed against a stored recipe (a plain tree), each with its effect on resume.

    A field the old recipe doesn't know counts with its default; one that no longer exists is passed over.
    """
    effects = {path: info.json_schema_extra["resume"] for path, info in fields()}
    defaults = flatten(Config().model_dump(mode="json"))
    old, new = defaults | flatten(before), flatten(now.model_dump(mode="json"))
    return [Change(path=path, effect=effects[path], before=old[path], now=new[path])
            for path in effects if not _same(old[path], new[path])]


def refusal(changes: list[Change], config: Config, *, accept: bool) -> str:
    """Why a run isn't gone on with after these changes of effect `order`, with the ways out; "" where it is. Pure.

    `accept`: --accept-changes, which lets in all but what decides which weights there are and what a step is.
    """
    fixed = [change for change in changes
             if change.path in ("global_batch", "init_from", "freeze") or change.path.startswith("model.")]
    if not changes or (accept and not fixed):
        return ""
    ways = (f"Give the new run a name of its own (name={config.name}_2), start over with --fresh (keeps the old "
            "directory under another name), or undo the change.")
    if not fixed:
        ways += " To go on all the same: --accept-changes."
    if any(change.path == "freeze" for change in changes):
        ways += (f" A new run can begin with the weights of this one: name={config.name}_2 "
                 f"init_from={config.run_dir}@last.")
    listed = "\n".join(f"  {change}" for change in changes)
    return (f"{config.run_dir} was started with another recipe, and this would change the experiment:\n{listed}\n"
            f"{ways}")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    return bool(a == b)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
