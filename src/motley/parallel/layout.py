"""Which rank holds and computes what, as data that can be printed, drawn and tested.

    group     replicas  stages          layers    experts
    fast      0 1       0→ · → ·        7 3       4 4         a replica is a pipeline of ranks, one a stage; replicas
    slow      2         · → ·           5 5       8           of a group are cut alike, neighbours share experts

Pipeline groups may differ in number of stages, cuts, experts on a rank and micro-batch. Whatever the layout, each
parameter is held by one rank of every replica (an expert, by one of every group of replicas that share them), and the
gradient is the sum over all rows of the step.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from motley.errors import InputError
from motley.fleet.device import ACTIVATIONS, Format
from motley.model import ModelConfig

Schedule = Literal["1f1b", "zero_bubble"]
Zero = Literal[0, 1, 2, 3]


@dataclass(frozen=True)
class PipelineGroup:
    """Replicas of data parallelism that are cut into the same pipeline.

    Attributes:
        replicas: ranks of each replica's stages, [replicas][stages].
        layers: layers of each stage, in order; they add up to the model's.
        experts: how many routed experts each of len(experts) neighbouring replicas holds; empty: each holds all.
        schedule: order of forward and backward passes in the pipeline.
        micro_batch: rows computed at a time.
        recompute: keep only each block's input for the backward pass.
        formats: what a plan lets each stage compute in; empty: each rank decides.
    """

    replicas: tuple[tuple[int, ...], ...]
    layers: tuple[int, ...]
    experts: tuple[int, ...] = ()
    schedule: Schedule = "1f1b"
    micro_batch: int = 16
    recompute: bool = False
    formats: tuple[Format, ...] = ()

    @property
    def stages(self) -> int:
        return len(self.layers)

    @property
    def expert_replicas(self) -> int:
        """Neighbouring replicas that share the experts."""
        return max(1, len(self.experts))

    def stage_layers(self, stage: int) -> range:
        first = sum(self.layers[:stage])
        return range(first, first + self.layers[stage])

    def stage_of(self, layer: int) -> int:
        return next(stage for stage in range(self.stages) if layer in self.stage_layers(stage))

    def expert_range(self, replica: int, experts: int) -> range:
        """The experts that a replica holds."""
        if not self.experts:
            return range(experts)
        ends = list(accumulate(self.experts, initial=0))
        index = replica % self.expert_replicas
        return range(ends[index], ends[index + 1])


@dataclass(frozen=True)
class Layout:
    """All pipeline groups of a job.

    Attributes:
        zero: what is kept by one of its holders only: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too.
        memory: bytes that each rank has room for of that, or parts of the whole where it has not enough; empty: plenty.
        rates: rows a second of each replica, those of the first pipeline group first, to begin with; empty: even. What
            is kept once is updated by ranks in proportion to them, as far as memory allows.
    """

    groups: tuple[PipelineGroup, ...]
    zero: Zero = 0
    memory: tuple[float, ...] = ()
    rates: tuple[float, ...] = ()

    @property
    def replicas(self) -> list[tuple[int, int]]:
        """(pipeline group, replica in it) of every replica, in order."""
        return [(number, replica) for number, group in enumerate(self.groups) for replica in range(len(group.replicas))]

    def expert_groups(self) -> list[tuple[int, ...]]:
        """Ranks that share a stage's experts, in the order of the experts they hold; alone where nobody shares."""
        return [
            tuple(replica[stage] for replica in group.replicas[start : start + group.expert_replicas])
            for group in self.groups
            for start in range(0, len(group.replicas), group.expert_replicas)
            for stage in range(group.stages)
        ]

    @property
    def workers(self) -> int:
        return sum(len(replica) for group in self.groups for replica in group.replicas)

    def check(self, config: ModelConfig, size: int) -> None:
        """Raises InputError where this layout does not fit the model or the ranks that were started."""
        ranks = sorted(rank for group in self.groups for replica in group.replicas for rank in replica)
        if ranks != list(range(size)):
            raise InputError(f"the layout is for ranks {ranks}, but {size} were started, numbered from 0")
        for number, group in enumerate(self.groups):
            name = f"pipeline group {number}"
            if not group.replicas or not group.layers or group.micro_batch < 1:
                raise InputError(f"{name} has no replicas, no stages or a micro-batch below 1")
            if sum(group.layers) != config.num_hidden_layers or min(group.layers) < 0:
                raise InputError(f"{name} has layers {list(group.layers)}, the model has {config.num_hidden_layers}")
            if min(group.layers[1:-1], default=1) < 1:
                raise InputError(f"{name} has layers {list(group.layers)}: only the first and last stage may have none")
            if any(len(replica) != group.stages for replica in group.replicas):
                raise InputError(f"{name} has {group.stages} stages, but a replica with another number of ranks")
            if group.experts and (sum(group.experts) != config.n_routed_experts or min(group.experts) < 1):
                raise InputError(f"{name} has experts {list(group.experts)}, the model has {config.n_routed_experts}")
            if len(group.replicas) % group.expert_replicas:
                raise InputError(
                    f"{name} shares experts among {group.expert_replicas} replicas, which do not divide its "
                    f"{len(group.replicas)}"
                )
        if self.zero >= 2 and any(group.stages > 1 or group.expert_replicas > 1 for group in self.groups):
            raise InputError(
                f"ZeRO {self.zero} is for ranks that each compute with the whole model; pipelines and expert "
                "parallelism run with ZeRO 0 and 1"
            )
        if self.memory and (len(self.memory) != size or min(self.memory) < 0 or not sum(self.memory)):
            raise InputError(f"memory shares {list(self.memory)}: one for each of {size} ranks, none below 0")
        if self.rates and (len(self.rates) != len(self.replicas) or min(self.rates) <= 0):
            raise InputError(f"rates {list(self.rates)}: one above 0 for each of {len(self.replicas)} replicas")


