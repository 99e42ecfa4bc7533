"""Processes for tests, forked from a server that has imported PyTorch: nobody waits for an interpreter to start.

on_crew(3, work, ...)      the same function on every rank; its results in the order of ranks
start(words), run(words)   one of our commands, as subprocess.Popen and subprocess.run would have it
start_ranks(2, words)      the same command on every rank of a job, with the variables that torchrun sets
"""

import atexit
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from motley.parallel.communicator import Communicator, free_port

SERVER = multiprocessing.get_context("forkserver")
# Dynamo: PyTorch imports it (2 s) where the weights of a model are first made on the meta device.
SERVER.set_forkserver_preload(
    [
        "torch",
        "torch.distributed",
        "torch._dynamo",
        "tyro",
        "motley.cli",
        "motley.data.command",
        "motley.train.pretrain",
        "motley.train.sft",
        "motley.parallel.run",
        "motley.parallel.auto_plan",
    ]
)


def exit_with_parent() -> None:
    """Exit when the process that runs the tests does, however it ends: a rank may wait for it for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _begin(rank: int, size: int, port: int, work: Callable[..., Any], arguments: Sequence[Any], results: Any) -> None:
    exit_with_parent()
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


# ---------------------------------------------------------------------------------------------------- our commands

MOTLEY = [sys.executable, "-m", "motley"]


def _command(
    out: Connection,
    err: Connection,
    arguments: list[str],
    environment: dict[str, str],
    cwd: Path,
    before: Callable[[], None] | None,
) -> None:
    gc.freeze()
    exit_with_parent()
    for stream, to in ((out, 1), (err, 2)):
        os.dup2(stream.fileno(), to)
        stream.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background may have to ignore it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(1)
    from motley.cli import main

    sys.argv = ["motley", *arguments]
    if before is not None:
        before()
    try:
        sys.exit(main())
    finally:
        atexit._run_exitfuncs()


class Started:
    """A command of ours in a process of its own, with the methods of subprocess.Popen that tests use."""

    def __init__(
        self,
        words: Sequence[str],
        environment: dict[str, str] | None = None,
        cwd: Path | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        assert list(words[:3]) == MOTLEY, words
        self.args = list(words)
        self._said: tuple[list[bytes], list[bytes]] = ([], [])
        pipes = [SERVER.Pipe(duplex=False) for _ in self._said]
        self._process = SERVER.Process(
            target=_command,
            args=(*(end for _, end in pipes), self.args[3:], {**os.environ, **(environment or {})}, cwd or Path.cwd(),
                  before),
            daemon=True,
        )  # fmt: skip
        self._process.start()
        self._readers = []
        for (mine, theirs), said in zip(pipes, self._said, strict=True):
            theirs.close()
            self._readers.append(threading.Thread(target=self._read, args=(mine, said), daemon=True))
            self._readers[-1].start()

    @staticmethod
    def _read(pipe: Connection, said: list[bytes]) -> None:
        with pipe:
            while piece := os.read(pipe.fileno(), 1 << 16):
                said.append(piece)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    @property
    def said(self) -> tuple[str, str]:
        """(standard output, standard error) so far."""
        out, err = (b"".join(pieces).decode(errors="replace") for pieces in self._said)
        return out, err

    def first_line(self, timeout: float = 90) -> str:
        """Of standard output, once it is there; empty if the process exits without one."""
        deadline = time.monotonic() + timeout
        while "\n" not in self.said[0] and self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.said[0].partition("\n")[0]

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, how: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, how)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 240) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout, *self.said)
        return self.returncode

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        self.wait(timeout)
        for reader in self._readers:
            reader.join(timeout)
        return self.said


def start(words: Sequence[str], **how: Any) -> Started:
    return Started(words, **how)


def run(words: Sequence[str], timeout: float = 240, **how: Any) -> subprocess.CompletedProcess[str]:
    process = start(words, **how)
    out, err = process.communicate(timeout)
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


class StartedRanks:
    """A command of ours on every rank of a job. A rank that fails is nobody's business but the others': no launcher
    ends them."""

    def __init__(self, size: int, words: Sequence[str], **how: Any) -> None:
        own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
        own |= {"LOCAL_WORLD_SIZE": str(size)} | how.pop("environment", {})
        self.ranks = [
            start(words, environment=own | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **how) for rank in range(size)
        ]

    @property
    def returncode(self) -> int | None:
        """Of the first rank that failed, or 0; None while one of them works."""
        codes = [rank.returncode for rank in self.ranks]
        return None if None in codes else next((code for code in codes if code), 0)

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, how: int) -> None:
        for rank in self.ranks:
            rank.send_signal(how)

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        deadline = time.monotonic() + timeout
        try:
            said = [rank.communicate(max(0.0, deadline - time.monotonic())) for rank in self.ranks]
        finally:
            self.send_signal(signal.SIGKILL)  # if one did not end in time
        return "".join(out for out, _ in said), "".join(err for _, err in said)


def start_ranks(size: int, words: Sequence[str], **how: Any) -> StartedRanks:
    return StartedRanks(size, words, **how)


def run_ranks(size: int, words: Sequence[str], timeout: float = 240, **how: Any) -> subprocess.CompletedProcess[str]:
    job = start_ranks(size, words, **how)
    out, err = job.communicate(timeout)
    assert job.returncode is not None
    return subprocess.CompletedProcess(list(words), job.returncode, out, err)
