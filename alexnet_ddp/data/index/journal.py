"""The finished parts of a scan under way, so that a scan that was killed goes on where it was.

A journal is a file beside the cache that is only ever appended to: a record for each finished container with its
length and CRC, so that one cut short by a kill is seen and left out. It carries its owner's process in its name; the
next scan of the same source adopts what dead owners left, and a scan that ends removes it. Two processes that scan the
same source at once keep a journal each: file locks are void on some network file systems.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from alexnet_ddp.data.index.parts import Part
from alexnet_ddp.data.index.sources import is_settled, still_holds

SECONDS_BETWEEN_WRITES = 2.0
OTHERS_MINUTES = 5.0  # an owner on another machine that has written nothing for so long is taken for dead
FORGOTTEN_DAYS = 7.0  # a journal that nobody came back to
_RECORD = struct.Struct("<4sIIQ")  # mark, CRC, bytes of the key, bytes of the part
_MARK = b"ajr1"


class Journal:
    """Parts by key, of one source; `path` is where its finished table will be kept."""

    def __init__(self, path: Path) -> None:
        self._folder, self._key = path.parent, path.stem
        self._own = self._folder / f".part-{self._key}.{_process()}.{secrets.token_hex(3)}"
        self._left: list[Path] = []  # journals of dead owners, removed once their records are safe here
        self._found: dict[bytes, bytes] = {}
        self._waiting: list[bytes] = []  # records to be written
        self._file: int | None = None
        self._torn = False
        self._wrote = time.monotonic()
        for left in abandoned(path):
            self._left.append(left)
            for key, data in _records(left):
                self._found[key] = data
        self._waiting = [_record(key, data) for key, data in self._found.items()]

    def find(self, key: str) -> Part | None:
        """The part of that key, if it was finished and nothing that was read for it has changed since."""
        data = self._found.pop(key.encode("utf-8", "surrogateescape"), None)
        if data is None:
            return None
        try:
            part = Part.decode(data)
        except (ValueError, KeyError, TypeError, IndexError):
            return None
        return part if still_holds(part.stamps) else None

    def add(self, key: str, part: Part) -> None:
        """Keeps a finished part: cheap, written every few seconds. What has changed just now isn't kept."""
        if is_settled(part.stamps):
            self._waiting.append(_record(key.encode("utf-8", "surrogateescape"), part.encode()))
        if time.monotonic() - self._wrote >= SECONDS_BETWEEN_WRITES:
            self._write()

    def remove(self) -> None:
        """The scan is complete and its table kept, or can't be."""
        self._close()
        for path in (self._own, *self._left):
            with contextlib.suppress(OSError):
                path.unlink()

    def leave(self) -> None:
        """The scan failed: what took a while is kept for the next one, also of this process."""
        if self._file is not None or time.monotonic() - self._wrote >= SECONDS_BETWEEN_WRITES:
            self._write()
        self._close()
        with contextlib.suppress(OSError):
            self._own.rename(self._folder / f".part-{self._key}.left.{secrets.token_hex(3)}")

    def _write(self) -> None:
        """What can't be written is no reason to fail: without a journal a scan starts over."""
        try:
            if self._torn:
                return
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self._own, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            for record in self._waiting:
                view = memoryview(record)
                while view:
                    view = view[os.write(self._file, view) :]
            for path in self._left:
                path.unlink(missing_ok=True)
            self._left.clear()
        except OSError:  # a full disk, a cache that isn't ours: what would follow half a record is never read
            self._torn = True
        finally:
            self._waiting.clear()
            self._wrote = time.monotonic()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def abandoned(path: Path) -> list[Path]:
    """Journals for the table at `path` whose owners are dead.

    Removes what else the dead left: unfinished tables, journals of other sources that nobody came back to.
    """
    journals = []
    try:
        names = os.listdir(path.parent)
    except OSError:
        return []
    for name in names:
        prefix, _, rest = name.partition("-")
        if prefix not in (".part", ".tmp"):
            continue
        key, _, owner = rest.partition(".")
        file = path.with_name(name)
        if key == path.stem and not _alive(owner, file):
            if prefix == ".part":
                journals.append(file)
            else:
                with contextlib.suppress(OSError):
                    file.unlink()
        elif key != path.stem and _age(file) > FORGOTTEN_DAYS * 86_400:
            with contextlib.suppress(OSError):
                file.unlink()
    return sorted(journals)


def unfinished_name(path: Path) -> Path:
    """Where this process writes the table that will then be renamed to `path`."""
    return path.with_name(f".tmp-{path.stem}.{_process()}.{secrets.token_hex(3)}{path.suffix}")


def _record(key: bytes, data: bytes) -> bytes:
    return _RECORD.pack(_MARK, zlib.crc32(data, zlib.crc32(key)), len(key), len(data)) + key + data


def _records(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """The whole records of a journal; the first that isn't ends it."""
    try:
        with open(path, "rb") as file:
            while len(head := file.read(_RECORD.size)) == _RECORD.size:
                mark, crc, key_bytes, data_bytes = _RECORD.unpack(head)
                rest = os.fstat(file.fileno()).st_size - file.tell()
                if mark != _MARK or key_bytes + data_bytes > rest:
                    return
                key, data = file.read(key_bytes), file.read(data_bytes)
                if zlib.crc32(data, zlib.crc32(key)) != crc:
                    return
                yield key, data
    except OSError:
        return


def _process() -> str:
    """This process among all of all machines: boot, name space, number, start."""
    return ",".join((*_place(), str(os.getpid()), _start_of(os.getpid())))


def _place() -> tuple[str, str]:
    boot, space = "", ""
    with contextlib.suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()[:8]
        space = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    return boot, space


def _start_of(pid: int | str) -> str:
    """Its start in clock ticks since the boot; empty where it has ended, or there is no /proc."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
            return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return ""


def _alive(owner: str, file: Path) -> bool:
    parts = owner.partition(".")[0].split(",")
    if len(parts) != 4:
        return False  # left by a scan that failed
    if parts[0] and tuple(parts[:2]) == _place():
        return bool(parts[3]) and _start_of(parts[2]) == parts[3]
    return _age(file) < OTHERS_MINUTES * 60


def _age(file: Path) -> float:
    """Seconds since it was written to; none if it is gone."""
    try:
        return max(0.0, time.time() - file.stat().st_mtime)
    except OSError:
        return 0.0


def settle(path: Path) -> None:
    """After the table was found at `path`: removes what a process killed right after writing it left behind."""
    for file in abandoned(path):
        with contextlib.suppress(OSError):
            file.unlink()


