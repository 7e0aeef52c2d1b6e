"""Tars read in place: headers are walked once, images are found again by offset.

A tar within a tar, as in ImageNet's own training archive, is walked where it lies; its stem is the class of its
images, and offsets are those in the outer file.
"""

from __future__ import annotations

import os
import tarfile

from alexnet_ddp.data.index.headers import members
from alexnet_ddp.data.index.journal import Journal
from alexnet_ddp.data.index.packed import NPY_HEADER, RawHeaders
from alexnet_ddp.data.index.parts import Part, together
from alexnet_ddp.data.index.scan import Scan, finish
from alexnet_ddp.data.index.shards import LABEL_SUFFIXES, LabelFile, read_labels
from alexnet_ddp.data.index.sources import Source, Stamp, stamp_of
from alexnet_ddp.data.index.table import LARGEST_IMAGE, below, is_clutter, is_image, parent_of, suffix_of, text
from alexnet_ddp.errors import UserError
from alexnet_ddp.progress import Progress

_MEGABYTE = 10**6


def scan_tars(source: Source, journal: Journal) -> Scan:
    """The samples of all the tars, the tars' stamps, and notes. Goes on with what the journal holds."""
    stamps = [_stamp(path) for path in source.paths]
    parts: list[Part] = []
    with Progress(sum(stamp.size for stamp in stamps) // _MEGABYTE, what=f"Indexing {source}", unit="MB") as progress:
        meter = _Meter(progress)
        for number, stamp in enumerate(stamps):
            part = journal.find(str(number))
            parts += [part] if part is not None else _Tar(source, number, stamp, journal, meter).parts()
            meter.finished(stamp.size)
    return finish(together(parts), stamps, source)


def _stamp(path: str) -> Stamp:
    try:
        return stamp_of(path)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}.") from None


class _Meter:
    """Progress in whole megabytes from positions in bytes."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._before, self._told = progress, 0, 0

    def at(self, offset: int) -> None:
        """So many bytes of the tar under way are done."""
        now = (self._before + offset) // _MEGABYTE
        if now > self._told:
            self._progress.update(now - self._told)
            self._told = now

    def finished(self, size: int) -> None:
        self.at(size)
        self._before += size


class _Tar:
    """One tar under way."""

    def __init__(self, source: Source, number: int, stamp: Stamp, journal: Journal, meter: _Meter) -> None:
        self._path, self._number, self._stamp, self._journal, self._meter = stamp.path, number, stamp, journal, meter
        self._inside = (source.inside or "").encode("utf-8", "surrogateescape")
        side = source.pack.side if source.pack is not None else None
        self._raw = RawHeaders(side) if side is not None else None

    def parts(self) -> list[Part]:
        """What lies in it directly, then each inner tar; every one is in the journal as soon as it is finished."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{self._path}: can't be read: {error.strerror}.") from None
        try:
            inner: list[Part] = []
            outer = self._part(descriptor, 0, self._stamp.size, self._path, b"", inner)
        finally:
            os.close(descriptor)
        if not inner:  # else it is told again from a few headers
            self._journal.add(str(self._number), outer)
        return [outer, *inner]

    def _part(self, descriptor: int, start: int, size: int, where: str, prefix: bytes,
              inner: list[Part] | None) -> Part:
        """The tar at bytes `start` to `start + size`; `prefix` is the directory that its members count as lying in."""
        part, labels = Part(stamps=[self._stamp]), dict[bytes, LabelFile]()
        for member, offset, peek in members(descriptor, start, size, where):
            self._meter.at(offset)
            path = prefix + _path(member)
            if not path or path.endswith(b"/"):
                part.listing.outside += _leads_out(member)
                continue
            if inner is not None and member.isreg() and suffix_of(path).lower() == b".tar" and not self._raw:
                if self._inside and below(path[:-4], self._inside) is None:
                    part.elsewhere.add(path[:-4])
                else:
                    inner.append(self._inner(descriptor, offset, member.size, path))
            else:
                self._sort_in(member, offset, path, where, part, labels, peek)
        part.values, part.known = read_labels(part.listing, labels, descriptor, where)
        return part

    def _inner(self, descriptor: int, offset: int, size: int, path: bytes) -> Part:
        key = f"{self._number} {offset}"
        part = self._journal.find(key)
        if part is None:
            part = self._part(descriptor, offset, size, f"{self._path}: {text(path)}", path[:-4] + b"/", None)
            part.inner.add(path[:-4])
            part.listing.bare_directories.add(path[:-4])  # a class, even if it holds nothing
            self._journal.add(key, part)
        return part

    def _sort_in(self, member: tarfile.TarInfo, offset: int, path: bytes, where: str, part: Part,
                 labels: dict[bytes, LabelFile], peek: bytes) -> None:
        """Puts one member where it belongs."""
        name, listing = path.rpartition(b"/")[2], part.listing
        sample = is_image(name) if self._raw is None else name.endswith(b".npy")
        if member.isdir():
            listing.bare_directories.add(path)
        elif self._inside and below(path, self._inside) is None:
            if sample:
                part.elsewhere.add(parent_of(path))
        elif sample:
            if not member.isreg() or member.issparse() or member.size > LARGEST_IMAGE:
                raise UserError(
                    f"{where}: {text(path)} is stored as a link or a sparse file, not as bytes.\n"
                    f"Make the tar again with --dereference --hard-dereference, without --sparse."
                )
            if self._raw is None:  # one of no bytes is a sample too, a damaged one
                listing.add(path, container=self._number, offset=offset, size=member.size)
            elif problem := self._raw.problem(peek[:NPY_HEADER], member.size):
                raise UserError(f"{where}: {text(path)} at offset {offset} {problem}. Pack again.")
            else:
                listing.add(path, container=self._number, offset=offset + NPY_HEADER, size=self._raw.record)
        elif member.isreg() and (suffix := suffix_of(name).lower()) in LABEL_SUFFIXES:
            labels[path[: -len(suffix)] + suffix] = (offset, member.size)
            part.label_files[text(suffix)] += 1
        else:
            listing.add_other(name)


def _leads_out(member: tarfile.TarInfo) -> bool:
    return not member.isdir() and ".." in member.name.split("/")


def _path(member: tarfile.TarInfo) -> bytes:
    """A member's path without empty parts and dots; empty for what is passed over."""
    parts = [part for part in member.name.encode("utf-8", "surrogateescape").split(b"/") if part not in (b"", b".")]
    return b"" if any(is_clutter(part) for part in parts) else b"/".join(parts)
