"""Of every worker of all islands it is known what it did in a round, and for whom it waited at the meetings."""

import io
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import command
from island_runs import island_of, learn, settings
from plans import plan_of
from rich.console import Console
from spawned_ranks import free_port, on_ranks
from told_ranks import assert_all_workers_are_told

from motley.parallel.communicator import Communicator
from motley.parallel.diloco.round_stats import Crossing, RankRound, RoundWatch, spans_of, timing_of
from motley.parallel.telemetry.dashboard import ranks_table
from motley.parallel.telemetry.step_stats import StepStats
from motley.parallel.telemetry.step_timer import KINDS, OTHER, StepTimer
from motley.train.metrics import read_metrics

ISLANDS, LEADERS = [0, 0, 1], [0, 2]


def rank_round(*, reached: float, crossings: list[Crossing], paused: float = 0.0, **told: Any) -> RankRound:
    seconds = dict.fromkeys(KINDS, 0.0) | {"forward": 3.0, "gradients": 1.0}
    return RankRound(reached=reached, crossings=crossings, paused=paused, seconds=seconds, **told)


ROUND = [  # island 1 sends the first fragment last, island 0 the second one, after its workers had a checkpoint
    rank_round(replica=0, tokens=20, reached=9.0, paused=0.5, memory=5.0, sent=7.0, received=8.0,
           crossings=[Crossing(2.0, 2.0, 4.5, 5.0), Crossing(8.0, 8.0, 8.5, 9.0)]),
    rank_round(replica=1, tokens=40, reached=9.0, paused=0.5,
           crossings=[Crossing(2.0, 2.5, 5.0, 5.0), Crossing(8.0, 8.25, 9.0, 9.0)]),
    rank_round(replica=0, tokens=60, reached=10.0, paused=0.5,
           crossings=[Crossing(4.0, 4.0, 4.5, 5.0), Crossing(7.0, 7.0, 8.5, 9.5)]),
]  # fmt: skip


def test_what_a_worker_did_is_a_list_of_numbers_that_says_it_all():
    for one in ROUND:
        numbers = one.numbers()
        assert all(isinstance(number, float | int) for number in numbers)
        assert RankRound.of(numbers) == one


def test_a_round_has_the_form_of_a_step_whose_parts_add_up_for_every_worker():
    timing = timing_of(ROUND, ISLANDS, seq_len=10)
    assert timing.step_seconds == 10
    assert timing.rows == [2, 4, 6]
    assert timing.share == pytest.approx([1 / 6, 1 / 3, 1 / 2])
    for worker, meeting in enumerate([2.5 + 0.5 + 1, 2.5 + 0.75 + 1, 0.5 + 1.5]):
        assert timing.seconds[worker]["meeting"] == meeting
        assert timing.seconds[worker][OTHER] == 10 - 4 - meeting
        assert sum(timing.seconds[worker].values()) == 10
    assert timing.idle_share == pytest.approx([0.5, 0.525, 0.3])
    assert timing.meeting_share == pytest.approx([0.4, 0.425, 0.2])
    assert timing.tokens_per_second == pytest.approx([20 / 3, 40 / 3, 20])
    assert (timing.memory[0], timing.sent[0], timing.received[0]) == (5, 7, 8)


def test_workers_of_one_lane_share_its_rows():
    group = [rank_round(replica=0, tokens=30, reached=1.0, crossings=[]) for _ in range(2)]
    timing = timing_of([*group, rank_round(replica=0, tokens=10, reached=1.0, crossings=[])], ISLANDS, seq_len=10)
    assert (timing.rows, timing.share) == ([3, 1], [0.75, 0.75, 0.25])


def test_at_a_meeting_one_waits_for_who_sent_last_for_its_leader_or_for_the_link():
    rows = spans_of(ROUND, ISLANDS, LEADERS, arrivals=[[3, 7], [1, 2]])
    steps, meetings = (
        [[(s.micro_batch, s.whom, s.start, s.end) for s in row if s.kind == kind] for row in rows]
        for kind in ("steps", "meeting")
    )
    assert steps == [
        [(3, (), 0.5, 2.0), (4, (), 5.0, 8.0)],
        [(3, (), 0.5, 2.5), (4, (), 5.0, 8.25)],
        [(1, (), 0.5, 4.0), (1, (), 5.0, 7.0)],
    ]
    assert meetings == [
        [(0, (2,), 2.0, 4.5), (1, (), 8.0, 8.5), (-1, (2,), 9.0, 10.0)],
        [(0, (2,), 2.5, 5.0), (1, (0,), 8.25, 9.0), (-1, (2,), 9.0, 10.0)],
        [(0, (), 4.0, 4.5), (1, (0,), 7.0, 8.5)],
    ]
    assert [(s.micro_batch, s.start, s.end) for s in rows[0] if s.kind == "outer"] == [(0, 4.5, 5.0), (1, 8.5, 9.0)]


