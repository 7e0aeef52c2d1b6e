"""A folder of class directories, each image a file of its own."""

from __future__ import annotations

import os
from array import array

from alexnet_ddp.data.index.journal import Journal
from alexnet_ddp.data.index.layout import refuse_splits
from alexnet_ddp.data.index.parts import Part, together
from alexnet_ddp.data.index.scan import Scan, finish
from alexnet_ddp.data.index.sources import Source, Stamp
from alexnet_ddp.data.index.table import Listing, is_clutter, is_image
from alexnet_ddp.errors import UserError
from alexnet_ddp.progress import Progress


def scan_folder(source: Source, journal: Journal) -> Scan:
    """The folder's samples, the stamp of every directory, and notes. Follows links, opens no file.

    Goes on with the class directories that the journal holds.
    """
    root, top = os.fsencode(source.paths[0]), Part()
    stamp, here, children = _list_directory(root, b"", top.listing)
    refuse_splits(children, source, b"")
    parts = [top]
    with Progress(len(children), what=f"Indexing {source}", unit="directories") as progress:
        for child in sorted(children):
            key = os.fsdecode(child)
            part = journal.find(key)
            if part is None:
                part = _scan_below(root, child, frozenset({here}))
                journal.add(key, part)
            parts.append(part)
            progress.update()
    stamps = [stamp] + [one for part in parts for one in part.stamps]
    return finish(together(parts), stamps, source)


def _scan_below(root: bytes, child: bytes, above: frozenset[tuple[int, int]]) -> Part:
    part = Part()
    waiting: list[tuple[bytes, frozenset[tuple[int, int]]]] = [(child, above)]  # path below root, its ancestors
    while waiting:
        directory, ancestors = waiting.pop()
        full = os.path.join(root, directory)
        stamp, here, children = _list_directory(full, directory, part.listing)
        if here in ancestors:
            raise UserError(f"{os.fsdecode(full)}: is a link to a directory that contains it. Remove the link.")
        part.stamps.append(stamp)
        waiting += [(os.path.join(directory, name), ancestors | {here}) for name in sorted(children, reverse=True)]
    part.values, part.known = array("i", bytes(4 * len(part.listing))), [None]
    return part


def _list_directory(full: bytes, directory: bytes, listing: Listing) -> tuple[Stamp, tuple[int, int], list[bytes]]:
    """Adds a directory's images to the listing. Returns its stamp, device and inode, directories' names."""
    try:
        return _list_readable(full, directory, listing)
    except OSError as error:
        raise UserError(f"{os.fsdecode(full)}: can't be listed: {error.strerror}.") from None


def _list_readable(full: bytes, directory: bytes, listing: Listing) -> tuple[Stamp, tuple[int, int], list[bytes]]:
    status = os.stat(full)  # before listing: a file added meanwhile makes the stamp stale
    children = []
    if directory:
        listing.bare_directories.add(directory)
    with os.scandir(full) as entries:
        for entry in entries:
            name = entry.name
            if is_clutter(name):
                continue
            if entry.is_dir():
                children.append(name)
            elif is_image(name):
                if entry.is_symlink() and not entry.is_file():
                    raise UserError(
                        f"{os.fsdecode(entry.path)}: is a link to something that isn't there.\n"
                        f"Remove it or bring back what it points to."
                    )
                listing.add(os.path.join(directory, name) if directory else name)
            else:
                listing.add_other(name)
    stamp = Stamp(os.fsdecode(full), 0, status.st_mtime_ns)
    return stamp, (status.st_dev, status.st_ino), children
