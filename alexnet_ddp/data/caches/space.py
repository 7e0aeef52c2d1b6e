"""Room on a node: what sort of file system a folder lies on, and how much may be written there without harm."""

from __future__ import annotations

import os
from pathlib import Path

from alexnet_ddp.errors import UserError

SHARED_SYSTEMS = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "ceph", "glusterfs", "afs", "pvfs2")
MEMORY_SYSTEMS = ("tmpfs", "ramfs")


def default_base(kind: str) -> Path:
    """Where a cache of this kind lies unless data.cache_dir says: the job's own disk, or shared memory."""
    if kind == "ram":
        return Path("/dev/shm")
    for name in ("SLURM_TMPDIR", "TMPDIR"):
        if os.environ.get(name):
            return Path(os.environ[name])
    return Path("/tmp")


def check_system(base: Path, kind: str) -> None:
    """UserError where a folder is of the wrong sort for a cache of this kind."""
    system = file_system(base)
    if system in SHARED_SYSTEMS:
        raise UserError(f"data.cache={kind} needs a folder of the node's own, and {base} is on a file system shared by "
                        f"nodes ({system}). Set data.cache_dir to a local disk, or data.cache=none.")
    if kind == "ram" and system and system not in MEMORY_SYSTEMS:
        raise UserError(f"data.cache=ram needs a folder in memory (tmpfs), and {base} is on {system}. Leave "
                        "data.cache_dir out (/dev/shm), or use data.cache=disk.")


def file_system(path: Path) -> str:
    """The type of the file system that a path (or its nearest parent that exists) lies on, "" where unknown."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in _text(Path("/proc/self/mountinfo")).splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2:3] == [wanted]:
            return after.split()[0]
    return ""


def room(path: Path) -> int:
    """Bytes that can be written below `path`: what the file system has free and, in memory, what the machine and the
    process's control group have left."""
    found = os.statvfs(path)
    free = found.f_bavail * found.f_frsize
    return min(free, memory_left()) if file_system(path) in MEMORY_SYSTEMS else free


def memory_left() -> int:
    """Bytes of memory that may still be taken, by the machine's and the control groups' own accounts."""
    left = [2**63]
    for line in _text(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            left.append(int(line.split()[1]) * 1024)
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, place = line.split(":", 2)
        if not controllers:
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            root, names = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        group = root / place.strip("/")
        while group.is_relative_to(root):
            left.append(_group_left(group, *names))
            group = group.parent
    return max(0, min(left))


def _group_left(group: Path, limit: str, usage: str, prefix: str) -> int:
    """What a control group has left: files that it merely keeps cached would make room."""
    try:
        most, taken = int(_text(group / limit)), int(_text(group / usage))
    except ValueError:  # no such file, or "max"
        return 2**63
    for line in _text(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in (f"{prefix}active_file", f"{prefix}inactive_file"):
            taken -= int(value)
    return most - taken


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
