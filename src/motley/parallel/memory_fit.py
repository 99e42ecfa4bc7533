"""Check before anything is allocated that training fits into memory: a system that runs out of it kills processes.

one process   weights, gradients and optimizer state against the device's memory
many ranks    the same by layout, and a micro-batch's activations, against each rank's own memory or the emulated one

What is kept once goes to the ranks that update it fastest, as far as memory allows. Ranks that hold more than their
budget while they train are named.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from motley.errors import InputError
from motley.fleet.device import ACTIVATIONS, Format
from motley.fleet.probe import device_memory, host_memory, in_gigabytes
from motley.model import ModelConfig
from motley.parallel.buckets import AT_ONCE, MESSAGE_BYTES
from motley.parallel.communicator import Communicator
from motley.parallel.layout import Coordinates, IslandLayout, Layout, coordinates_of, island_of
from motley.parallel.zero.partition import bytes_kept_anyway, bytes_kept_once, cut_shards, held_bytes
from motley.plan.cost_model.configs import RECOMPUTES, SCHEDULES, ParallelConfigs
from motley.plan.cost_model.framework import load_framework
from motley.plan.cost_model.memory import in_flight_bytes
from motley.plan.cost_model.operators import VALUE_BYTES
from motley.plan.network.flops import network_parts
from motley.plan.network.spec import network_of
from motley.train.allocator import memory_bytes
from motley.train.config import TrainingConfig
from motley.train.optimizer import NUMBERS_AT_ONCE, OptimizerName

FP32_BYTES = 4
SPARE = 1.15  # of saved activations over the planner's count of them: 1.12 for nano, in fp32
STATE_SHARE = 0.5  # of the memory that is left may hold what is kept once, and more only where that is not enough
NEW_HIGH = 1.1  # times what was last said of a rank's memory is worth saying again
ALLOCATED = 1.15  # of what is held over what is counted (docs/benchmarks.md, what a rank keeps)
UPDATE_COPIES = 4  # of the numbers that Muon orthogonalises at once, in fp32
SLACK = 1.05  # room for parts that do not fill it to the byte
STATES = {"muon": 1, "adamw": 2}  # tensors of a parameter's size (Muon leaves AdamW's two to the few others)


def gathered_bytes(config: ModelConfig, optimizer: OptimizerName) -> int:
    """Of the whole state at a rank that writes a checkpoint: weights and optimizer state, all in fp32 there."""
    return sum(part.parameters for part in network_parts(config, 0)) * (1 + STATES[optimizer]) * FP32_BYTES


# ------------------------------------------------------------------------------------------ many ranks


def check_gathering(
    islands: Sequence[IslandLayout], config: ModelConfig, optimizer: OptimizerName, comm: Communicator
) -> None:
    """Raises InputError, on every rank, when the host of one that writes cannot hold what a checkpoint gathers.

    Its device, which may be small, need not: the state goes there shard by shard (full_state.py). All ranks call this.
    """
    hosts: list[int] = comm.all_values(host_memory()[0])
    needed = gathered_bytes(config, optimizer)
    for writer in (island.ranks[0] for island in islands if len(island.ranks) > 1):
        if needed > hosts[writer]:
            raise InputError(
                f"for each checkpoint rank {writer} gathers all weights and optimizer state in its host's memory, "
                f"{in_gigabytes(needed)}, and that is {in_gigabytes(hosts[writer])}; start that rank on a host with "
                "more memory, or choose a smaller --model"
            )


@dataclass(frozen=True)
class MemoryNeed:
    """Of one rank, in bytes.

    Attributes:
        held: weights, gradients and optimizer state, and without a plan what updates and messages take besides.
        row: activations of one row of every micro-batch in flight.
        rows: that a micro-batch must have.
        budget: what it may hold.
    """

    held: float
    row: float
    rows: int
    budget: float

    @property
    def most_rows(self) -> int:
        """Of a micro-batch that fits; below 1: none does."""
        return int((self.budget - self.held) / self.row)


def budget(device: torch.device, emulated: float | None) -> float:
    """Bytes that this rank may hold: its accelerator's, or an even part of the host's; less where emulated."""
    own = device_memory(device)[1] or host_memory()[0] / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(own, emulated or own)


def dealt(
    islands: list[IslandLayout],
    shape: ModelConfig,
    config: TrainingConfig,
    budgets: Sequence[float],
    speeds: Sequence[float],
) -> list[IslandLayout]:
    """The islands, in which ranks begin with rows, and keep what is kept once, by their speed and memory.

    Islands begin with steps by their ranks' speed, so that they arrive together in the first round already.

    budgets: bytes that each rank may hold. What a rank keeps in any case (weights below ZeRO 3, gradients below 2)
    is not left, and activations get half of what is, if the others' halves do for all that is kept once.
    speeds: of each rank, relative to the others.
    """
    found = []
    for island in islands:
        layout = replace(island.layout, rates=tuple(speeds[rank] for rank in island.ranks))
        parts, mtp = cut_shards(shape, layout), bool(config.mtp_weight)
        left = [
            max(0.0, budgets[among_all] - bytes_kept_anyway(parts, layout.zero, rank, mtp))
            for rank, among_all in enumerate(island.ranks)
        ]
        if layout.zero and sum(left):
            needed = sum(bytes_kept_once(part, layout, config.optimizer) for part in parts)
            share = min(1.0, max(STATE_SHARE, SLACK * needed / sum(left)))
            layout = replace(layout, memory=tuple(share * room for room in left))
        measured = config.inner_steps == "measured"
        speed = sum(speeds[rank] for rank in island.ranks) if measured else island.speed
        found.append(replace(island, layout=layout, speed=speed))
    return found


def in_passing_bytes(shape: ModelConfig, zero: int, ranks: int) -> float:
    """Messages that are under way (with ZeRO 3 about a layer's), and the copies of what is updated at once.

    A checkpoint needs none of its own: it sends one message at a time (full_state.py), when none of these is there.
    """
    whole = sum(part.parameters for part in network_parts(shape, 0)) * FP32_BYTES
    travelling = whole / shape.num_hidden_layers if zero == 3 else whole
    messages = min(AT_ONCE * MESSAGE_BYTES, travelling) if ranks > 1 else 0
    return messages + UPDATE_COPIES * min(NUMBERS_AT_ONCE * FP32_BYTES, whole)


def row_bytes(shape: ModelConfig, place: Coordinates, seq_len: int, number_bytes: int, recompute: bool) -> float:
    """Activations that a rank holds for one row of each micro-batch that its schedule has in flight."""
    plain, engine = network_of(shape, "model", ""), load_framework("motley-cpu")
    blocks = [block for block, count in plain.runs for _ in range(count)]
    own = [blocks[layer] for layer in place.group.stage_layers(place.stage)] + list(plain.mtp if place.last else ())
    how = RECOMPUTES.index("full" if recompute or place.group.recompute else "none")
    one = ParallelConfigs.of(
        tp=1, cp=1, ep=1, dp=1, pp=place.group.stages, micro_batch=1, micro_batches=1, recompute=how,
        schedule=SCHEDULES.index(place.group.schedule), chunks=1, zero=0,
    )  # fmt: skip
    saved = float(in_flight_bytes(own, place.stage, plain, one, engine, seq_len)[0])
    return max(1.0, SPARE * saved * number_bytes / VALUE_BYTES)


def held_and_row(
    shape: ModelConfig, config: TrainingConfig, layout: Layout, rank: int, number_format: Format
) -> tuple[float, float]:
    """Bytes of weights, gradients and optimizer state that a rank of the layout holds, and of a row's activations."""
    mtp = bool(config.mtp_weight)
    held = held_bytes(shape, layout, rank, config.optimizer, mtp=mtp, moments=config.moments).total
    number_bytes = ACTIVATIONS[number_format].itemsize
    return held, row_bytes(shape, coordinates_of(layout, rank), config.seq_len, number_bytes, config.recompute)


def within_memory(
    islands: list[IslandLayout],
    shape: ModelConfig,
    config: TrainingConfig,
    comm: Communicator,
    budgets: Sequence[float],
    formats: Sequence[Format],
    planned: bool,
    shrink: bool,
) -> list[IslandLayout]:
    """`islands`, in which every rank fits its memory.

    Every rank calls this. Raises InputError on all of them, naming the one that fits least.

    budgets, formats: bytes that each rank may hold, and what it computes in.
    planned: a plan, which has margins of its own, asks for these islands.
    shrink: micro-batches to what fits; else they stay as they are.
    """
    own = island_of(islands, comm.rank)
    rank = list(own.ranks).index(comm.rank)
    held, row = held_and_row(shape, config, own.layout, rank, formats[comm.rank])
    if not planned:
        held = ALLOCATED * (held + in_passing_bytes(shape, own.layout.zero, comm.size))
        row = ALLOCATED * row
    rows = 1 if shrink else coordinates_of(own.layout, rank).group.micro_batch
    needs: list[MemoryNeed] = comm.all_values(MemoryNeed(held, row, rows, budgets[comm.rank]))
    tight = min(range(comm.size), key=lambda other: needs[other].most_rows - needs[other].rows)
    need = needs[tight]
    if need.most_rows < need.rows:
        raise InputError(
            f"rank {tight} needs about {in_megabytes(need.held + need.rows * need.row)} "
            f"({in_megabytes(need.held)} for weights, gradients, optimizer state and messages, the rest for a "
            f"micro-batch of {need.rows} x {config.seq_len} tokens) and may hold {in_megabytes(need.budget)}; choose "
            "a smaller --model or --seq-len, --recompute, or a plan that gives it less"
        )
    if not shrink:
        return islands
    return [_fitting(island, [needs[other].most_rows for other in island.ranks]) for island in islands]


def _fitting(island: IslandLayout, most: Sequence[int]) -> IslandLayout:
    """The island with micro-batches of at most what each of its ranks can hold."""
    groups = [
        replace(
            group, micro_batch=min(group.micro_batch, *(most[rank] for replica in group.replicas for rank in replica))
        )
        for group in island.layout.groups
    ]
    return replace(island, layout=replace(island.layout, groups=tuple(groups)))


@dataclass
class MemoryBudgets:
    """What ranks may hold, and which of them exceeded it.

    Attributes:
        ranks: their numbers in the whole job.
        bytes: that each may hold.
        program: bytes that each process held before it had anything of the model (`held_already`).
        told: the most that was said of each.
    """

    ranks: Sequence[int]
    bytes: Sequence[float]
    program: Sequence[float]
    told: list[float] = field(default_factory=list)

    def exceeded(self, memory: Sequence[float]) -> list[str]:
        """A sentence about each rank that holds more than its budget and than what was last said of it.

        memory: bytes of each process (`allocator.memory_bytes`).
        """
        self.told = self.told or [0.0] * len(self.bytes)
        found = []
        for index, (budget, whole, program) in enumerate(zip(self.bytes, memory, self.program, strict=True)):
            held = whole - program
            if held > max(budget, NEW_HIGH * self.told[index]):
                self.told[index] = held
                found.append(
                    f"rank {self.ranks[index]} holds {in_megabytes(held)} for training, and may hold "
                    f"{in_megabytes(budget)}"
                )
        return found


def held_already(device: torch.device) -> float:
    """Bytes of this process that training does not count as its own: on a CPU, the program with its libraries."""
    return 0.0 if device.type == "cuda" else float(memory_bytes(device))


def in_megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"
