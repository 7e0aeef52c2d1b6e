"""From what was found in a source to its table: labels from directories, label files, the devkit or a pack."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from alexnet_ddp.data.index.layout import Layout, find_layout, no_images, note_others
from alexnet_ddp.data.index.official import find_class_tars, find_official
from alexnet_ddp.data.index.parts import Part
from alexnet_ddp.data.index.shards import find_keyed
from alexnet_ddp.data.index.sources import Source, Stamp, listed, stamp_of
from alexnet_ddp.data.index.table import Listing, Table, below, build_table, parent_of
from alexnet_ddp.errors import UserError

Scan = tuple[Table, list[Stamp], list[str]]  # table, stamps, notes


def finish(whole: Part, stamps: Sequence[Stamp], source: Source) -> Scan:
    """The table of all that was found. UserError says what is wrong with the layout."""
    listing = whole.listing
    if not len(listing):
        raise _not_inside(whole, source)
    if source.pack is not None:
        return _packed(listing, source), [*stamps, stamp_of(source.pack.path)], note_others(listing)

    keyed = find_keyed(listing, whole.values, whole.known, source)
    if keyed is not None:
        table = build_table(listing, classes=keyed.classes, labels=keyed.labels, prefixes=keyed.prefixes,
                            base=keyed.base, class_in_path=keyed.class_in_path, containers=source.paths)
        return table, list(stamps), note_others(listing)

    listing.others.update(whole.label_files)  # they label no image
    official = find_official(listing, source)
    if official is not None:
        table = build_table(listing, classes=official.classes, labels=official.labels, prefixes=[b""],
                            base=official.base, class_in_path=False, containers=source.paths)
        note = f"labels from {official.kit.files[0]}"
        return table, [*stamps, *map(stamp_of, official.kit.files)], [note, *note_others(listing)]

    if (by_tar := find_class_tars(listing, source)) is not None:
        table = build_table(listing, classes=by_tar[0], labels=by_tar[1], prefixes=[b""], base=b"",
                            class_in_path=False, containers=source.paths)
        return table, list(stamps), note_others(listing)

    layout = find_layout(listing, source, base=_base_of_tars(whole, source))
    in_tars = {b"/".join(filter(None, (layout.base, name))) for name in layout.classes} <= whole.inner
    squeezed = sum(listing.others[suffix] for suffix in (".gz", ".tgz", ".bz2", ".xz", ".zst"))
    if in_tars and squeezed:
        raise UserError(f"{source}: {squeezed} compressed archives lie beside its class tars, and their classes would "
                        "be lost. Unpack the outer tar, decompress them, and give the folder.")
    table = build_table(listing, classes=layout.classes, labels=_by_directory(listing, layout.class_of),
                        prefixes=layout.prefixes, base=layout.base, class_in_path=True,
                        class_suffix=b".tar" if in_tars else b"", containers=source.paths)
    return table, list(stamps), layout.notes + note_others(listing)


def _base_of_tars(whole: Part, source: Source) -> bytes | None:
    """Where the inner tars lie, which are the classes whatever lies in them; None if there is more than that."""
    bases = {parent_of(tar) for tar in whole.inner}
    if source.kind == "folder" or source.inside is not None or len(bases) != 1:
        return None
    base = bases.pop()
    below_base = (below(directory, base) for directory in whole.listing.directories)
    tops = {path.partition(b"/")[0] if path else b"" for path in below_base}
    return base if {b"/".join(filter(None, (base, top))) for top in tops} <= whole.inner else None


def _by_directory(listing: Listing, class_of: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.array(class_of, dtype=np.int32)[np.frombuffer(listing.directory, dtype=np.int32)]


def _packed(listing: Listing, source: Source) -> Table:
    """A pack's table: its members are in the order of their ids, so its classes are in theirs."""
    assert source.pack is not None
    parts = [directory.partition(b"/") for directory in listing.directories]
    classes = list(dict.fromkeys(name for name, _, _ in parts))
    layout = Layout(b"", classes, [classes.index(name) for name, _, _ in parts],
                    [rest + b"/" if rest else b"" for _, _, rest in parts], [])
    table = build_table(listing, classes=classes, labels=_by_directory(listing, layout.class_of),
                        prefixes=layout.prefixes, base=b"", class_in_path=True, containers=source.paths)
    if table.identity() != source.pack.identity:
        raise UserError(f"{source.pack.path}: the shards beside it hold other samples than it says ({len(table):,}, "
                        f"not {source.pack.samples:,}, or other names). Copy the whole pack again, or pack again.")
    return table


def _not_inside(whole: Part, source: Source) -> UserError:
    """The path inside holds no image: says which would."""
    elsewhere = sorted({parent_of(directory) for directory in whole.elsewhere})
    inside = (source.inside or "").encode("utf-8", "surrogateescape")
    if not inside or not elsewhere or inside in whole.listing.bare_directories:
        return no_images(whole.listing, source)
    return UserError(
        f"{source}: no image lies below {source.inside} there.\n"
        f"Give one of: {listed([source.below(directory) for directory in elsewhere])}."
    )
