"""Where a pack may be written: what is refused, and the claim on the folder while it is made."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from alexnet_ddp.data.index.sources import find_source
from alexnet_ddp.data.index.table import is_clutter
from alexnet_ddp.data.packs import pack_format as form
from alexnet_ddp.errors import UserError


def check_place(folder: Path, locator: str) -> None:
    """What can be refused before the source is looked at, which may take long."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file. Give a folder for the pack's shards.")
    source = find_source(locator)
    root = source.paths[0] if source.kind == "folder" else source.outside
    if os.path.isdir(root):
        inside, outside = os.path.realpath(folder), os.path.realpath(root)
        if os.path.commonpath([inside, outside]) == outside:
            raise UserError(f"{folder}: lies inside the source {root}, where its shards would be taken for data. Give "
                            f"a folder beside it.")
    if folder.is_dir() and not any((folder / name).exists() for name in (form.PACK, form.JOB)):
        check_empty(folder)


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """The folder, made if need be with those above it, under its lock; a refusal leaves nothing of ours behind where
    nothing is under way: neither in a new folder nor in a finished pack."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with form.lock(folder):
        try:
            yield
        except BaseException:
            if not (folder / form.JOB).exists():
                (folder / form.LOCK).unlink(missing_ok=True)
                with suppress(OSError):  # not empty
                    for path in new:
                        path.rmdir()
            raise


def check_empty(folder: Path) -> None:
    try:
        others = sorted(path.name for path in folder.iterdir() if not is_clutter(os.fsencode(path.name)))
    except OSError as error:
        raise UserError(f"{folder}: can't be listed: {error.strerror}.") from None
    if others:
        raise UserError(f"{folder}: holds something else already ({', '.join(others[:3])}"
                        f"{' ...' if len(others) > 3 else ''}). Give a new or an empty folder.")


def no_write(folder: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{folder}: the disk (or your quota) is full. The shards finished so far are kept: free some "
                         f"space and run the same again, or remove the folder.")
    return UserError(f"{error.filename or folder}: can't be written: {error.strerror or error}.")