@dataclass(frozen=True)
class Coordinates:
    """Where one rank stands in a layout."""

    layout: Layout
    group_number: int
    replica: int
    stage: int

    @property
    def group(self) -> PipelineGroup:
        return self.layout.groups[self.group_number]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of its replica, by stage."""
        return self.group.replicas[self.replica]

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.group.stages - 1

    @property
    def replica_number(self) -> int:
        """Of all replicas of the layout."""
        return self.layout.replicas.index((self.group_number, self.replica))

    @property
    def planned_format(self) -> Format | None:
        return self.group.formats[self.stage] if self.group.formats else None

    @property
    def expert_ranks(self) -> tuple[int, ...]:
        """The ranks that share this stage's experts, in the order of the experts they hold."""
        start = self.replica - self.replica % self.group.expert_replicas
        return tuple(
            self.group.replicas[replica][self.stage] for replica in range(start, start + self.group.expert_replicas)
        )


def coordinates_of(layout: Layout, rank: int) -> Coordinates:
    """Where `rank` stands."""
    return next(
        Coordinates(layout, number, index, replica.index(rank))
        for number, group in enumerate(layout.groups)
        for index, replica in enumerate(group.replicas)
        if rank in replica
    )


def side_by_side(size: int, layers: int, micro_batch: int, zero: Zero = 0) -> Layout:
    """Uneven data parallelism alone: every rank is a replica and holds the whole model."""
    groups = tuple(PipelineGroup(((rank,),), (layers,), micro_batch=micro_batch) for rank in range(size))
    return Layout(groups, zero=zero)


@dataclass(frozen=True)
class IslandLayout:
    """One of the islands that a job consists of.

    Attributes:
        ranks: its ranks, among all of the job.
        layout: of these ranks, numbered from 0.
        speed: relative to the other islands, to begin with.
    """

    ranks: tuple[int, ...]
    layout: Layout
    speed: float = 1.0


def island_of(islands: Sequence[IslandLayout], rank: int) -> IslandLayout:
    """The island that `rank` of all ranks belongs to."""
    return next(island for island in islands if rank in island.ranks)


