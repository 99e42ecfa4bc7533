"""What all ranks measured of a step: one small message each step, as numbers for shares, metrics and people."""

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from motley.fleet.probe import device_name
from motley.parallel.communicator import Communicator
from motley.parallel.layout import Coordinates, Layout, coordinates_of
from motley.parallel.telemetry.step_timer import KINDS, OTHER, WAITS, WORK, Span, visible
from motley.train.allocator import memory_bytes

SETTLED = 3  # the first step that is no longer a warm-up
DRAWN = 16  # steps of a run, about, whose spans are kept


def introduction(
    world: Communicator, place: Coordinates, rows: int, planned: bool = False, island: int = 0
) -> dict[str, Any]:
    """For the metrics: each rank's chip, island (where there are several), pipeline group, replica and stage.

    Pipeline groups and replicas are numbered through all islands. With a plan: the seconds that it predicts for `rows`.

    Args:
        world: all ranks.
        place: of this one, in its island.
        rows: that its island takes in a step; of several islands, in a round.
        planned: whether there is a plan.
        island: this rank's.
    """
    layout = place.layout
    seconds = rows / sum(layout.rates) if planned else 0.0
    mine = (device_name(world.device), platform.node(), island, place.group_number, place.replica_number, place.stage)
    told = world.all_values((*mine, len(layout.groups), len(layout.replicas), seconds))
    chips, hosts, islands, groups, replicas, stages, group_counts, replica_counts, foreseen = map(
        list, zip(*told, strict=True)
    )
    several = len(set(hosts)) > 1
    first_group, first_replica = _firsts(islands, group_counts), _firsts(islands, replica_counts)
    return {
        "names": [f"{chip}, {host}" if several else chip for chip, host in zip(chips, hosts, strict=True)],
        **({"islands": islands} if len(set(islands)) > 1 else {}),
        "groups": [first_group[own] + group for own, group in zip(islands, groups, strict=True)],
        "replicas": [first_replica[own] + replica for own, replica in zip(islands, replicas, strict=True)],
        "stages": stages,
        **({"predicted_step_seconds": max(foreseen)} if planned else {}),
    }


def _firsts(islands: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Of each island, how many of what its ranks count as `counts` lie in the islands before it."""
    by_island = dict(zip(islands, counts, strict=True))
    return [sum(by_island[before] for before in range(island)) for island in range(max(islands) + 1)]


def is_drawn(step: int, steps: int) -> bool:
    """Whether a step of a run of `steps` is among the few of which everyone's spans are kept."""
    return step in (SETTLED, steps) or step % math.ceil(steps / DRAWN) == 0


def all_spans(comm: Communicator, step_seconds: float) -> list[list[list[Any]]]:
    """[rank][span] of the step that just ended: kind, micro-batch, ranks waited for, start and end in seconds."""
    inside = [span for span in comm.timer.spans if span.start < step_seconds]  # of islands, an exchange may follow it
    return comm.all_values(rounded(visible(inside, step_seconds)))


def rounded(spans: Sequence[Span]) -> list[list[Any]]:
    """For the metrics: to the microsecond."""
    return [[*span[:3], round(span.start, 6), round(span.end, 6)] for span in spans]


def measured_here(comm: Communicator) -> list[float]:
    """This rank's numbers of the step that ends, as `StepStats.of` reads them."""
    watch = comm.timer
    total = watch.stop()
    return [total, *(watch.seconds[kind] for kind in KINDS), watch.sent, watch.received, memory_bytes(comm.device)]


@dataclass(frozen=True)
class StepStats:
    """Of one step, or of a round of islands, lists by rank unless they say otherwise; empty before the first.

    Attributes:
        rows: of each replica.
        step_seconds: until the last rank was done.
        seconds: by kind (step_timer.KINDS); they add up to step_seconds.
        tokens: in the rows of the rank's replica.
        share: of the step's rows.
        sent, received: bytes.
        memory: bytes.
    """

    rows: list[int] = field(default_factory=list)
    step_seconds: float = 0.0
    seconds: list[dict[str, float]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    share: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    received: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Sequence[int], layout: Layout, seq_len: int, measured: Sequence[Sequence[float]]) -> "StepStats":
        """From what every rank measured (`measured_here`).

        That message is itself a wait, which nobody can measure before it: who is done early waits for the last.
        """
        step_seconds = max(row[0] for row in measured)
        seconds: list[dict[str, float]] = [dict(zip(KINDS, row[1:], strict=False)) for row in measured]
        for own_seconds, row in zip(seconds, measured, strict=True):
            own_seconds["numbers"] += step_seconds - row[0]
        own = [rows[coordinates_of(layout, rank).replica_number] for rank in range(len(measured))]
        sent, received, memory = ([row[column] for row in measured] for column in (-3, -2, -1))
        return cls(
            list(rows), step_seconds, seconds, [count * seq_len for count in own],
            [count / max(1, sum(rows)) for count in own], sent, received, memory,
        )  # fmt: skip

    @property
    def rank_seconds(self) -> list[float]:
        """Of computing."""
        return [sum(rank[kind] for kind in WORK) for rank in self.seconds]

    @property
    def exchange_seconds(self) -> float:
        """That sums of gradients and the way of new weights take by themselves: what the last to come waits for too."""
        return sum(min(rank[kind] for rank in self.seconds) for kind in ("gradients", "spreading"))

    @property
    def own_seconds(self) -> list[float]:
        """Of anything but waiting for others."""
        return [self.step_seconds - sum(rank[kind] for kind in WAITS) for rank in self.seconds]

    @property
    def idle_share(self) -> list[float]:
        """Share of the step spent waiting for others."""
        return [sum(rank[kind] for kind in WAITS) / max(self.step_seconds, 1e-9) for rank in self.seconds]

    @property
    def meeting_share(self) -> list[float]:
        """Share of a round spent waiting for other islands."""
        return [rank["meeting"] / max(self.step_seconds, 1e-9) for rank in self.seconds]

    @property
    def tokens_per_second(self) -> list[float]:
        """Each rank's own speed: the tokens of its replica by what it computed for them itself."""
        return [
            tokens / spent if spent > 0 else 0.0 for tokens, spent in zip(self.tokens, self.rank_seconds, strict=True)
        ]

    @property
    def link_bytes_per_second(self) -> list[float]:
        """Sent and received, spread over the step."""
        both = zip(self.sent, self.received, strict=True)
        return [(sent + received) / max(self.step_seconds, 1e-9) for sent, received in both]

    def numbers(self) -> dict[str, Any]:
        """For the metrics."""
        return {
            "rows": self.rows,
            "step_seconds": self.step_seconds,
            "tokens_per_second": self.tokens_per_second,
            "share": self.share,
            "busy_seconds": self.rank_seconds,
            "wait_seconds": {kind: [rank[kind] for rank in self.seconds] for kind in WAITS},
            "other_seconds": [rank[OTHER] for rank in self.seconds],
            "idle_share": self.idle_share,
            "memory_bytes": self.memory,
            "sent_bytes": self.sent,
            "received_bytes": self.received,
            "link_bytes_per_second": self.link_bytes_per_second,
        }
