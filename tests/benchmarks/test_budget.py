"""Benchmarks do as much as there is time for, and what hangs is ended in time."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from budget import OUT_OF_TIME, RESERVED, Budget
from processes import TookTooLong, spawned

HERE = Path(__file__).parent
HANGS = f"""
import sys, threading, subprocess
sys.path.insert(0, {str(HERE.parents[1] / "benchmarks")!r})
from budget import Budget, kept
with kept(Budget(2.0), "this benchmark"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(child.pid, flush=True)
    threading.Event().wait()
"""


class FakeClock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def budget_of(seconds: float | None) -> tuple[Budget, FakeClock]:
    clock = FakeClock()
    return Budget(seconds, clock), clock


@pytest.mark.parametrize(("each", "expected"), [(1.0, 9), (2.0, 4), (4.0, 2), (8.0, 1), (80.0, 1)])
def test_slower_pieces_are_fewer(each: float, expected: int) -> None:
    budget, clock = budget_of(10.0)
    done = 0
    for _ in budget.turns(100):
        clock.seconds += each
        done += 1
    assert done == expected
    assert each > 9.0 or clock.seconds - 1000.0 <= (1 - RESERVED) * 10.0


def test_a_piece_as_long_as_the_longest_so_far_must_fit() -> None:
    budget, clock = budget_of(10.0)
    taken = []
    for seconds in budget.each([1.0, 4.0, 3.0, 1.0, 1.0]):
        clock.seconds += seconds
        taken.append(seconds)
    assert taken == [1.0, 4.0, 3.0]


def test_the_least_is_done_whatever_it_takes() -> None:
    budget, clock = budget_of(1.0)
    for _ in budget.turns(5, least=2):
        clock.seconds += 10.0
    assert clock.seconds == 1020.0


def test_without_a_promise_everything_is_done() -> None:
    budget, clock = budget_of(None)
    for _ in budget.turns(7):
        clock.seconds += 1e6
    assert clock.seconds == 7e6 + 1000.0
    assert budget.patience(30.0) == 30.0


def test_patience_is_what_is_left() -> None:
    budget, clock = budget_of(100.0)
    clock.seconds += 70.0
    assert budget.patience(1800.0) == pytest.approx(20.0)
    clock.seconds += 70.0
    assert budget.patience(1800.0) == 0.0
    assert not budget.allows(0.1)


def test_a_benchmark_that_hangs_ends_with_a_sentence_and_with_what_it_started() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60)
    assert done.returncode == OUT_OF_TIME
    assert "not done within the 2 s that --quick promises" in done.stderr
    child = Path(f"/proc/{int(done.stdout)}/status")
    until = time.monotonic() + 20
    while child.exists() and "Z (zombie)" not in child.read_text():  # the kernel takes a moment on a busy machine
        assert time.monotonic() < until, "what it started still runs"
        time.sleep(0.05)


def sleep(rank: int, seconds: list[float], results: Any) -> None:
    time.sleep(seconds[rank])
    results.put((rank, seconds[rank]))


def fail(rank: int, results: Any) -> None:
    raise SystemExit(7)


def test_a_crew_that_takes_too_long_is_ended() -> None:
    with pytest.raises(TookTooLong, match="2 processes were not done after 3 s"):
        spawned(sleep, 2, [0.0, 600.0], patience=3.0)


def test_a_crew_whose_process_fails_says_so_at_once() -> None:
    with pytest.raises(RuntimeError, match=r"processes \[0\] of 1 failed"):
        spawned(fail, 1, patience=600.0)
