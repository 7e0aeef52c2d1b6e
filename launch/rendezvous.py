"""How the ranks of a job find each other: before torch is imported, within a bound, and named when they don't.

Rank 0 listens on the head node, on the first free port of a short list that job and restart count determine; every
other rank tries the list until one answers with this start's name. When all have come they are told to go on. The
socket that rank 0 listened on becomes torch's store, so no port is probed, freed and hoped for.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

from alexnet_ddp.errors import EXIT_UNAVAILABLE, UserError
from launch.place import Place, place_of

PORTS = range(10_000, 30_000)  # below 32768, where Linux takes ports for outgoing connections
CANDIDATES = 8
PATIENCE = 120.0  # seconds for all tasks to start; prologs and cold file systems take their time
ANSWER = 5.0  # seconds for the other side to say its line


class Unreachable(UserError):
    """The hosts of a job don't reach each other: nobody's recipe is at fault, and another start may fare better."""

    kind, code = "network", EXIT_UNAVAILABLE


@dataclass
class Meeting:
    """Where the ranks have met. `listener` is rank 0's socket, still listening; `interface` faces the others."""

    host: str
    port: int
    listener: socket.socket | None
    interface: str | None


def candidates(name: str) -> list[int]:
    """The ports for a start of a job, `JOB.RESTART`: the same on all hosts, others at the next start."""
    digest = hashlib.sha256(f"alexnet-ddp {name}".encode()).digest()
    first, stride = int.from_bytes(digest[:8], "big"), 1 + 2 * int.from_bytes(digest[8:12], "big")
    return [PORTS.start + (first + number * stride) % len(PORTS) for number in range(CANDIDATES)]


def meet(name: str, *, rank: int, size: int, head: str, hosts: Sequence[str], timeout: float = PATIENCE) -> Meeting:
    """Waits until all `size` ranks of the start `name` have found each other.

    Args:
        head: host of rank 0, by the name that the others know it by.
        hosts: name of every rank's host, for the message; rank 0 uses it.

    Raises Unreachable within about `timeout` seconds: it names who can't reach whom.
    """
    if rank == 0:
        return _receive(name, size=size, head=head, hosts=hosts, timeout=timeout)
    return _call(name, rank=rank, head=head, timeout=timeout)


def _receive(name: str, *, size: int, head: str, hosts: Sequence[str], timeout: float) -> Meeting:
    listener, port = _listen(name, head=head, backlog=max(size, 128))
    deadline = time.monotonic() + timeout
    here: dict[int, socket.socket] = {}
    interface = None
    try:
        while len(here) < size - 1:
            listener.settimeout(max(0.0, deadline - time.monotonic()) or 1e-3)
            try:
                caller, _ = listener.accept()
            except TimeoutError:
                missing = [other for other in range(1, size) if other not in here]
                raise Unreachable(_missing(missing, hosts=hosts, head=head, port=port, timeout=timeout)) from None
            caller.settimeout(ANSWER)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                told = json.loads(_line(caller))
                if told["name"] == name and 0 < told["rank"] < size:
                    caller.sendall(b"welcome\n")
                    if _line(caller) != b"here":  # it has given this call up, and makes another
                        caller.close()
                        continue
                    if told["host"] != socket.gethostname():
                        interface = interface_of(caller.getsockname()[0])
                    here[told["rank"]] = caller
                    continue
            caller.close()
    except Unreachable as failure:
        _tell(here, {"error": str(failure)})
        raise
    _tell(here, {"host": socket.gethostname(), "interface": interface})
    listener.settimeout(None)
    return Meeting(head, port, listener, interface)


def _listen(name: str, *, head: str, backlog: int) -> tuple[socket.socket, int]:
    refusals = []
    for port in candidates(name):
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True,
                                            backlog=backlog), port
            return socket.create_server(("", port), backlog=backlog), port
        except OSError as error:
            refusals.append(f"{port}: {error.strerror}")
    raise Unreachable(f"No port was free on {head} for the ranks to meet ({'; '.join(refusals)}).")


