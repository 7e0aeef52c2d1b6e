"""The members of a tar, or of a tar that lies in another file, by their headers.

Python's tarfile decodes the headers (pax and GNU long names included). What it passes over in silence is
checked here: a damaged header in the middle, a missing end, a second archive behind the first.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator

from alexnet_ddp.errors import UserError

BLOCK = tarfile.BLOCKSIZE  # bytes
_AHEAD = 2 * BLOCK  # bytes read at once where a header is looked for
_PIECE = 1 << 20  # bytes read at once behind the end mark
PEEK = 128  # bytes of a member's data that are always told

Member = tuple[tarfile.TarInfo, int, bytes]  # header, offset of the data in the file, how the data begin (some bytes)


def members(descriptor: int, start: int, size: int, where: str) -> Iterator[Member]:
    """The members of the tar at bytes `start` to `start + size` of an open file, in order.

    UserError where the tar is cut short or damaged; its offsets count from the file's beginning.
    """
    window = _Window(descriptor, start, size)
    offset = 0
    try:
        with tarfile.open(fileobj=window, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:  # type: ignore[call-overload]
            while (member := tar.next()) is not None:
                tar.members.clear()
                offset = tar.offset  # of the next header
                if member.isreg() and member.offset_data + member.size > size:
                    raise _cut_short(
                        where,
                        start + size,
                        f"inside {member.name}, which begins at offset {start + member.offset_data} "
                        f"and has {member.size} bytes",
                    )
                yield member, start + member.offset_data, window.peek(member.offset_data)
            _check_end(window, tar.offset, where)
    except UserError:
        raise
    except (tarfile.TarError, ValueError) as error:
        if offset > size:
            raise _cut_short(where, start + size, f"and the next header should be at offset {start + offset}") from None
        raise UserError(
            f"{where}: not a tar archive, or damaged at offset {start + offset}: {error}.\nFetch or make it again."
        ) from None
    except OSError as error:
        raise UserError(f"{where}: can't be read: {error.strerror or error}.") from None


class _Window:
    """A part of a file as a file of its own, as far as tarfile needs it."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self._descriptor, self._start, self.size = descriptor, start, size
        self._position = 0
        self._piece, self._piece_at = b"", 0  # what was read last, and from where

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET
        self._position = position
        return position

    def read(self, count: int) -> bytes:
        count = max(0, min(count, self.size - self._position))
        begin = self._position - self._piece_at
        if begin < 0 or begin + count > len(self._piece):
            ahead = min(max(count, _AHEAD), self.size - self._position)
            piece = os.pread(self._descriptor, ahead, self._start + self._position) if ahead > 0 else b""
            while piece and len(piece) < count:  # some network file systems give less than asked for
                more = os.pread(self._descriptor, count - len(piece), self._start + self._position + len(piece))
                if not more:
                    break
                piece += more
            self._piece, self._piece_at, begin = piece, self._position, 0
        data = self._piece[begin : begin + count]
        self._position += len(data)
        return data

    def peek(self, offset: int) -> bytes:
        """The bytes from `offset`, at least the first PEEK of those there are."""
        begin = offset - self._piece_at
        wanted = max(0, min(PEEK, self.size - offset))
        if begin < 0 or len(self._piece) - begin < wanted:  # behind an extended header
            return os.pread(self._descriptor, wanted, self._start + offset)
        return self._piece[begin:]


def _check_end(window: _Window, offset: int, where: str) -> None:
    """tarfile stops without a word at the first header it can't read: only two blocks of zeros are an end."""
    window.seek(offset)
    piece = window.read(BLOCK)
    start = window._start
    if len(piece) < BLOCK:
        raise _cut_short(where, start + window.size, "before the two blocks of zeros that end a tar")
    if any(piece):
        raise UserError(
            f"{where}: the header at offset {start + offset} is damaged; what follows it can't be found.\n"
            f"Fetch or make the archive again."
        )
    while piece := window.read(_PIECE):
        if any(piece):
            raise UserError(
                f"{where}: more data follows the end mark at offset {start + offset} (tars joined by cat?).\n"
                f"Keep them as several shards, or join them with `tar --concatenate`."
            )


def _cut_short(where: str, end: int, place: str) -> UserError:
    return UserError(f"{where}: is cut short: it ends at offset {end}, {place}.\nFetch or make it again.")