def test_what_a_step_took_besides_counts_as_a_pause_and_its_messages_as_bytes():
    now = 100.0
    stopwatch = StepTimer(lambda: now)
    watch = RoundWatch(stopwatch, fragments=1)
    for _ in range(2):
        stopwatch.begin()
        with stopwatch.at("forward"):
            now += 4
        stopwatch.moved(5, 6)
        watch.stepped(tokens=7, seconds=3.0)
        stopwatch.moved(1, 1)
        watch.carried()
    found = watch.rank_round
    assert (found.tokens, found.paused, found.seconds["forward"]) == (14, 2.0, 8.0)
    assert (found.sent, found.received) == (12, 14)


def shown(about: dict[str, Any], timing: StepStats) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    console.print(ranks_table(about, timing))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_the_table_names_the_island_of_each_worker_and_how_long_it_waited_at_meetings():
    about = {"names": ["big", "big", "small"], "islands": ISLANDS}
    lines = [line.split() for line in shown(about, timing_of(ROUND, ISLANDS, seq_len=10))]
    assert lines[0] == ["rank", "island", "chip", "tokens/s", "share", "idle", "outer", "step", "memory", "link"]
    assert [line[:3] for line in lines[1:]] == [["0", "0", "big"], ["1", "0", "big"], ["2", "1", "small"]]
    assert lines[3][3:7] == ["20", "50%", "30%", "20%"]
    assert shown(about, StepStats()) == ["the ranks of all islands are shown after the first round"]


def meet(comm: Communicator) -> tuple[list[StepStats], list[Any], int]:
    island = island_of(comm, [2, 1], [2.0, 1.0], settings(fragments=2, overlap=1), 2, {})
    calls, everyone = 0, Communicator.everyone

    def counted(self: Communicator, values: Any) -> Any:
        nonlocal calls
        calls += self is island.world
        return everyone(self, values)

    Communicator.everyone = counted  # type: ignore[method-assign]
    meetings = learn(island, 4, seconds=100.0)  # so long that none of it was a pause
    return [meeting.stats for meeting in meetings], [meeting.spans for meeting in meetings], calls


def test_islands_know_of_all_workers_after_each_round_by_one_message():
    told = on_ranks(3, meet)
    assert told[1] == told[0]
    assert told[2] == told[0]
    timings, spans, calls = told[0]
    assert (len(timings), calls) == (2, 2)
    for timing, rows in zip(timings, spans, strict=True):
        assert (sum(timing.rows), len(timing.rows), len(timing.seconds), len(rows)) == (12, 3, 3, 3)
        for worker in range(3):
            assert sum(timing.seconds[worker].values()) == pytest.approx(timing.step_seconds, rel=1e-6)
            assert min(timing.seconds[worker].values()) >= 0
            assert timing.seconds[worker]["forward"] > 0
            assert timing.memory[worker] > 1e6
            assert timing.sent[worker] > 0
        assert [sum(s.micro_batch for s in row if s.kind == "steps") for row in rows] == [3, 3, 1]


# ------------------------------------------------------------------------------------------------ the real commands


@pytest.mark.slow(30)
def test_a_launched_fleet_tells_of_every_worker_of_two_islands(data: Path, shape: Path, tmp_path: Path):
    plan = plan_of({"near": (1, 2), "far": (1, 1)}, [(["near"], 2, [2]), (["far"], 1, [2])])
    for island, group in enumerate(plan["groups"]):
        group["island"] = island
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    chosen = {"precision": "fp32", "steps": 15, "sync_every": 5, "checkpoint_every": 15, "valid_every": 15}
    job = shlex.join(command(tmp_path / "run", data, shape, **chosen)[3:])
    asked = ["launch", "plan.json", "--hosts", "near=localhost", "far=localhost", "--here=localhost", f"--job={job}"]
    asked += [f"--torchrun={Path(sys.executable).with_name('torchrun')}", f"--port={free_port()}"]
    words = [sys.executable, "-m", "motley", *asked]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert_all_workers_are_told(tmp_path / "run", done.stderr, [0, 0, 1], tmp_path / "report.html")
    comm = next(record for record in read_metrics(tmp_path / "run") if record["kind"] == "ranks")
    assert comm["predicted_step_seconds"] > 0
