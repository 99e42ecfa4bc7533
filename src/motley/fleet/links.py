"""Links between the ranks of a job, measured: latency, pairs, and the collectives that training uses.

    pairs         a tiny message there and back (latency), a large one (bandwidth)
      inside      each host's first rank ↔ its second, then its third, ...: all hosts at the same time
      outside     rank 0 ↔ the first rank of each other host, in turn
    collectives   all ranks at growing sizes: all-reduce (gradients), all-gather and reduce-scatter (shards),
                  all-to-all (experts)

Messages are in the accelerators' memory where every rank has an accelerator of its own, else on the host.
Run under torchrun; rank 0 gathers the measurements of all ranks and writes one fleet file.
"""

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from motley.fleet.probe import Machine, best_device, wait_for

PING_BYTES, BULK_BYTES = 8, 16 * 2**20
COLLECTIVE_BYTES = (2**16, 2**20, 2**24)
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
ROUNDS = 5
MOST_HOSTS = 64  # paired with rank 0, so that a large job is measured in seconds too


@dataclass(frozen=True)
class PairRate:
    """Between two ranks: seconds one way for a tiny message, bytes/s for a large one."""

    one: int
    other: int
    latency_seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class CollectiveRate:
    """One collective over all ranks: `message_bytes` per rank (of all its shards) took `seconds`."""

    name: str
    message_bytes: int
    seconds: float


@dataclass(frozen=True)
class Links:
    """All links of a job that were measured."""

    hosts: tuple[str, ...]
    pairs: tuple[PairRate, ...]
    collectives: tuple[CollectiveRate, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def slowest(self, ranks: Sequence[int], same_host: bool) -> tuple[float, float] | None:
        """Least bytes/s and greatest latency measured among the pairs of `ranks` that share a host, or do not."""
        found = [
            pair
            for pair in self.pairs
            if pair.one in ranks
            and pair.other in ranks
            and (self.hosts[pair.one] == self.hosts[pair.other]) == same_host
        ]
        if not found:
            return None
        return min(pair.bytes_per_second for pair in found), max(pair.latency_seconds for pair in found)


def under_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def measure_together(measure: Callable[[], Machine]) -> tuple[list[Machine], Links] | None:
    """Every rank measures itself, all at the same time as in training; then the links. Only rank 0 gets the result."""
    device = _own_device()
    backend = (
        "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    )
    dist.init_process_group(backend)
    try:
        rank = dist.get_rank()
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (measure().to_dict(), socket.gethostname()))
        links = links_between([host for _, host in gathered], device)
        collectives = [
            CollectiveRate(name, size, _collective(name, size, device))
            for name in COLLECTIVES
            for size in COLLECTIVE_BYTES
        ]
        if rank != 0:
            return None
        machines = [Machine.from_dict(value) for value, _ in gathered]
        return machines, replace(links, collectives=tuple(collectives))
    finally:
        dist.destroy_process_group()


def links_between(hosts: Sequence[str], device: torch.device) -> Links:
    """Measure pairs of ranks of an initialized process group; every rank calls this with the host of each and gets all.

    device: of the messages.
    """
    own = [_pair(dist.get_rank(), together, device) for together in pair_rounds(hosts)]
    pairs: list[Any] = [None] * len(hosts)
    dist.all_gather_object(pairs, [pair for pair in own if pair is not None])
    return Links(tuple(hosts), tuple(pair for some in pairs for pair in some), ())


def _own_device() -> torch.device:
    """This rank's own accelerator, made the current one; the CPU where ranks of a host would have to share one."""
    device = best_device()
    if device.type == "cpu" or torch.accelerator.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    torch.accelerator.set_device_index(index)
    return torch.device(device.type, index)


def pair_rounds(hosts: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Pairs of ranks to measure, round after round; those of one round at the same time."""
    ranks: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks.setdefault(host, []).append(rank)
    most = max(map(len, ranks.values()))
    inside = [[(own[0], own[turn]) for own in ranks.values() if turn < len(own)] for turn in range(1, most)]
    firsts = [own[0] for own in ranks.values()]
    return inside + [[(firsts[0], other)] for other in firsts[1 : MOST_HOSTS + 1]]


def _pair(rank: int, together: Sequence[tuple[int, int]], device: torch.device) -> PairRate | None:
    """Ping-pong between the two ranks of each pair; other ranks wait. The first of a pair returns its rate."""
    result = None
    for one, other in together:
        if rank in (one, other):
            peer = other if rank == one else one
            ping = _ping_pong(rank == one, peer, PING_BYTES, device)
            bulk = _ping_pong(rank == one, peer, BULK_BYTES, device)
            if rank == one:
                result = PairRate(one, other, ping / 2, BULK_BYTES / max(bulk / 2 - ping / 2, 1e-9))
    _barrier()
    return result


def _ping_pong(first: bool, peer: int, size: int, device: torch.device) -> float:
    message = torch.zeros(size, dtype=torch.uint8, device=device)

    def exchange() -> None:
        if first:
            dist.send(message, peer)
            dist.recv(message, peer)
        else:
            dist.recv(message, peer)
            dist.send(message, peer)

    return _median_seconds(exchange, device, barrier=False)


def _collective(name: str, size: int, device: torch.device) -> float:
    """Seconds of a collective with `size` bytes per rank, rounded up to equal parts."""
    world = dist.get_world_size()
    part = -(-size // (4 * world))
    whole = torch.zeros(part * world, device=device)
    piece = torch.zeros(part, device=device)
    actions: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, piece),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(piece, whole),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(whole), whole),
    }
    return _median_seconds(actions[name], device, barrier=True)


def _median_seconds(action: Callable[[], Any], device: torch.device, barrier: bool) -> float:
    """Of `ROUNDS` runs; one more before them opens the connections. `barrier`: all ranks begin each run together."""
    taken = []
    for _ in range(ROUNDS + 1):
        if barrier:
            _barrier()
        started = time.perf_counter()
        action()
        wait_for(device)
        taken.append(time.perf_counter() - started)
    return sorted(taken[1:])[ROUNDS // 2]


def _barrier() -> None:
    """All ranks wait for each other, over gloo."""
    dist.all_reduce(torch.zeros(1))
