"""Crews of processes on this machine, for benchmarks."""

import multiprocessing
import queue
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any


class TookTooLong(Exception):
    """A crew was not done when the patience with it was over; its processes were ended."""


def spawned(work: Callable[..., None], size: int, *arguments: Any, patience: float) -> list[Any]:
    """What each of `size` processes found, in the order of ranks; all of them together get `patience` seconds.

    `work` is called in each as work(rank, *arguments, results), to put (rank, what it found) into results.

    Raises TookTooLong, and RuntimeError where a process ended without an answer.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=work, args=(rank, *arguments, results), daemon=True) for rank in range(size)]
    until = time.monotonic() + patience
    answers: dict[int, Any] = {}
    try:
        for worker in workers:
            worker.start()
        while len(answers) < size:
            try:
                rank, found = results.get(timeout=max(0.0, min(1.0, until - time.monotonic())))
                answers[rank] = found
            except queue.Empty:
                if time.monotonic() >= until:
                    raise TookTooLong(f"{size} processes were not done after {patience:.0f} s") from None
                if broken := [rank for rank, worker in enumerate(workers) if worker.exitcode]:
                    raise RuntimeError(f"processes {broken} of {size} failed") from None
        for worker in workers:
            worker.join(max(0.0, until - time.monotonic()))
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            worker.join()
    return [answers[rank] for rank in range(size)]


def step_seconds(records: list[dict[str, Any]]) -> list[float]:
    """Seconds from one training step of a run's metrics to the next."""
    times = [one["seconds"] for one in records if one["kind"] == "train"]
    return [after - before for before, after in pairwise(times)]
