"""What every rank of several islands did in a round: a few numbers more in the message that ends it anyway.

    rank 0     ▏     20 steps      ▕╱╱╱╱╱ for rank 2 ╱╱╱╱╱╱▏outer step▕╱╱╱▕     island 0, its leader
    rank 1     ▏     20 steps      ▕╱╱╱╱╱ for rank 2 ╱╱╱╱╱╱╱╱╱╱╱╱╱╱╱╱╱▕╱╱╱▕     island 0
    rank 2     ▏               10 steps                ▕╱ wire ╱▏ outer step ▕   island 1: it sent last
               0 s                                                            end of the round

Seconds count from the round's beginning, which is the same moment for all: islands leave the message in which they ask
each other whether to stop together.
"""

import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields

from motley.parallel.telemetry.step_stats import StepStats
from motley.parallel.telemetry.step_timer import KINDS, OTHER, Span, StepTimer, visible


@dataclass
class Crossing:
    """A fragment, as one rank saw it; in seconds of the round.

    Attributes:
        left: its island had sent it.
        came: the rank was there to take it in.
        arrived: at a leader, what all islands sent was there; elsewhere as `taken`.
        taken: the rank went on with its next step.
    """

    left: float = 0.0
    came: float = 0.0
    arrived: float = 0.0
    taken: float = 0.0


@dataclass
class RankRound:
    """What one rank did in a round; as plain numbers it is part of a message.

    Attributes:
        replica: its number in its island.
        tokens: in the rows of that replica.
        sent, received: bytes.
        memory: bytes.
        loss_scale: at the round's end.
        paused: seconds in which all wrote a checkpoint.
        reached: seconds until the rank was ready for the round's last message.
        seconds: of its steps, by kind (step_timer.KINDS).
        crossings: of each fragment.
    """

    replica: float = 0.0
    tokens: float = 0.0
    sent: float = 0.0
    received: float = 0.0
    memory: float = 0.0
    loss_scale: float = 1.0
    paused: float = 0.0
    reached: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    crossings: list[Crossing] = field(default_factory=list)

    def numbers(self) -> list[float]:
        """As many for every rank, as all have the same fragments."""
        plain = [getattr(self, name) for name in PLAIN]
        return [*plain, *self.seconds.values(), *(number for one in self.crossings for number in astuple(one))]

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "RankRound":
        """The inverse of `numbers`."""
        first, each = len(PLAIN) + len(KINDS), len(fields(Crossing))
        plain = dict(zip(PLAIN, numbers, strict=False))
        seconds: dict[str, float] = dict(zip(KINDS, numbers[len(PLAIN) : first], strict=True))
        crossings = [Crossing(*numbers[start : start + each]) for start in range(first, len(numbers), each)]
        return cls(**plain, seconds=seconds, crossings=crossings)


PLAIN = [one.name for one in fields(RankRound)][:-2]
"""What is a number by itself."""


class RoundWatch:
    """Collects this rank's `RankRound` while a round goes on.

    Args:
        watch: of its steps.
        fragments: how many the islands exchange.
    """

    def __init__(self, watch: StepTimer, fragments: int) -> None:
        self._watch, self._began = watch, 0.0
        self.rank_round = RankRound(crossings=[Crossing() for _ in range(fragments)])

    @property
    def now(self) -> float:
        """Seconds since the round began."""
        return time.perf_counter() - self._began

    def stepped(self, tokens: int, seconds: float) -> None:
        """A step has ended, of so many tokens in the rank's replica; it took `seconds` without a checkpoint."""
        spent, rank_round = self._watch.stop(), self.rank_round
        self._began = self._began or time.perf_counter() - spent
        for kind in KINDS:
            rank_round.seconds[kind] += self._watch.seconds[kind]
        rank_round.paused += max(0.0, spent - seconds)
        rank_round.tokens += tokens

    def carried(self) -> None:
        """Count the bytes of the step and of what the islands exchanged behind it, before the next one begins."""
        self.rank_round.sent += self._watch.sent
        self.rank_round.received += self._watch.received


def timing_of(rank_round: Sequence[RankRound], islands: Sequence[int], seq_len: int) -> StepStats:
    """The round in the form of a step: who worked, waited, sent and held how much.

    Args:
        rank_round: of each rank.
        islands: their islands' numbers.
        seq_len: tokens of a row.
    """
    length, seconds = max(one.reached for one in rank_round), []
    for one in rank_round:
        spent = dict(one.seconds)
        # The last message is a wait too, which nobody can measure before it: who is done early waits for the last.
        spent["meeting"] += sum(way.arrived - way.came for way in one.crossings) + length - one.reached
        spent[OTHER] += length - sum(spent.values())
        seconds.append(spent)
    replicas = {(island, one.replica): one.tokens for island, one in zip(islands, rank_round, strict=True)}
    whole = max(1.0, sum(replicas.values()))
    return StepStats(
        [round(tokens / seq_len) for _, tokens in sorted(replicas.items())], length, seconds,
        [round(one.tokens) for one in rank_round], [one.tokens / whole for one in rank_round],
        [one.sent for one in rank_round], [one.received for one in rank_round], [one.memory for one in rank_round],
    )  # fmt: skip


def spans_of(
    rank_round: Sequence[RankRound], islands: Sequence[int], leaders: Sequence[int], arrivals: Sequence[Sequence[int]]
) -> list[list[Span]]:
    """[rank][span]: `steps` (how many), `meeting` (fragment, or -1: the round's last message), `outer` (fragment).

    Args:
        rank_round: of each rank.
        islands: their islands' numbers.
        leaders: of each island.
        arrivals: of each island, after how many inner steps it takes in which fragment.
    """
    length, last = (
        max(one.reached for one in rank_round),
        max(range(len(rank_round)), key=lambda rank: rank_round[rank].reached),
    )
    rows = []
    for rank, (one, island) in enumerate(zip(rank_round, islands, strict=True)):
        row, now, done = [], one.paused, 0
        for fragment, (way, arrival) in enumerate(zip(one.crossings, arrivals[island], strict=True)):
            if arrival > done:
                row.append(Span("steps", arrival - done, (), now, way.came))
            row.append(
                Span("meeting", fragment, _late(fragment, rank, rank_round, leaders, island), way.came, way.arrived)
            )
            row.append(Span("outer", fragment, (), way.arrived, way.taken))
            now, done = way.taken, arrival
        row.append(Span("meeting", -1, (last,) if last != rank else (), one.reached, length))
        rows.append(visible(row, length))
    return rows


def _late(
    fragment: int, rank: int, rank_round: Sequence[RankRound], leaders: Sequence[int], island: int
) -> tuple[int, ...]:
    """The rank that sent a fragment last, if it did when this one was already waiting; else only the way was long."""
    last = max(leaders, key=lambda leader: rank_round[leader].crossings[fragment].left)
    if rank_round[last].crossings[fragment].left > rank_round[rank].crossings[fragment].came:
        return (last,)
    return () if rank == leaders[island] else (leaders[island],)
