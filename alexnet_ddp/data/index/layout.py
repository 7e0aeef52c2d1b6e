"""Which directories are classes, and what is said when a layout is wrong: the same for folders and tars."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from alexnet_ddp.amounts import counted
from alexnet_ddp.data.index.sources import Source, listed
from alexnet_ddp.data.index.table import Listing, below, parent_of, text
from alexnet_ddp.errors import UserError

TRAIN_WORDS = {b"train", b"training"}
HELD_OUT_WORDS = {b"val", b"valid", b"validation", b"test", b"testing"}


@dataclass(frozen=True)
class Layout:
    """Class directories below `base`, and what each directory of the listing means."""

    base: bytes
    classes: list[bytes]  # sorted by bytes
    class_of: list[int]  # [directories of the listing] position in classes, -1: beside the class directories
    prefixes: list[bytes]  # [directories of the listing] sub-directories of the class, with a closing slash
    notes: list[str]


def find_layout(listing: Listing, source: Source, *, base: bytes | None = None) -> Layout:
    """Reads the classes off the directories below `base`, which is found out where it isn't given.

    UserError where they can't be meant as classes.
    """
    if not len(listing):
        raise no_images(listing, source)
    if base is None:
        base = _base(listing, source)
    class_of_directory: dict[bytes, bytes] = {}
    prefixes = []
    for directory in listing.directories:
        name, slash, rest = (below(directory, base) or b"").partition(b"/")
        if name:
            class_of_directory[directory] = name
        prefixes.append(rest + slash)
    classes = sorted(set(class_of_directory.values()))
    if not classes:
        raise _flat(listing, source, base)
    refuse_splits(classes, source, base)
    _refuse_empty_classes(listing, source, base, classes)

    numbers = {name: number for number, name in enumerate(classes)}
    class_of = [
        numbers[class_of_directory[directory]] if directory in class_of_directory else -1
        for directory in listing.directories
    ]
    return Layout(base, classes, class_of, prefixes, _notes(listing, source, base, classes, class_of))


def refuse_splits(names: Iterable[bytes], source: Source, base: bytes) -> None:
    """UserError if what should be classes are train, val and the like: the root is one level off."""
    lower = {name.lower(): name for name in names}
    train, held_out = lower.keys() & TRAIN_WORDS, lower.keys() & HELD_OUT_WORDS
    if (train and held_out) or (lower and len(train) + len(held_out) == len(lower)):
        parts = sorted(lower[word] for word in train | held_out)
        ways = [source.below(b"/".join(filter(None, (base, part)))) for part in parts]
        raise UserError(
            f"{source}: one level too high: it holds {listed([text(part) for part in parts])} "
            f"where class directories should be.\n"
            f"Give {' or '.join(ways)} instead."
        )


def no_images(listing: Listing, source: Source) -> UserError:
    found = ", ".join(f"{count} {suffix}" for suffix, count in listing.others.most_common(5)) or "no files at all"
    way_out = "Give a place whose directories are classes that hold images."
    if listing.others[".gz"] or listing.others[".tgz"]:
        way_out = "Inner archives can be read in place if they are plain .tar: unpack the outer one and `gunzip` them."
    elif listing.others[".npy"]:
        way_out = "Raw records are read from a whole pack: give the folder that holds its pack.json."
    if listing.outside:
        way_out = f"({_outside(listing)}.)\n{way_out}"
    return UserError(f"{source}: no images there (.jpg, .jpeg, .jpe or .png); found: {found}.\n{way_out}")


def _base(listing: Listing, source: Source) -> bytes:
    """The directory that holds the class directories; in a tar it may have to be found out."""
    if source.kind == "folder":
        return b""
    if source.inside is not None:
        return source.inside.encode("utf-8", "surrogateescape")
    counts: dict[bytes, int] = {}
    for directory, count in listing.images_in().items():
        if directory:
            counts[parent_of(directory)] = counts.get(parent_of(directory), 0) + count
    if len(counts) > 1:
        ways = [f"{source.below(base)} ({counts[base]} images)" for base in sorted(counts)]
        raise UserError(
            f"{source}: class directories lie in several places, so a path inside must say which are meant.\n"
            f"Give one of: {listed(ways)}."
        )
    return next(iter(counts), b"")


def _flat(listing: Listing, source: Source, base: bytes) -> UserError:
    place = source.below(base) if base else str(source)
    return UserError(
        f"{place}: {len(listing)} images lie in it without class directories, so their labels are unknown.\n"
        f"Sort them into one directory a class: CLASS/image.jpg."
    )


def _refuse_empty_classes(listing: Listing, source: Source, base: bytes, classes: Sequence[bytes]) -> None:
    full = set(classes)
    rests = (below(directory, base) for directory in listing.bare_directories)
    empty = sorted({rest for rest in rests if rest and b"/" not in rest and rest not in full})
    if empty:
        raise UserError(
            f"{source}: a class directory must hold images, but {len(empty)} hold none: "
            f"{listed([text(name) for name in empty])}.\n"
            f"Fill or remove them (images are .jpg, .jpeg, .jpe and .png)."
        )


def _notes(
    listing: Listing, source: Source, base: bytes, classes: Sequence[bytes], class_of: Sequence[int]
) -> list[str]:
    notes = []
    beside = sum(
        count for (directory, count), number in zip(listing.images_in().items(), class_of, strict=True) if number < 0
    )
    if beside:
        notes.append(f"{beside} images beside the class directories are left out")
    if len(classes) == 1:
        note = f"only one class was found, {text(classes[0])}"
        inside = {
            rest.partition(b"/")[2] for rest in (below(directory, base) for directory in listing.directories) if rest
        }
        if inside - {b""}:
            note += ": if its directories are the classes, give " + source.below(
                b"/".join(filter(None, (base, classes[0])))
            )
        notes.append(note)
    return notes


def note_others(listing: Listing) -> list[str]:
    """A note on the files that are no images, by extension, and one on members whose place is outside of the tar."""
    notes = []
    if listing.others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in listing.others.most_common(5))
        notes.append(f"{listing.others.total()} other files are ignored ({kinds})")
    return notes + ([_outside(listing)] if listing.outside else [])


def _outside(listing: Listing) -> str:
    return f"{counted(listing.outside, 'tar member')} passed over: '..' in the path, which leads out of the archive"
