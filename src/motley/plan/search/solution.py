"""A plan as the search finds it: pipeline groups with their shares of the batch, step seconds, price."""

import math
from dataclasses import dataclass

from motley.fleet.inventory import Fleet, Pool
from motley.plan.search.step_lines import GroupOptions
from motley.plan.simulation.simulate import CHECKPOINT_SECONDS, RESTART_SECONDS, expected_goodput
from motley.plan.workload import Workload


@dataclass(frozen=True)
class ChosenGroup:
    """One pipeline group of the plan: its options, the chosen one, and its share of the batch.

    Attributes:
        pools: names of its pools.
        index: of the chosen option.
        sequences: of the batch.
        micro_batches: of a replica in one step of its island.
        seconds: that the group is busy in such a step.
        update: seconds of the optimizer's update where states are sharded over the island; None: over the group.
        kept: the share of the island's states that the group holds.
        steps: of its island for each step of the run.
    """

    pools: frozenset[str]
    options: GroupOptions
    index: int
    sequences: int
    micro_batches: int
    seconds: float
    update: float | None = None
    kept: float = 1.0
    island: int = 0
    steps: float = 1.0


@dataclass(frozen=True)
class FoundPlan:
    """A plan as the search finds it.

    Attributes:
        step_seconds: of one step over the whole batch.
        inner_steps: steps between two outer steps (DiLoCo); 0: one synchronous step over all chips.
        outer_seconds: what outer steps add to each step.
    """

    workload: Workload
    fleet: Fleet
    groups: tuple[ChosenGroup, ...]
    step_seconds: float
    inner_steps: int
    outer_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.workload.global_batch * self.workload.seq_len / self.step_seconds

    @property
    def chips(self) -> int:
        return sum(self.used.values())

    @property
    def used(self) -> dict[str, int]:
        """Pool → chips that work."""
        counts = dict.fromkeys((pool.name for pool in self.fleet.pools), 0)
        for group in self.groups:
            for member, count in zip(group.options.members, group.options.chips[:, group.index], strict=True):
                counts[member.pool.name] += int(count)
        return counts

    @property
    def rented(self) -> dict[str, int]:
        """Pool → chips that must be paid for: those of every node in use."""
        used = self.used
        return {pool.name: math.ceil(used[pool.name] / pool.per_node) * pool.per_node for pool in self.fleet.pools}

    @property
    def price_per_hour(self) -> float:
        rented = self.rented
        return sum(pool.price * rented[pool.name] for pool in self.fleet.pools)

    @property
    def seconds(self) -> float:
        """Of the whole run without failures."""
        return self.step_seconds * self.workload.steps

    @property
    def goodput(self) -> tuple[float, float]:
        """(useful share of the time, seconds between checkpoints) with the pools' failures."""
        used = self.used
        failing = sum(used[pool.name] / hours_between_failures(pool) for pool in self.fleet.pools)
        return expected_goodput(1 / failing if failing else math.inf, CHECKPOINT_SECONDS, RESTART_SECONDS)

    @property
    def expected_seconds(self) -> float:
        """Of the whole run with failures."""
        return self.seconds / self.goodput[0]

    @property
    def cost(self) -> float:
        return self.price_per_hour * self.expected_seconds / 3600


def hours_between_failures(pool: Pool) -> float:
    """Mean hours between failures of one chip, when whole nodes fail too."""
    node = pool.hours_between_node_failures
    return 1 / (1 / pool.hours_between_failures + (1 / (node * pool.per_node) if node else 0.0))
