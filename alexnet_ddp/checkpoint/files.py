"""Durable files: what is written here is on the disk when the call returns, or the call raises.

Tensors are written in the safetensors format (never pickle) straight from their memory. The library's own
`save_file` does not report what a network file system says on close, and its `save` holds the interpreter
lock for most of a second per 250 MB; reading goes through the library, which so checks what we write.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from alexnet_ddp.errors import UserError

# Bytes hashed or written at once: with small pieces a thread starves behind a busy main thread (256 KiB: 20
# times slower).
PIECE = 16 << 20

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
}  # those the format and torch's ordinary operations share


@dataclass(frozen=True)
class Written:
    """What a file must be when it is read again: its size in bytes and the sha256 of its content."""

    bytes: int
    sha256: str


def write(path: Path, *, pieces: Iterable[bytes | memoryview]) -> Written:
    """Write a new file, flush it to the disk and return its size and hash as they were in memory."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file:
        for piece in pieces:
            view = memoryview(piece)
            digest.update(view)
            size += len(view)
            while view:  # an unbuffered write may take less than it was given
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def write_tensors(path: Path, *, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Written:
    """Write CPU tensors (contiguous, of a dtype in DTYPES) as one safetensors file."""
    # Widest dtype first, as the library does it: every tensor then starts at a multiple of its item size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterable[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for _, tensor in ordered:
            if tensor.numel():
                data = tensor.reshape(-1).view(torch.uint8).numpy().data
                for start in range(0, len(data), PIECE):
                    yield data[start : start + PIECE]

    return write(path, pieces=pieces())


def replace(path: Path, *, content: bytes) -> None:
    """Write a small file so that a reader, or a kill, meets the old content or the new, never half of it."""
    fresh = path.with_name(f".tmp-{path.name}")
    write(fresh, pieces=[content])
    os.replace(fresh, path)
    sync_directory(path.parent)


def read(path: Path) -> bytes:
    """The whole content of a file. Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        return file.read()


def measure(path: Path) -> Written:
    """Size and hash of a file, read piece by piece. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(PIECE, os.fstat(file.fileno()).st_size + 1)))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return Written(size, digest.hexdigest())


def sha256(data: bytes) -> str:
    """Hash of bytes in memory, in pieces large enough to run beside a busy main thread."""
    digest, view = hashlib.sha256(), memoryview(data)
    for start in range(0, len(view), PIECE):
        digest.update(view[start : start + PIECE])
    return digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Make the names in a directory (new files, renames) survive a power failure."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def discard(path: Path) -> None:
    """Delete a directory under another name, so that a kill never leaves half of it under its own."""
    trash = path.with_name(f".trash-{path.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def clean(directory: Path) -> None:
    """Remove what killed attempts left unfinished (`.tmp-*`, `.trash-*`). For the owner of the run alone."""
    for left in [*directory.glob(".tmp-*"), *directory.glob(".trash-*")]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, *, otherwise: str) -> Iterator[None]:
    """The file's lock, held by one process at a time and given back by the system if that is killed.

    Raises UserError, `otherwise`, where another holds it. On a file system without locks everybody gets it.
    """
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(otherwise) from None
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
        yield
