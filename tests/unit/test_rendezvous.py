"""How ranks find each other: ports, impostors, late and missing ranks; on loopback, without torch."""

import json
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from launch import rendezvous
from launch.rendezvous import CANDIDATES, PORTS, Meeting, Unreachable, candidates, interface_of, meet

HEAD = "localhost"


def gather(name: str, *, size: int, timeout: float = 20.0, absent: tuple[int, ...] = (),
           late: float = 0.0) -> dict[int, Future[Meeting]]:
    """All ranks of a start meet in threads; rank 0 may come `late` seconds after the others."""
    def rank(number: int) -> Meeting:
        time.sleep(late if number == 0 else 0.0)
        hosts = [f"n{other // 2 + 1}" for other in range(size)]
        return meet(name, rank=number, size=size, head=HEAD, hosts=hosts, timeout=timeout)

    with ThreadPoolExecutor(size) as pool:
        return {number: pool.submit(rank, number) for number in range(size) if number not in absent}


def close(met: dict[int, Future[Meeting]]) -> None:
    listener = met[0].result().listener
    assert listener is not None
    listener.close()


def test_ports_are_of_job_and_restart() -> None:
    """The candidates depend on job and restart alone, differ between starts, and stay below the ephemeral range."""
    assert candidates("12.0") == candidates("12.0")
    assert candidates("12.0") != candidates("12.1")
    for name in ("12.0", "12.1", "13.0", "4294967295.99"):
        ports = candidates(name)
        assert len(set(ports)) == CANDIDATES
        assert all(port in PORTS for port in ports)
        assert 29500 not in ports


def test_all_meet() -> None:
    """Five ranks agree on rank 0's port, and its socket is still listening for torch's store."""
    met = gather("test.meet", size=5)
    ports = {future.result().port for future in met.values()}
    assert ports == {candidates("test.meet")[0]}
    assert [rank for rank, future in met.items() if future.result().listener is not None] == [0]
    with socket.create_connection((HEAD, ports.pop()), timeout=5):
        close(met)


def test_late_head() -> None:
    """Ranks that come before rank 0 wait for it."""
    close(gather("test.late", size=3, late=1.0))


def test_occupied_ports() -> None:
    """Ports taken by a silent program and by another job's ranks are passed over, by all ranks alike."""
    first, second = candidates("test.taken")[:2]
    stop = threading.Event()
    with socket.create_server(("", first)), socket.create_server(("", second)) as impostor:
        impostor.settimeout(0.1)

        def answer() -> None:
            while not stop.is_set():
                try:
                    caller, _ = impostor.accept()
                except TimeoutError:
                    continue
                with caller:
                    caller.sendall(b"220 mail.example.org ESMTP\n")

        thread = threading.Thread(target=answer)
        thread.start()
        rendezvous_answer, rendezvous.ANSWER = rendezvous.ANSWER, 0.5  # of the silent one
        try:
            met = gather("test.taken", size=3)
        finally:
            rendezvous.ANSWER = rendezvous_answer
            stop.set()
            thread.join()
    assert {future.result().port for future in met.values()} == {candidates("test.taken")[2]}
    close(met)


def test_ranks_of_another_start_are_turned_away() -> None:
    """A rank left over from the job's earlier start can't join the new one."""
    old = json.dumps({"name": "test.old", "rank": 1, "host": "n1"}).encode()

    def intrude() -> bytes:
        for _ in range(100):
            try:
                with socket.create_connection((HEAD, candidates("test.new")[0]), timeout=5) as line:
                    line.sendall(old + b"\n")
                    return line.recv(100)
            except ConnectionRefusedError:
                time.sleep(0.02)
        raise AssertionError("nobody listened")

    with ThreadPoolExecutor(3) as pool:
        head = pool.submit(meet, "test.new", rank=0, size=2, head=HEAD, hosts=["n1", "n1"], timeout=20.0)
        assert pool.submit(intrude).result() == b""
        pool.submit(meet, "test.new", rank=1, size=2, head=HEAD, hosts=["n1", "n1"], timeout=20.0).result()
        close({0: head})


