"""Measuring time and memory. No test compares durations: they would fail on a busy machine."""

import gc
from collections.abc import Callable

import pytest
import torch

from alexnet_ddp.trained import timing

CPU = torch.device("cpu")


def test_a_timing_is_the_median_of_rounds() -> None:
    """One slow call in a round moves nothing, one slow round moves the spread alone."""
    found = timing.Timing.of([[1.0, 1.0, 9.0], [2.0, 2.0], [30.0, 30.0]])
    assert found == timing.Timing(median=2.0, low=1.0, high=30.0, n=3, calls=7)


@pytest.mark.parametrize(("value", "told"), [(0.01234, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"),
                                             (12345.6, "12,346"), (0.0, "0")])
def test_figures_are_short(value: float, told: str) -> None:
    """About three digits, never an exponent."""
    assert timing.short(value) == told


def test_timings_for_people() -> None:
    """Milliseconds and rates: of a rate the slowest round comes first, as its least."""
    found = timing.Timing(median=0.02, low=0.01, high=0.04, n=5, calls=9)
    assert found.milliseconds == "20.0 (10.0 to 40.0)"
    assert found.rate(8) == "400 (200 to 800)"


def test_latencies_take_turns() -> None:
    """After the warm-up every round calls each net on its own inputs, one net after the other, without gradients."""
    heard: list[tuple[str, int, bool]] = []

    def net(name: str) -> Callable[[torch.Tensor], None]:
        return lambda batch: heard.append((name, len(batch), torch.is_grad_enabled()))

    found = timing.latencies([net("a"), net("b")], [torch.zeros(1), torch.zeros(2)], seconds=0.0, rounds=3)
    a, b = ("a", 1, False), ("b", 2, False)
    assert heard == [a] * timing.WARM_CALLS + [b] * timing.WARM_CALLS + [a, b] * 3
    assert [each.n for each in found] == [3, 3] and [each.calls for each in found] == [3, 3]


def test_timed_calls_enough() -> None:
    """At least the calls that are asked for, each with its own duration; the garbage collector is back afterwards."""
    seen: list[bool] = []
    taken = timing.timed(lambda: seen.append(gc.isenabled()), device=CPU, seconds=0.0, calls=4)
    assert len(taken) == 4 and min(taken) >= 0 and seen == [False] * 4 and gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        timing.timed(lambda: 1 // 0, device=CPU, seconds=0.0)
    assert gc.isenabled()


def test_peak_sees_what_is_gone_again() -> None:
    """80 MB that were touched and freed are in the peak, not in what is held; the next peak starts without them."""
    before = timing.held(CPU)
    timing.start_peak(CPU)
    big = torch.ones(20_000_000)
    del big
    assert timing.peak(CPU) - before > 75_000_000
    assert timing.held(CPU) - before < 75_000_000
    timing.start_peak(CPU)
    assert timing.peak(CPU) - before < 75_000_000


def test_the_machine_is_named() -> None:
    """Processor, threads and versions are in the line below a table."""
    line = timing.machine_line(timing.machine(CPU))
    assert str(torch.__version__) in line and f"{torch.get_num_threads()} threads (" in line
