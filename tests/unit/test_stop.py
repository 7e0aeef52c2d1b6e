"""Stop requests: the handler sets a flag only, the STOP file is looked for once a second, the deadline leaves room."""

import ast
import contextlib
import inspect
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import harness
from alexnet_ddp import stop
from alexnet_ddp.errors import EXIT_INTERRUPTED
from alexnet_ddp.stop import CAUSES, SIGNALS, STOP_FILE, StopRequests, deadline_from, lead_time

LISTENER = """
import os, signal, sys, time
from alexnet_ddp.stop import StopRequests
exec(sys.argv[1])
requests = StopRequests()
os.write(1, b"begun\\n")
os.read(0, 1)
requests.install()
os.write(1, b"installed\\n")
while not requests.cause():
    time.sleep(0.002)
os.write(1, requests.cause().encode() + b"\\n")
os.read(0, 1)  # stands in for a collective that may never end
os.write(1, requests.cause().encode() + b"\\n")
"""


class Listener:
    """A process that runs `before`, installs the handlers when told to, says the cause, and says it again when told."""

    def __init__(self, before: str) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", LISTENER, before], bufsize=0,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=harness.listen)
        assert self.line() == "begun"

    def line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().decode().strip()

    def go_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"x")

    def install(self) -> None:
        self.go_on()
        assert self.line() == "installed"

    def send(self, name: str) -> None:
        self._process.send_signal(getattr(signal, f"SIG{name}"))

    def wait(self) -> int:
        return self._process.wait(30)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def listener(before: str = "") -> Iterator[Listener]:
    with contextlib.closing(Listener(before)) as process:
        yield process


def test_the_handler_sets_a_flag_and_nothing_else() -> None:
    """The signal handler is one assignment to self.signal, whose only call names the signal: no I/O, lock or torch."""
    function = ast.parse(textwrap.dedent(inspect.getsource(StopRequests._handle))).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert all(isinstance(line, ast.Assign | ast.AugAssign) for line in function.body)
    targets = [ast.unparse(target) for line in function.body if isinstance(line, ast.Assign) for target in line.targets]
    calls = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
    assert targets == ["self.signal"]
    assert calls <= {"signal.Signals"}


@pytest.mark.parametrize("name", SIGNALS)
def test_each_signal_is_a_cause(name: str) -> None:
    """Each of the five signals, really sent, becomes the cause; the first one stays it whatever comes after."""
    with listener() as process:
        process.install()
        process.send(name)
        assert process.line() == name
        process.send("USR1" if name != "USR1" else "USR2")
        process.go_on()
        assert process.line() == name
        assert process.wait() == 0
    assert name in CAUSES


def test_blocked_signals_are_delivered_at_install() -> None:
    """A signal that came while it was blocked (from the shell on, during imports) isn't lost: it is a request."""
    with listener("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])") as process:
        process.send("USR1")
        process.install()
        assert process.line() == "USR1"


def test_nohup_stays() -> None:
    """An ignored HUP stays ignored, as nohup wants it: the cause is what comes after it."""
    with listener("signal.signal(signal.SIGHUP, signal.SIG_IGN)") as process:
        process.install()
        process.send("HUP")
        process.send("TERM")
        assert process.line() == "TERM"


def test_second_interrupt_quits() -> None:
    """The first Ctrl-C is a request; the second leaves at once with 130, also while the main thread is stuck."""
    with listener() as process:
        process.install()
        process.send("INT")
        assert process.line() == "INT"
        process.send("INT")
        assert process.wait() == EXIT_INTERRUPTED


def test_stop_file_at_most_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often asked, the file is looked for once a second, and found within one."""
    now, looks = [100.0], [0]
    exists = Path.exists

    def counted(path: Path) -> bool:
        looks[0] += path.name == STOP_FILE
        return exists(path)

    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Path, "exists", counted)
    requests = StopRequests()
    for _ in range(1000):  # ten seconds of steps
        assert requests.cause(run_dir=tmp_path) == ""
        now[0] += 0.01
    assert looks[0] <= 11
    (tmp_path / STOP_FILE).touch()
    now[0] += 1.0
    assert requests.cause(run_dir=tmp_path) == "STOP file"
    looks[0] = 0
    for _ in range(100):
        requests.cause()  # other ranks don't look
    assert looks[0] == 0


def test_deadline_leaves_the_lead() -> None:
    """The deadline is a cause from `lead` seconds before it on, not before; a signal comes first."""
    requests = StopRequests()
    assert requests.cause(seconds_left=10.1, lead=10.0) == ""
    assert requests.cause(seconds_left=10.0, lead=10.0) == "deadline"
    assert requests.cause(seconds_left=-5.0) == "deadline"
    assert requests.cause(seconds_left=None, lead=1e9) == ""
    requests.signal = "TERM"
    assert requests.cause(seconds_left=0.0) == "TERM"


def test_lead_grows_with_steps_and_saves() -> None:
    """Two steps to agree and a save fit into the lead, with margin."""
    for step, save in ((0.0, 0.0), (0.1, 1.0), (30.0, 60.0)):
        assert lead_time(step=step, save=save) > 2 * step + save
    assert lead_time(step=1.0, save=2.0) > lead_time(step=1.0, save=1.0)


@pytest.mark.parametrize(("limit", "slurm", "expected"), [
    (None, None, None), (60.0, None, 1060.0), (None, "1500", 1500.0), (60.0, "1500", 1060.0), (600.0, "1500", 1500.0),
    (None, "", None), (None, "soon", None),
])
def test_the_earlier_deadline_holds(limit: float | None, slurm: str | None, expected: float | None) -> None:
    """Of the recipe's limit and Slurm's end time the earlier one holds; nonsense in the environment is no deadline."""
    environment = {} if slurm is None else {"SLURM_JOB_END_TIME": slurm}
    assert deadline_from(limit=limit, started=1000.0, environment=environment) == expected


def test_causes_travel_as_numbers() -> None:
    """A cause is sent between ranks as its place in a fixed list that begins with none."""
    assert CAUSES[0] == ""
    assert len(set(CAUSES)) == len(CAUSES)
    assert {"STOP file", "deadline", *SIGNALS} < set(CAUSES)