def test_calls_that_were_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that call again, because a silent stranger keeps rank 0 busy, are met by the call that they still hold."""
    monkeypatch.setattr(rendezvous, "ANSWER", 0.5)
    port = candidates("test.busy")[0]

    def stranger() -> None:
        while True:
            try:
                with socket.create_connection((HEAD, port)) as line:
                    for _ in range(3):
                        line.sendall(b"?")
                        time.sleep(0.4)
                    return
            except ConnectionRefusedError:
                time.sleep(0.01)

    with ThreadPoolExecutor(4) as pool:
        pool.submit(stranger)
        ranks = {}
        for number in range(3):
            ranks[number] = pool.submit(meet, "test.busy", rank=number, size=3, head=HEAD, hosts=["n1"] * 3,
                                        timeout=6.0)
            time.sleep(0.1)  # the stranger is the first to call
        assert {future.result().port for future in ranks.values()} == {port}
    close(ranks)


def test_interface_of_the_heads_own_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank on the head node takes rank 0's interface, though its own name may mean 127.x there (Debian's hosts)."""
    hosts = {"rank-0": "n1", "rank-1": "n1", "rank-2": "n2"}

    def interface(_: str) -> str:
        return f"seen by {threading.current_thread().name}"

    monkeypatch.setattr(rendezvous, "interface_of", interface)
    monkeypatch.setattr(rendezvous.socket, "gethostname", lambda: hosts[threading.current_thread().name])
    met: dict[int, Meeting] = {}

    def rank(number: int) -> None:
        met[number] = meet("test.lo", rank=number, size=3, head=HEAD, hosts=["n1", "n1", "n2"], timeout=10.0)

    threads = [threading.Thread(target=rank, args=(number,), name=f"rank-{number}") for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [met[number].interface for number in range(3)] == ["seen by rank-0", "seen by rank-0", "seen by rank-2"]
    assert met[0].listener is not None
    met[0].listener.close()


def test_missing_ranks_are_named() -> None:
    """Ranks that don't come are named with their hosts, to rank 0 and to those that came, within the bound."""
    began = time.monotonic()
    met = gather("test.missing", size=6, absent=(2, 3, 5), timeout=1.5)
    assert time.monotonic() - began < 15
    for future in met.values():
        with pytest.raises(Unreachable, match=r"n2 \(ranks 2, 3\); n3 \(rank 5\) didn't reach localhost:\d+ within"):
            future.result()


def test_unreachable_head_is_named() -> None:
    """A head that doesn't answer is named by the rank that calls it, with its address, ports and the last error."""
    with pytest.raises(Unreachable, match=r"\(rank 1\) can't reach the head node localhost \(.+\) .*refused"):
        meet("test.nobody", rank=1, size=2, head=HEAD, hosts=["n1", "n1"], timeout=0.5)


def test_unknown_head_is_named() -> None:
    """A head whose name doesn't resolve on this host is told so."""
    with pytest.raises(Unreachable, match="a name that doesn't resolve here"):
        meet("test.unknown", rank=1, size=2, head="no-such-host.invalid", hosts=["n1", "n1"], timeout=0.5)


def test_variables_of_the_submitting_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task alone is a group of one, whatever the shell that submitted the job has exported of another group."""
    told = {"SLURM_JOB_ID": "12", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
            "SLURM_JOB_NODELIST": "n1", "SLURM_TASKS_PER_NODE": "1"}
    leaked = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "7"}
    environment = {**told, **leaked}
    monkeypatch.setattr(rendezvous.os, "environ", environment)
    rendezvous.enter()
    assert environment == {**told, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def test_interface() -> None:
    """The interface of an address is found, mapped IPv4 too; an address of nobody's has none."""
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("::ffff:127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None
