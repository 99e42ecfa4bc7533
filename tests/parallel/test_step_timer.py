"""Of every worker it is known what it did with its time, for whom it waited, and what it sent."""

import io
from itertools import pairwise
from typing import Any

import pytest
from layouts import ROWS, settings
from rich.console import Console
from spawned_ranks import on_ranks
from tiny_models import DEEP, FEW, Rows, random_model

from motley.errors import CommunicationError
from motley.model import experts
from motley.parallel.communicator import Communicator
from motley.parallel.layout import Layout, PipelineGroup, side_by_side
from motley.parallel.rank import Ranks
from motley.parallel.telemetry.dashboard import MOST_LINES, ranks_table
from motley.parallel.telemetry.step_stats import DRAWN, StepStats, all_spans, introduction, is_drawn
from motley.parallel.telemetry.step_timer import KINDS, WAITS, Span, StepTimer, visible

PIPELINE = Layout((PipelineGroup(((0, 1, 2),), (1, 2, 1), micro_batch=2),))
EXPERTS = Layout(
    (PipelineGroup(((0,), (1,)), (4,), experts=(1, 3), micro_batch=2), PipelineGroup(((2,),), (4,), micro_batch=2)),
    zero=1,
)


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_parts_of_a_step_add_up_and_waits_inside_work_are_no_work():
    clock = Clock()
    watch = StepTimer(clock)
    clock.now += 1
    with watch.at("forward", 0):
        clock.now += 2
        with watch.waiting("exchanging tokens of experts", [0, 3]):
            clock.now += 4
        clock.now += 8
    with watch.waiting("receiving from rank 1", [1]):
        clock.now += 16
    assert watch.stop() == 31
    assert {kind: spent for kind, spent in watch.seconds.items() if spent} == {
        "other": 1, "forward": 10, "experts": 4, "neighbour": 16,
    }  # fmt: skip
    assert watch.busy == 10
    assert watch.spans == [
        Span("other", -1, (), 0, 1),
        Span("forward", 0, (), 1, 3),
        Span("experts", -1, (0, 3), 3, 7),
        Span("forward", 0, (), 7, 15),
        Span("neighbour", -1, (1,), 15, 31),
    ]


def test_a_new_step_forgets_the_last_one():
    clock = Clock()
    watch = StepTimer(clock)
    with watch.at("forward"):
        clock.now += 1
    watch.moved(5, 7)
    watch.begin()
    assert (watch.stop(), watch.busy, watch.sent, watch.received, watch.spans) == (0, 0, 0, 0, [])


def test_a_failure_inside_ends_the_wait():
    clock = Clock()
    watch = StepTimer(clock)

    def fail() -> None:
        clock.now += 1
        raise RuntimeError("Connection closed by peer")

    comm = Communicator(0, 2, timer=watch)
    with pytest.raises(CommunicationError, match="all-reduce"):
        comm.talk("all-reduce", fail)
    clock.now += 2
    watch.stop()
    assert (watch.seconds["numbers"], watch.seconds["other"]) == (1, 2)


def test_what_cannot_be_seen_is_left_out_and_does_not_part_its_neighbours():
    spans = [
        Span("forward", 3, (), 0, 4),
        Span("experts", -1, (0, 1), 4, 4.001),
        Span("forward", 3, (), 4.001, 6),
        Span("neighbour", -1, (1,), 6, 9.999),
        Span("other", -1, (), 9.999, 10),
    ]
    assert visible(spans, 10) == [Span("forward", 3, (), 0, 6), Span("neighbour", -1, (1,), 6, 9.999)]


def one_step(comm: Communicator, layout: Layout) -> tuple[StepStats, list[list[Span]], dict[str, Any]]:
    experts.PAD = FEW
    ranks = Ranks(DEEP, settings(), layout, comm)
    ranks.take_state((dict(random_model(0, DEEP).state_dict()), {}) if comm.leads else None)
    comm.everyone([0.0])
    ranks.update(*ranks.gradient(ranks.read(Rows(), 0)), 1e-3)  # type: ignore[arg-type]
    ranks.share_rows()
    spans = comm.all_values(list(comm.timer.spans))
    for drawn, all_of_it in zip(all_spans(comm, ranks.stats.step_seconds), spans, strict=True):
        assert {tuple(span[:3]) for span in drawn} <= {span[:3] for span in all_of_it}
    return ranks.stats, spans, introduction(comm, ranks.coordinates, ROWS)


