"""Who holds which shard of the model, and who owns it: pure functions of the layout, the same on every rank.

    shard      a parameter, or some experts of a stack, or some rows of a vocabulary table
    holders    the ranks that compute with it: one of every replica (of every group of replicas that share experts)
    owner      the holder that keeps and updates what is kept once: all are done at the same time, within their memory

    ZeRO       0         1         2         3
    weights    holders   holders   holders   owner
    gradients  holders   holders   owner     owner
    optimizer  holders   owner     owner     owner

Muon needs whole matrices, so shards are never finer than a matrix; the split is as even as that allows.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import torch

from motley.model import ModelConfig, Transformer
from motley.parallel.layout import Layout, PipelineGroup, Zero, coordinates_of
from motley.train.optimizer import ITERATIONS, MOMENTS, Moments, OptimizerName, as_matrices, by_muon
from motley.train.step import is_trained

NUMBER_BYTES = 4
ELEMENTWISE = 400
"""What one number costs an optimizer besides matrix products, as floating-point operations that take as long: some 35
bytes to and fro, on a core with 10 GB/s and 100 GFLOP/s. GPUs compute some ten times as much a byte: there it is too
little, but little beside the products of wide matrices."""
TABLE_PARTS = 16  # a vocabulary table is cut into so many shards: AdamW updates number by number
BISECTIONS = 12  # of the time that updates may take: to a four-thousandth of what the slowest would need for all
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class ParameterShard:
    """Rows `start` to `stop` of the first dimension of parameter `name`, as a tensor of `shape`."""

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]
    holders: tuple[int, ...]
    owner: int
    whole: bool

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def label(self) -> str:
        """Its name among optimizer states; ends with the parameter's."""
        return self.name if self.whole else f"{self.start}:{self.stop}|{self.name}"


def shards_of(config: ModelConfig, layout: Layout, optimizer: OptimizerName) -> tuple[ParameterShard, ...]:
    """All shards of the model in the order of its parameters, the same on every rank."""
    return _owned_parts(config, _any_batch(layout), optimizer)


def cut_shards(config: ModelConfig, layout: Layout) -> tuple[ParameterShard, ...]:
    """The same before anyone owns them (owner -1): whatever rates and memory the layout has."""
    return _cut_parts(config, replace(_any_batch(layout), rates=(), memory=()))


def _any_batch(layout: Layout) -> Layout:
    """The layout without what shards do not depend on, so that a start, which changes that, builds them once."""
    return replace(layout, groups=tuple(replace(group, micro_batch=1) for group in layout.groups))


@lru_cache(maxsize=2)  # a start asks for each rank of a layout; a large model has tens of thousands of shards
def _owned_parts(config: ModelConfig, layout: Layout, optimizer: OptimizerName) -> tuple[ParameterShard, ...]:
    found = cut_shards(config, layout)
    owners = _owners(found, layout, optimizer)
    return tuple(replace(part, owner=owner) for part, owner in zip(found, owners, strict=True))


@lru_cache(maxsize=2)
def _cut_parts(config: ModelConfig, layout: Layout) -> tuple[ParameterShard, ...]:
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in Transformer(config).named_parameters()}
    found: list[ParameterShard] = []
    for name, shape in shapes.items():
        bounds = _bounds(name, shape[0], layout)
        for start, stop in pairwise(bounds):
            holders = tuple(sorted(_holders(name, start, config, layout)))
            found.append(ParameterShard(name, start, stop, (stop - start, *shape[1:]), holders, -1, len(bounds) == 2))
    return tuple(found)


Kind = Literal["weights", "gradients", "optimizer"]
ALONE_FROM: dict[Kind, Zero] = {
    "optimizer": 1,
    "gradients": 2,
    "weights": 3,
}  # ZeRO level; below it all holders keep it


def kept(parts: Iterable[ParameterShard], kind: Kind, zero: Zero, rank: int) -> list[ParameterShard]:
    """The shards of which `rank` keeps something from step to step."""
    return [p for p in parts if (p.owner == rank if zero >= ALONE_FROM[kind] else rank in p.holders)]


def unit_of(name: str) -> str:
    """The module that a tensor belongs to: the embedding, a block, the last norm, the head, an MTP module."""
    names = name.split(".")
    return ".".join(names[: 3 if name.startswith("model.layers.") else min(2, len(names) - 1)])


@dataclass(frozen=True)
class HeldBytes:
    """What one rank keeps from step to step, in bytes; activations, and ZeRO's messages, come on top."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def bytes_kept_once(part: ParameterShard, layout: Layout, optimizer: OptimizerName) -> int:
    """What a shard's owner keeps for all its holders; moments count as fp32, so that owners do not depend on them."""
    states = 1 if by_muon(optimizer, part.name, len(part.shape)) else 2
    numbers = states * (layout.zero >= 1) + (layout.zero >= 2) + (layout.zero >= 3)
    return NUMBER_BYTES * part.numbers * numbers


def bytes_kept_anyway(parts: Iterable[ParameterShard], zero: Zero, rank: int, mtp: bool) -> int:
    """What `rank` keeps of what it computes with, whoever owns it: weights below ZeRO 3, gradients below 2."""
    held = [part for part in parts if rank in part.holders]
    weights = sum(part.numbers for part in held) if zero < ALONE_FROM["weights"] else 0
    gradients = sum(p.numbers for p in held if is_trained(p.name, mtp)) if zero < ALONE_FROM["gradients"] else 0
    return NUMBER_BYTES * (weights + gradients)


