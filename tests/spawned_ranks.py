"""Crews of real processes for tests: the same function on every worker, its results in the order of ranks."""

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from motley.parallel.communicator import Communicator, free_port

SERVER = multiprocessing.get_context("forkserver")  # PyTorch is imported once, not by every worker
SERVER.set_forkserver_preload(["torch", "torch.distributed", "motley.parallel.rank"])


def _begin(rank: int, size: int, port: int, work: Callable[..., Any], arguments: Sequence[Any], results: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        if size > 1:
            dist.init_process_group("gloo", rank=rank, world_size=size)
        result = work(Communicator(rank, size), *arguments)
        results.put((rank, None, pickle.dumps(result)))
        if size > 1 and dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc(), None))


def on_ranks(size: int, work: Callable[..., Any], *arguments: Any, seconds: float = 300) -> list[Any]:
    """`work(crew, *arguments)` of `size` workers. Raises AssertionError with the first worker's traceback."""
    results = SERVER.Queue()
    port = free_port()
    workers = [
        SERVER.Process(target=_begin, args=(rank, size, port, work, arguments, results), daemon=True)
        for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    found: list[Any] = [None] * size
    try:
        for _ in range(size):
            rank, error, result = results.get(timeout=seconds)
            assert error is None, f"worker {rank} of {size}:\n{error}"
            found[rank] = pickle.loads(result)
    finally:
        for worker in workers:
            worker.join(timeout=5)
            worker.kill()
    return found
