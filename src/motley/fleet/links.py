"""Links between the ranks of a job, measured: latency, pairs, and the collectives that training uses.

    pairs       rank 0 ↔ r, in turn: a tiny message there and back (latency), a large one (bandwidth)
    collectives all ranks: all-reduce and all-gather at growing sizes

Run under torchrun; rank 0 gathers what every rank measured of itself and writes one fleet file.
"""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from motley.fleet.probe import Machine

PING_BYTES, BULK_BYTES = 8, 16 * 2**20
COLLECTIVE_BYTES = (2**16, 2**20, 2**24)
ROUNDS = 5


@dataclass(frozen=True)
class PairRate:
    """Between two ranks: seconds one way for a tiny message, bytes/s for a large one."""

    one: int
    other: int
    latency_seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class CollectiveRate:
    """One collective over all ranks: `message_bytes` per rank took `seconds`."""

    name: str
    message_bytes: int
    seconds: float


@dataclass(frozen=True)
class Links:
    """What rank 0 knows of all links of a job."""

    hosts: tuple[str, ...]
    pairs: tuple[PairRate, ...]
    collectives: tuple[CollectiveRate, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def under_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def measure_together(measure: Callable[[], Machine]) -> tuple[list[Machine], Links] | None:
    """Every rank measures itself, all at the same time as in training; then the links. Only rank 0 gets the result."""
    dist.init_process_group("gloo")
    try:
        rank, world = dist.get_rank(), dist.get_world_size()
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, (measure().to_dict(), socket.gethostname()))
        hosts = [host for _, host in gathered]
        pairs = [_pair(rank, 0, other) for other in _worth_measuring(hosts)]
        collectives = [
            CollectiveRate(name, size, _collective(name, size))
            for name in ("all_reduce", "all_gather")
            for size in COLLECTIVE_BYTES
        ]
        if rank != 0:
            return None
        machines = [Machine.from_dict(value) for value, _ in gathered]
        known = tuple(pair for pair in pairs if pair is not None)
        return machines, Links(tuple(hosts), known, tuple(collectives))
    finally:
        dist.destroy_process_group()


def _worth_measuring(hosts: list[str]) -> list[int]:
    """Ranks to pair with rank 0: all of its own host, and the first of each other one."""
    firsts = {host: rank for rank, host in reversed(list(enumerate(hosts)))}
    return [rank for rank in range(1, len(hosts)) if hosts[rank] == hosts[0] or firsts[hosts[rank]] == rank]


def _pair(rank: int, one: int, other: int) -> PairRate | None:
    """There and back between two ranks; the others wait."""
    result = None
    if rank in (one, other):
        peer = other if rank == one else one
        ping = _there_and_back(rank == one, peer, PING_BYTES)
        bulk = _there_and_back(rank == one, peer, BULK_BYTES)
        result = PairRate(one, other, ping / 2, BULK_BYTES / max(bulk / 2 - ping / 2, 1e-9))
    dist.barrier()
    return result if rank == one else None


def _there_and_back(first: bool, peer: int, size: int) -> float:
    message = torch.zeros(size, dtype=torch.uint8)
    taken = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        if first:
            dist.send(message, peer)
            dist.recv(message, peer)
        else:
            dist.recv(message, peer)
            dist.send(message, peer)
        taken.append(time.perf_counter() - started)
    return sorted(taken[1:])[ROUNDS // 2]  # the first opens the connection


def _collective(name: str, size: int) -> float:
    message = torch.zeros(size // 4)
    parts = [torch.empty_like(message) for _ in range(dist.get_world_size())]
    taken = []
    for _ in range(ROUNDS + 1):
        dist.barrier()
        started = time.perf_counter()
        if name == "all_reduce":
            dist.all_reduce(message)
        else:
            dist.all_gather(parts, message)
        taken.append(time.perf_counter() - started)
    return sorted(taken[1:])[ROUNDS // 2]
