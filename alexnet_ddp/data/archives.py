"""Tars read in place: headers are walked once, images are found again by offset.

Python's tarfile decodes the headers (pax and GNU long names included). What it passes over in silence is
checked here: a damaged header in the middle, a missing end, a second archive behind the first.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from alexnet_ddp.data.layout import find_layout, no_images, note_others
from alexnet_ddp.data.shards import LABEL_SUFFIXES, LabelFile, find_keyed
from alexnet_ddp.data.sources import Source, Stamp, listed, stamp_of
from alexnet_ddp.data.table import (
    LARGEST_IMAGE,
    Listing,
    Table,
    below,
    build_table,
    is_clutter,
    is_image,
    parent_of,
    suffix_of,
    text,
)
from alexnet_ddp.errors import UserError

BLOCK = tarfile.BLOCKSIZE  # bytes
_PIECE = 1 << 20  # bytes read at once behind the end mark


@dataclass
class Archive:
    """What one tar adds besides images to index."""

    path: str
    number: int
    label_files: dict[bytes, LabelFile] = field(default_factory=dict)  # by path, extension in lower case
    empty_images: list[bytes] = field(default_factory=list)
    elsewhere: set[bytes] = field(default_factory=set)  # directories of images not below source.inside


def scan_tars(source: Source) -> tuple[Table, list[Stamp], list[str]]:
    """The samples of all the tars, the tars' stamps, and notes."""
    listing, stamps, archives = Listing(), [], []
    inside = None if source.inside is None else source.inside.encode("utf-8", "surrogateescape")
    for number, path in enumerate(source.paths):
        stamps.append(stamp_of(path))
        archive = Archive(path, number)
        for member in _members(path):
            _sort_in(member, listing, archive, inside)
        archives.append(archive)
    _refuse_empty_images(archives)
    if not len(listing):
        raise _not_inside(listing, archives, source) if inside else no_images(listing, source)

    keyed = find_keyed(listing, [archive.label_files for archive in archives], source)
    if keyed is not None:
        table = build_table(
            listing,
            classes=keyed.classes,
            labels=keyed.labels,
            prefixes=keyed.prefixes,
            base=keyed.base,
            class_in_path=keyed.class_in_path,
            containers=source.paths,
        )
        return table, stamps, note_others(listing)

    for archive in archives:
        listing.others.update(text(suffix_of(path).lower()) for path in archive.label_files)
    layout = find_layout(listing, source)
    labels = np.array(layout.class_of, dtype=np.int32)[np.frombuffer(listing.directory, dtype=np.int32)]
    table = build_table(
        listing,
        classes=layout.classes,
        labels=labels,
        prefixes=layout.prefixes,
        base=layout.base,
        class_in_path=True,
        containers=source.paths,
    )
    return table, stamps, layout.notes + note_others(listing)


def _members(path: str) -> Iterator[tarfile.TarInfo]:
    """The members' headers in the order of the tar. UserError where the tar is cut short or damaged."""
    offset = 0
    try:
        size = os.path.getsize(path)
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                offset = tar.offset  # of the next header
                if member.isreg() and member.offset_data + member.size > size:
                    raise _cut_short(
                        path,
                        size,
                        f"inside {member.name}, which begins at offset {member.offset_data} "
                        f"and has {member.size} bytes",
                    )
                yield member
            _check_end(path, tar.offset, size)
    except UserError:
        raise
    except (tarfile.TarError, ValueError) as error:
        if offset > size:
            raise _cut_short(path, size, f"and the next header should be at offset {offset}") from None
        raise UserError(
            f"{path}: not a tar archive, or damaged at offset {offset}: {error}.\nFetch or make it again."
        ) from None
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror or error}.") from None


def _check_end(path: str, offset: int, size: int) -> None:
    """tarfile stops without a word at the first header it can't read: only two blocks of zeros are an end."""
    with open(path, "rb") as file:
        file.seek(offset)
        piece = file.read(BLOCK)
        if len(piece) < BLOCK:
            raise _cut_short(path, size, "before the two blocks of zeros that end a tar")
        if any(piece):
            raise UserError(
                f"{path}: the header at offset {offset} is damaged; what follows it can't be found.\n"
                f"Fetch or make the archive again."
            )
        while piece := file.read(_PIECE):
            if any(piece):
                raise UserError(
                    f"{path}: more data follows the end mark at offset {offset} (tars joined by cat?).\n"
                    f"Keep them as several shards, or join them with `tar --concatenate`."
                )


def _cut_short(path: str, size: int, place: str) -> UserError:
    return UserError(f"{path}: is cut short: it ends at offset {size}, {place}.\nFetch or make it again.")


def _sort_in(member: tarfile.TarInfo, listing: Listing, archive: Archive, inside: bytes | None) -> None:
    """Puts one member where it belongs."""
    parts = [part for part in member.name.encode("utf-8", "surrogateescape").split(b"/") if part not in (b"", b".")]
    if not parts or any(is_clutter(part) for part in parts):
        return
    path, name = b"/".join(parts), parts[-1]
    if member.isdir():
        listing.bare_directories.add(path)
    elif inside and below(path, inside) is None:
        if is_image(name):
            archive.elsewhere.add(parent_of(path))
    elif is_image(name):
        if not member.isreg() or member.issparse() or member.size > LARGEST_IMAGE:
            raise UserError(
                f"{archive.path}: {text(path)} is stored as a link or a sparse file, not as bytes.\n"
                f"Make the tar again with --dereference --hard-dereference, without --sparse."
            )
        if member.size == 0:
            archive.empty_images.append(path)
        else:
            listing.add(path, container=archive.number, offset=member.offset_data, size=member.size)
    elif member.isreg() and (suffix := suffix_of(name).lower()) in LABEL_SUFFIXES:
        archive.label_files[path[: -len(suffix)] + suffix] = (member.offset_data, member.size)
    else:
        listing.add_other(name)


def _refuse_empty_images(archives: list[Archive]) -> None:
    empty = [f"{archive.path}: {text(path)}" for archive in archives for path in archive.empty_images]
    if empty:
        raise UserError(
            f"{len(empty)} image files hold no bytes: {listed(empty, most=3)}.\nMake the archive again without them."
        )


def _not_inside(listing: Listing, archives: list[Archive], source: Source) -> UserError:
    """The path inside holds no image: says which would."""
    elsewhere = sorted({parent_of(directory) for archive in archives for directory in archive.elsewhere})
    if not elsewhere or (source.inside or "").encode("utf-8", "surrogateescape") in listing.bare_directories:
        return no_images(listing, source)
    return UserError(
        f"{source}: no image lies below {source.inside} there.\n"
        f"Give one of: {listed([source.below(directory) for directory in elsewhere])}."
    )
