"""One file of a cache: the records of one virtual shard, and the table that says which of them are there.

    table     an entry of 16 bytes a place: offset (8), length (4), CRC-32 (4) of the record; length 0: not there
    records   from the next multiple of 4096 on: those of raw stages at place * record_bytes, others one after the other

A record is written first and its entry after. A kill at any instant so leaves at worst a record without an entry, or,
after a power-off, an entry that its record's CRC does not confirm: `checked` tells. Records of varying length are
appended by the kernel (O_APPEND), so that even a writer of an earlier attempt that hasn't quite died spoils nothing.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]

ENTRY = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc", "<u4")])
ALIGNMENT = 4096  # bytes: a page, so that raw records can be mapped
LONGEST = 2**32 - 1  # bytes of a record that an entry can tell


class ShardFile:
    """The file at `path`, made where there is none. Reads are safe from any thread; `store` and `forget` need `lock`.

    `record_bytes`: of every record where all are alike (raw stages), else None. `mapped`: raw records are read through
    a memory map (for tmpfs alone: on a disk an I/O error would kill the process). `keep_open`: the descriptors are
    kept; otherwise each read opens the file. Raises OSError.
    """

    def __init__(self, path: Path, *, places: int, record_bytes: int | None, mapped: bool, keep_open: bool) -> None:
        self.path, self.lock = path, threading.Lock()
        self._record_bytes = record_bytes
        self._first = -(-places * ENTRY.itemsize // ALIGNMENT) * ALIGNMENT  # where records begin
        self._kept: tuple[int, int] | None = None
        file, appender = self._open()
        try:
            size = self._first + places * (record_bytes or 0)
            if os.fstat(file).st_size < size:
                os.ftruncate(file, size)  # a hole, no space: all there is to make
            size = os.fstat(file).st_size
            self._entries = self._sound(np.frombuffer(_read(file, places * ENTRY.itemsize, 0), ENTRY), size)
            self._lengths = self._entries["length"]
            self.mapped: U8 | None = None
            if mapped and record_bytes:  # never read where no entry confirms that it was written: a hole may not fit
                view = mmap.mmap(file, self._first + places * record_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
                self.mapped = np.frombuffer(view, np.uint8)[self._first:]
        except BaseException:
            _close(file, appender)
            raise
        if keep_open:
            self._kept = file, appender
        else:
            _close(file, appender)

    def _open(self) -> tuple[int, int]:
        """(for reading and the table, for appending records)."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            return file, os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except BaseException:
            os.close(file)
            raise

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[int, int]]:
        if self._kept is not None:
            yield self._kept
            return
        files = self._open()
        try:
            yield files
        finally:
            _close(*files)

    def _sound(self, entries: NDArray[np.void], size: int) -> NDArray[np.void]:
        """A copy in memory, without entries that can't be right; `size` of the file in bytes."""
        entries = entries.copy()
        offset, length = entries["offset"].astype(np.float64), entries["length"].astype(np.float64)  # no overflow
        sound = (length > 0) & (offset >= self._first) & (offset + length <= size)
        if self._record_bytes is not None:
            places = np.arange(len(entries), dtype=np.float64)
            sound &= (offset == self._first + places * self._record_bytes) & (length == self._record_bytes)
        entries[~sound] = 0
        return entries

    def has(self, place: int) -> bool:
        """Whether there is an entry; only `checked` says that its record is right."""
        return bool(self._lengths[place])

    def length(self, place: int) -> int:
        """Bytes of a record, 0 without an entry."""
        return int(self._lengths[place])

    def places(self) -> NDArray[np.bool_]:
        """bool [places]: which have entries."""
        return np.asarray(self._lengths != 0)

    @property
    def filled(self) -> int:
        """Bytes of all records that have entries."""
        return int(self._lengths.sum(dtype=np.int64))

    def read(self, place: int) -> bytes:
        """A record that was checked before, or stored by this process. Raises OSError."""
        offset, length, _ = self._entries[place].item()
        if not length:
            raise OSError(errno.ENODATA, "the record is gone", str(self.path))
        if self.mapped is not None:
            return self.mapped[offset - self._first:offset - self._first + length].tobytes()
        with self._opened() as (file, _):
            return _read(file, length, offset)

    def read_into(self, place: int, out: U8, start: int) -> None:
        """Raw stages: bytes `start` and after of a record, as `read`, into flat `out`; read from the file."""
        assert self._record_bytes is not None
        first = place * self._record_bytes + start
        with self._opened() as (file, _):
            if os.preadv(file, [out.data], self._first + first) != out.size:
                raise OSError(errno.EIO, "cut short", str(self.path))

    def checked(self, place: int) -> bytes | None:
        """The record, None where its CRC differs from its entry's or it can't be read."""
        try:
            data = self.read(place)
        except OSError:
            return None
        return data if zlib.crc32(data) == int(self._entries["crc"][place]) else None

    def store(self, place: int, data: bytes) -> None:
        """Keeps a record of 1 to LONGEST bytes. Raises OSError (ENOSPC, EDQUOT: no room), then nothing is kept."""
        assert 0 < len(data) <= LONGEST and self._record_bytes in (None, len(data))
        with self._opened() as (file, appender):
            if self._record_bytes is not None:
                offset = self._first + place * self._record_bytes
                _write(file, data, offset)
            else:
                _append(appender, data)
                offset = os.lseek(appender, 0, os.SEEK_CUR) - len(data)
            entry = np.array((offset, len(data), zlib.crc32(data)), ENTRY)
            _write(file, entry.tobytes(), place * ENTRY.itemsize)
        self._entries[place] = entry

    def forget(self, place: int) -> None:
        """Drops an entry."""
        self._entries[place] = 0
        with contextlib.suppress(OSError), self._opened() as (file, _):  # the CRC will tell again
            _write(file, bytes(ENTRY.itemsize), place * ENTRY.itemsize)

    def close(self) -> None:
        """No read may be under way."""
        if self._kept is not None:
            _close(*self._kept)
            self._kept = None
        self.mapped = None


def _close(*files: int) -> None:
    for file in files:
        os.close(file)


def _read(file: int, size: int, offset: int) -> bytes:
    data = os.pread(file, size, offset)
    while len(data) < size:
        piece = os.pread(file, size - len(data), offset + len(data))
        if not piece:
            raise OSError(errno.EIO, "cut short")
        data += piece
    return data


def _write(file: int, data: bytes, offset: int) -> None:
    done = os.pwrite(file, data, offset)
    while done < len(data):  # a disk that fills up takes a part first, and says so at the next
        done += os.pwrite(file, memoryview(data)[done:], offset + done)


def _append(file: int, data: bytes) -> None:
    done = os.write(file, data)
    while done < len(data):
        done += os.write(file, memoryview(data)[done:])
