"""Crews of processes on this machine, for benchmarks."""

import multiprocessing
from collections.abc import Callable
from itertools import pairwise
from typing import Any


def spawned(work: Callable[..., None], size: int, *arguments: Any, patience: float) -> list[Any]:
    """What each of `size` processes found, in the order of ranks; each gets `patience` seconds.

    `work` is called in each as work(rank, *arguments, results), to put (rank, what it found) into results.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=work, args=(rank, *arguments, results)) for rank in range(size)]
    for worker in workers:
        worker.start()
    answers = dict(results.get(timeout=patience) for _ in workers)
    for worker in workers:
        worker.join()
    return [answers[rank] for rank in range(size)]


def step_seconds(records: list[dict[str, Any]]) -> list[float]:
    """Seconds from one training step of a run's metrics to the next."""
    times = [one["seconds"] for one in records if one["kind"] == "train"]
    return [after - before for before, after in pairwise(times)]