def _call(name: str, *, rank: int, head: str, timeout: float) -> Meeting:
    deadline, ports, last = time.monotonic() + timeout, candidates(name), ""
    while time.monotonic() < deadline:
        for port in ports:
            try:
                with socket.create_connection((head, port), timeout=ANSWER) as line:
                    hello = {"name": name, "rank": rank, "host": socket.gethostname()}
                    line.sendall(json.dumps(hello).encode() + b"\n")
                    if _line(line) != b"welcome":
                        last = f"port {port} is somebody else's"
                        continue
                    line.sendall(b"here\n")
                    line.settimeout(timeout + ANSWER)
                    told = json.loads(_line(line) or b'{"error": "rank 0 left before all ranks had come"}')
                    if "error" in told:
                        raise Unreachable(told["error"])
                    # On rank 0's own host its name may mean 127.x, which the other hosts don't reach.
                    return Meeting(head, port, None, told["interface"] if told["host"] == socket.gethostname() else
                                   interface_of(line.getsockname()[0]))
            except (OSError, ValueError) as error:
                if isinstance(error, Unreachable):
                    raise
                last = f"port {port}: {getattr(error, 'strerror', None) or error}"
        time.sleep(0.2)
    raise Unreachable(
        f"{socket.gethostname()} (rank {rank}) can't reach the head node {head}{_resolved(head)} on any of the ports "
        f"{', '.join(map(str, ports))} within {timeout:.0f} s (last: {last}). Compute nodes must reach each other by "
        "name; on a node that maps its own name to 127.x the others find nothing.")


def _missing(ranks: Sequence[int], *, hosts: Sequence[str], head: str, port: int, timeout: float) -> str:
    by_host: dict[str, list[str]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(str(rank))
    who = "; ".join(f"{host} (rank{'s' if len(them) > 1 else ''} {', '.join(them)})" for host, them in by_host.items())
    return (f"{who} didn't reach {head}:{port} within {timeout:.0f} s, all others did. Look at the log of these ranks, "
            "at the network between the hosts, and leave them out with --exclude.")


def _tell(callers: dict[int, socket.socket], word: dict[str, str | None]) -> None:
    for caller in callers.values():
        with contextlib.suppress(OSError), caller:
            caller.sendall(json.dumps(word).encode() + b"\n")


def _line(connection: socket.socket) -> bytes:
    """One line without its end; "" when the other side has left. Lines are short: longer ones are not ours."""
    text = b""
    while not text.endswith(b"\n") and len(text) < 4096:
        piece = connection.recv(1)
        if not piece:
            break
        text += piece
    return text.rstrip(b"\n")


def _resolved(host: str) -> str:
    try:
        return f" ({socket.getaddrinfo(host, None)[0][4][0]})"
    except OSError as error:
        return f" (a name that doesn't resolve here: {error.strerror})"


def interface_of(address: str) -> str | None:
    """Name of the network interface with this IPv4 address, such as eth0; None when there is none."""
    address = address.removeprefix("::ffff:")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                found = fcntl.ioctl(probe.fileno(), 0x8915, request)[20:24]  # SIOCGIFADDR of netdevice(7)
                if socket.inet_ntoa(found) == address:
                    return name
    return None


# --- taking the place ------------------------------------------------------------------------------------------------


def enter() -> None:
    """Takes the place that Slurm (or submitit's local executor) tells: torchrun's variables, for distributed.join.

    Meets the other tasks. Raises Unreachable when they don't find each other, UserError.
    """
    place = place_of(os.environ)
    if place is None:
        return
    print(whereabouts(place), flush=True)
    # Also for one alone: the shell that the job was submitted from may have been in a group of its own.
    os.environ |= {"RANK": str(place.rank), "WORLD_SIZE": str(place.size), "LOCAL_RANK": str(place.local_rank),
                   "LOCAL_WORLD_SIZE": str(place.local_size)}
    os.environ.pop("TORCHELASTIC_RUN_ID", None)
    if place.size == 1:
        return
    meeting = meet(place.name, rank=place.rank, size=place.size, head=place.hosts[0], hosts=place.host_of_rank)
    os.environ |= {"MASTER_ADDR": meeting.host, "MASTER_PORT": str(meeting.port)}
    if meeting.listener is not None:
        os.environ["ALEXNET_STORE_FD"] = str(meeting.listener.detach())
    if len(place.hosts) > 1 and meeting.interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", meeting.interface)


def whereabouts(place: Place) -> str:
    """One line a rank for its log: which cores and which GPUs it has."""
    cores = sorted(os.sched_getaffinity(0))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "all there are")
    return (f"alexnet-ddp: rank {place.rank} of {place.size} on {socket.gethostname()} (local rank "
            f"{place.local_rank} of {place.local_size}), {len(cores)} cores ({spans(cores)}), GPUs {gpus or 'none'}")


def spans(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as '0-2,5'."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