def islands_side_by_side(text: str, size: int, layers: int, micro_batch: int, zero: Zero) -> list[IslandLayout]:
    """`2` or `3:1`: how many islands, or the ranks of each; every rank holds the whole model.

    Raises InputError where the ranks cannot be split so.
    """
    parts = text.split(":")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(f"--islands is {text!r}; give their number, such as 2, or the ranks of each, such as 3:1")
    counts = [int(part) for part in parts]
    if len(counts) == 1:
        count = counts[0]
        counts = [size // count + (number < size % count) for number in range(count)]
    if sum(counts) != size or min(counts) < 1:
        raise InputError(
            f"--islands {text} does not fit the {size} rank{'s' * (size > 1)} of this job (torchrun); a run "
            f"goes on with any number of islands, up to --islands {size}"
        )
    found, first = [], 0
    for count in counts:
        layout = side_by_side(count, layers, micro_batch, zero if count > 1 else 0)
        found.append(IslandLayout(tuple(range(first, first + count)), layout, float(count)))
        first += count
    return found


def islands_of_plan(plan: Mapping[str, Any], config: ModelConfig) -> list[IslandLayout]:
    """The islands of a plan file, mostly one; as `from_plan`."""
    with _reading():
        found, rank = {}, 0
        for group in plan["groups"]:
            size = group["dp"] * len(group["stages"])
            found.setdefault(group["island"], []).append((group, range(rank, rank + size)))
            rank += size
        islands = []
        for members in found.values():
            layout = from_plan({**plan, "groups": [group for group, _ in members]}, config)
            ranks = tuple(rank for _, own in members for rank in own)
            islands.append(IslandLayout(ranks, layout, float(sum(group["sequences"] for group, _ in members))))
        return islands


def from_plan(plan: Mapping[str, Any], config: ModelConfig) -> Layout:
    """The layout of a plan file (`motley plan`) of one island: ranks in the order of its groups, copies, stages.

    Raises InputError for what this runtime does not run, and for what is no plan.
    """
    with _reading():
        return _from_plan(plan, config)


def ranks_of_pools(plan: Mapping[str, Any]) -> dict[str, list[int]]:
    """Which ranks, in the order of `from_plan`, work on the first, second, ... chip of each pool."""
    ranks: dict[str, list[int]] = {entry["pool"]: [] for entry in plan["pools"]}
    first = 0
    for group in plan["groups"]:
        stages, copies = group["stages"], group["dp"]
        for number, stage in enumerate(stages):
            ranks[stage["pool"]] += [first + copy * len(stages) + number for copy in range(copies)]
        first += copies * len(stages)
    return ranks


@contextmanager
def _reading() -> Iterator[None]:
    """Inside, what is missing in a plan, or is not what it should be, becomes an InputError."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"this is no plan as `motley plan --out` writes it: {error!r} is missing or wrong") from None


def _from_plan(plan: Mapping[str, Any], config: ModelConfig) -> Layout:
    groups, rates, rank = [], [], 0
    memory: list[float] = []
    zero = max(int(entry["zero"]) for entry in plan["groups"])
    for entry in plan["groups"]:
        pools = " and ".join(entry["pools"])
        if max(entry["tp"].values()) > 1 or entry["cp"] > 1:
            raise InputError(
                f"the plan splits {pools} by tensor or context parallelism, which this runtime does not have; "
                "make the plan with --framework motley"
            )
        if entry["schedule"] not in ("1f1b", "zero_bubble"):
            raise InputError(f"the plan runs {pools} as {entry['schedule']}; this runtime has 1f1b and zero_bubble")
        if entry["island"] != plan["groups"][0]["island"]:
            raise InputError("the plan has several islands: each has a layout of its own")
        layers = tuple(
            stage["layers"][1] - stage["layers"][0] + 1 if stage["layers"] else 0 for stage in entry["stages"]
        )
        if any(stage["mtp"] and not stage["head"] for stage in entry["stages"]):
            raise InputError(f"the plan puts an MTP module of {pools} on another stage than the head")
        replicas = tuple(
            tuple(rank + copy * len(layers) + stage for stage in range(len(layers))) for copy in range(entry["dp"])
        )
        rank += entry["dp"] * len(layers)
        experts = config.n_routed_experts or 0
        equal = (experts // entry["ep"],) * entry["ep"] if entry["ep"] > 1 else ()
        held = tuple(int(count) for count in entry.get("experts", equal))
        recompute = entry["recompute"] != "none"
        formats = tuple(entry["precision"][stage["pool"]] for stage in entry["stages"])
        if unknown := set(formats) - set(ACTIVATIONS):
            raise InputError(f"the plan computes in {min(unknown)} on {pools}; known are {', '.join(ACTIVATIONS)}")
        groups.append(
            PipelineGroup(replicas, layers, held, entry["schedule"], entry["micro_batch"], recompute, formats)
        )
        rates += [entry["sequences"] / entry["dp"] / plan["step_seconds"]] * entry["dp"]
        if zero:
            memory += [_room(stage, zero) for stage in entry["stages"]] * len(replicas)
    layout = Layout(tuple(groups), zero, tuple(memory), tuple(rates))  # type: ignore[arg-type]
    layout.check(config, rank)
    return layout


def _room(stage: Mapping[str, Any], zero: int) -> float:
    """Bytes that each rank of a stage has for what is kept once: what the plan lets it keep, and what is free."""
    planned = stage["memory_bytes"]
    kept = sum(planned[kind] for kind in ("optimizer", "gradients", "weights")[:zero])
    return max(kept + max(0.0, stage["memory_limit_bytes"] - sum(planned.values())), 1.0)