@pytest.mark.parametrize(
    "layout", [PIPELINE, EXPERTS, side_by_side(3, 4, 2, zero=1)], ids=["pipeline", "experts", "rows"]
)
def test_every_second_of_every_worker_is_accounted_for_and_what_one_sends_another_gets(layout: Layout):
    answers = on_ranks(3, one_step, layout)
    timing, spans, about = answers[0]
    assert answers[1][0] == timing  # the same numbers everywhere
    assert answers[2][1] == spans
    for rank in range(3):
        assert set(timing.seconds[rank]) == set(KINDS)
        assert sum(timing.seconds[rank].values()) == pytest.approx(timing.step_seconds, rel=1e-6)
    numbers = timing.numbers()
    for rank in range(3):
        parts = [numbers["busy_seconds"][rank], numbers["other_seconds"][rank]]
        parts += [numbers["wait_seconds"][kind][rank] for kind in WAITS]
        assert sum(parts) == pytest.approx(numbers["step_seconds"], rel=1e-6)
        assert numbers["busy_seconds"][rank] > 0
        assert numbers["memory_bytes"][rank] > 1e6
        assert numbers["tokens_per_second"][rank] == pytest.approx(
            numbers["share"][rank] * ROWS * 12 / numbers["busy_seconds"][rank]
        )
    if not layout.zero:  # with owners several give, and one gets the sum
        assert sum(timing.sent) == pytest.approx(sum(timing.received))
    assert min(timing.sent) > 0
    for row in spans:
        assert all(one.end == next_one.start for one, next_one in pairwise(row))
    assert len(about["names"]) == 3
    whom = [{span.whom for span in row if span.kind in ("neighbour", "experts")} for row in spans]
    if layout is PIPELINE:
        assert numbers["share"] == [1, 1, 1]
        assert whom == [{(1,), ()}, {(0,), (2,), ()}, {(1,), ()}]  # nobody in particular: until a message has left
        assert all({s.micro_batch for s in row if s.kind == "forward"} == {0, 1, 2, 3} for row in spans)
    if layout is EXPERTS:
        assert whom == [{(0, 1)}, {(0, 1)}, set()]
        assert timing.seconds[2]["experts"] == 0


def test_a_crew_of_one_keeps_no_messages():
    (answer,) = on_ranks(1, one_step, side_by_side(1, 4, 2))
    timing, _, about = answer
    assert (timing.sent, timing.idle_share, timing.share, about["replicas"]) == ([0], [0], [1], [0])


def made_up(workers: int) -> StepStats:
    seconds = [
        {kind: 0.0 for kind in KINDS} | {"forward": 1.0 + rank, "gradients": 9.0 - rank / 10} for rank in range(workers)
    ]
    each = [1e9] * workers
    return StepStats([1] * workers, 10.0, seconds, [100] * workers, [1 / workers] * workers, each, each, each)


@pytest.mark.parametrize("workers", [1, 4, 40])
def test_the_table_shows_every_worker_or_of_many_the_slowest_and_the_most_idle(workers: int):
    timing = made_up(workers)
    console = Console(file=io.StringIO(), width=110)
    console.print(ranks_table({"names": [f"chip [{rank}]" for rank in range(workers)]}, timing))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 1 + min(workers, MOST_LINES - 1)
    assert lines[0].split() == ["rank", "chip", "tokens/s", "share", "idle", "memory", "link"]
    if workers <= MOST_LINES:
        assert [line.split()[0] for line in lines[1:]] == [str(rank) for rank in range(workers)]
    else:
        shown = [int(line.split()[0]) for line in lines[1:-1]]
        assert shown == [*range(7), *range(33, 40)]
        assert lines[-1].startswith("26 more")


def test_before_the_first_step_the_table_is_only_its_head():
    console = Console(file=io.StringIO(), width=110)
    console.print(ranks_table({"names": ["a", "b"]}, StepStats()))
    assert len(console.file.getvalue().splitlines()) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("steps", [1, 2, 10, 500, 100_000])
def test_a_run_draws_its_first_settled_step_its_last_and_few_between(steps: int):
    drawn = [step for step in range(1, steps + 1) if is_drawn(step, steps)]
    assert drawn[-1] == steps
    assert len(drawn) <= DRAWN + 2
    assert steps < 3 or 3 in drawn