def held_bytes(
    config: ModelConfig,
    layout: Layout,
    rank: int,
    optimizer: OptimizerName,
    mtp: bool = True,
    moments: Moments = "fp32",
) -> HeldBytes:
    """What `rank` of a layout keeps, all but moments in fp32 (the routers' biases, a few numbers, left out)."""
    parts = shards_of(config, layout, optimizer)
    learning = [part for part in parts if is_trained(part.name, mtp)]
    states = counters = 0
    for part in kept(parts, "optimizer", layout.zero, rank):
        if by_muon(optimizer, part.name, len(part.shape)):
            states += part.numbers
        elif is_trained(part.name, mtp):
            states += 2 * part.numbers
            counters += 1  # AdamW counts its steps
    weights = sum(part.numbers for part in kept(parts, "weights", layout.zero, rank))
    gradients = sum(part.numbers for part in kept(learning, "gradients", layout.zero, rank))
    optimizer_bytes = MOMENTS[moments].itemsize * states + NUMBER_BYTES * counters
    return HeldBytes(NUMBER_BYTES * weights, NUMBER_BYTES * gradients, optimizer_bytes)


def _bounds(name: str, rows: int, layout: Layout) -> list[int]:
    """Where a parameter's first dimension is cut."""
    sharded = layout.zero and layout.workers > 1
    if ".mlp.experts." in name:
        if sharded:
            return list(range(rows + 1))
        spread = {0, rows}
        for group in layout.groups:
            spread |= {group.expert_range(replica, rows).start for replica in range(group.expert_replicas)}
        return sorted(spread)
    if name in TABLES and sharded:
        count = min(TABLE_PARTS, rows)
        return [rows * part // count for part in range(count + 1)]
    return [0, rows]


def _holders(name: str, row: int, config: ModelConfig, layout: Layout) -> Iterator[int]:
    for group in layout.groups:
        for stage in _stages(name, config, group):
            for replica, ranks in enumerate(group.replicas):
                if ".mlp.experts." not in name or row in group.expert_range(replica, config.n_routed_experts or 0):
                    yield ranks[stage]


def _stages(name: str, config: ModelConfig, group: PipelineGroup) -> set[int]:
    """Stages of a pipeline group that compute with a parameter."""
    last = group.stages - 1
    if name == "model.embed_tokens.weight":
        return {0, last} if config.num_nextn_predict_layers or config.tie_word_embeddings else {0}
    if name.startswith("model.layers."):
        return {group.stage_of(int(name.split(".")[2]))}
    return {last}


def _owners(parts: Sequence[ParameterShard], layout: Layout, optimizer: OptimizerName) -> list[int]:
    """One holder for each shard, so that all are done with their updates as early as their memory allows.

    Where there is not enough memory for all, what each keeps is in proportion to what it has.
    """
    work = [update_work(part, optimizer) for part in parts]
    size = [bytes_kept_once(part, layout, optimizer) for part in parts]
    rates = layout.rates or (1.0,) * len(layout.replicas)
    speeds = [rates[coordinates_of(layout, rank).replica_number] for rank in range(layout.workers)]
    room = layout.memory or (math.inf,) * layout.workers

    def in_time(seconds: float) -> list[int] | None:
        return _filled(parts, work, [seconds * speed for speed in speeds], size, room)

    longest = sum(work) / min(speeds)
    if (found := in_time(longest)) is None:
        return _by_memory(parts, room)
    shortest = 0.0
    for _ in range(BISECTIONS):
        middle = (shortest + longest) / 2
        if (owners := in_time(middle)) is None:
            shortest = middle
        else:
            longest, found = middle, owners
    return found


def update_work(part: ParameterShard, optimizer: OptimizerName) -> float:
    """Floating-point operations of one update of a shard, or what takes as long."""
    products = 0.0
    if by_muon(optimizer, part.name, len(part.shape)):
        count, rows, columns = as_matrices(part.name, torch.empty(part.shape, device="meta")).shape
        short, long = sorted((rows, columns))
        products = count * ITERATIONS * (4 * short**2 * long + 2 * short**3)
    return products + ELEMENTWISE * part.numbers


def _filled(
    parts: Sequence[ParameterShard],
    work: Sequence[float],
    most: Sequence[float],
    size: Sequence[int],
    room: Sequence[float],
) -> list[int] | None:
    """Owners where none works more than its `most` nor keeps more bytes than its `room`; None where that fails.

    Of what a group of ranks holds, each takes the next run.
    """
    worked, kept_bytes = [0.0] * len(most), [0] * len(most)
    places: dict[tuple[int, ...], int] = {}
    owners = []
    for part, own_work, own_size in zip(parts, work, size, strict=True):
        place = places.get(part.holders, 0)
        rank = part.holders[place]
        while worked[rank] + own_work > most[rank] or kept_bytes[rank] + own_size > room[rank]:
            place += 1
            if place == len(part.holders):
                return None
            rank = part.holders[place]
        places[part.holders] = place
        worked[rank] += own_work
        kept_bytes[rank] += own_size
        owners.append(rank)
    return owners


def _by_memory(parts: Sequence[ParameterShard], room: Sequence[float]) -> list[int]:
    """Of what a group of ranks holds, each takes the next run up to its share of their memory."""
    whole: dict[tuple[int, ...], int] = {}
    for part in parts:
        whole[part.holders] = whole.get(part.holders, 0) + part.numbers
    done = dict.fromkeys(whole, 0)
    owners = []
    for part in parts:
        holders = part.holders
        shares = [room[rank] for rank in holders]
        middle = (done[holders] + part.numbers / 2) / whole[holders] * sum(shares)
        done[holders] += part.numbers
        place = 0
        while place < len(holders) - 1 and middle >= sum(shares[: place + 1]):
            place += 1
        owners.append(holders[place])
    return owners
