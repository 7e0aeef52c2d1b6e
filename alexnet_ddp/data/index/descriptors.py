"""Tars open for reading at random: descriptors that all threads share, and reads straight into memory."""

from __future__ import annotations

import errno
import os
import resource
import threading
import weakref
from collections.abc import Sequence

from alexnet_ddp.data.index.sources import Stamp
from alexnet_ddp.errors import UserError

KEPT_OPEN = 16_384  # tars whose descriptors are kept, if the limit of the process allows; others: opened for each read
_SPARE = 512  # descriptors left to everything else: logs, sockets, other indexes


def room_for(tars: int) -> int:
    """How many of so many tars can stay open. Raises the soft limit (often 1024) as far as they need it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return min(tars, KEPT_OPEN)
    used = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else _SPARE
    wanted = used + min(tars, KEPT_OPEN) + _SPARE
    if wanted > soft:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        except (OSError, ValueError):  # a sandbox may forbid it
            soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(0, min(tars, KEPT_OPEN, soft - used - _SPARE))


class Tars:
    """Descriptors of tars, opened when first read; a forked child opens its own."""

    _living: weakref.WeakSet[Tars] = weakref.WeakSet()

    def __init__(self, paths: Sequence[str], stamps: Sequence[Stamp]) -> None:
        self._paths, self._stamps = paths, stamps
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()
        self._room: int | None = None  # found out at the first read
        Tars._living.add(self)

    def read(self, number: int, offset: int, size: int) -> bytes:
        """`size` bytes of tar `number` from `offset`."""
        descriptor = self._kept(number)
        if descriptor is not None:
            return pread(descriptor, size, offset, self._paths[number])
        descriptor = self._open(number)
        try:
            return pread(descriptor, size, offset, self._paths[number])
        finally:
            os.close(descriptor)

    def read_into(self, number: int, offset: int, out: memoryview) -> None:
        """The bytes of tar `number` from `offset` into `out` (flat, of bytes), as many as it holds."""
        descriptor = self._kept(number)
        if descriptor is not None:
            preadv(descriptor, out, offset, self._paths[number])
            return
        descriptor = self._open(number)
        try:
            preadv(descriptor, out, offset, self._paths[number])
        finally:
            os.close(descriptor)

    def reopen(self, number: int) -> None:
        """Opens tar `number` anew where its descriptor is kept: that of a network file system may have gone stale.

        Other threads may be reading from it: the new one takes its number, in one step. Raises as a read does.
        """
        with self._lock:
            kept = self._descriptors.get(number)
            if kept is not None:
                fresh = self._open(number)
                os.dup2(fresh, kept, inheritable=False)
                os.close(fresh)

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def _kept(self, number: int) -> int | None:
        """The descriptor that stays open; None where there is no room for it."""
        descriptor = self._descriptors.get(number)
        if descriptor is None:
            with self._lock:
                descriptor = self._descriptors.get(number)
                if descriptor is None:
                    if self._room is None:
                        self._room = room_for(len(self._paths))
                    if len(self._descriptors) < self._room:
                        descriptor = self._descriptors[number] = self._open(number)
        return descriptor

    def _open(self, number: int) -> int:
        path, stamp = self._paths[number], self._stamps[number]
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != (stamp.size, stamp.mtime_ns):
            os.close(descriptor)
            raise UserError(
                f"{path}: was changed after its index was made, so its images can't be found any more.\n"
                f"Start again, and leave the file alone while a run reads it."
            )
        return descriptor

    @classmethod
    def _after_fork(cls) -> None:
        """In the child: another thread may have held the lock, and descriptors belong to who opened them."""
        for tars in cls._living:
            tars._lock = threading.Lock()
            tars.close()


os.register_at_fork(after_in_child=Tars._after_fork)


def pread(descriptor: int, size: int, offset: int, path: str) -> bytes:
    """Exactly `size` bytes. OSError if there are fewer."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size:  # some network file systems give less than asked for
        piece = os.pread(descriptor, size - len(data), offset + len(data))
        if not piece:
            raise _too_few(len(data), size, path)
        data += piece
    return data


def preadv(descriptor: int, out: memoryview, offset: int, path: str) -> None:
    """Fills `out` without a copy in between. OSError if there are fewer bytes."""
    size = len(out)
    done = os.preadv(descriptor, [out], offset)
    while done < size:
        piece = os.preadv(descriptor, [out[done:]], offset + done)
        if not piece:
            raise _too_few(done, size, path)
        done += piece


def _too_few(found: int, size: int, path: str) -> OSError:
    return OSError(errno.EIO, f"only {found} of {size} bytes are there", path)
