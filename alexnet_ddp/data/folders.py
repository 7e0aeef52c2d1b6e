"""A folder of class directories, each image a file of its own."""

import os

import numpy as np

from alexnet_ddp.data.layout import find_layout, note_others, refuse_splits
from alexnet_ddp.data.sources import Source, Stamp
from alexnet_ddp.data.table import Listing, Table, build_table, is_clutter, is_image
from alexnet_ddp.errors import UserError


def scan_folder(source: Source) -> tuple[Table, list[Stamp], list[str]]:
    """The folder's samples, the stamp of every directory, and notes. Follows links, opens no file."""
    listing, stamps = Listing(), []
    root = os.fsencode(source.paths[0])
    waiting: list[tuple[bytes, frozenset[tuple[int, int]]]] = [(b"", frozenset())]  # path below root, its ancestors
    while waiting:
        directory, ancestors = waiting.pop()
        full = os.path.join(root, directory) if directory else root
        try:
            stamp, here, children = _list_directory(full, directory, listing)
        except OSError as error:
            raise UserError(f"{os.fsdecode(full)}: can't be listed: {error.strerror}.") from None
        if here in ancestors:
            raise UserError(f"{os.fsdecode(full)}: is a link to a directory that contains it. Remove the link.")
        stamps.append(stamp)
        if not directory:
            refuse_splits(children, source, b"")
        waiting += [(os.path.join(directory, child), ancestors | {here}) for child in sorted(children, reverse=True)]

    layout = find_layout(listing, source)
    labels = np.array(layout.class_of, dtype=np.int32)[np.frombuffer(listing.directory, dtype=np.int32)]
    table = build_table(
        listing,
        classes=layout.classes,
        labels=labels,
        prefixes=layout.prefixes,
        base=b"",
        class_in_path=True,
        containers=source.paths,
    )
    return table, stamps, layout.notes + note_others(listing)


def _list_directory(full: bytes, directory: bytes, listing: Listing) -> tuple[Stamp, tuple[int, int], list[bytes]]:
    """Adds a directory's images to the listing. Returns its stamp, device and inode, directories' names."""
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
