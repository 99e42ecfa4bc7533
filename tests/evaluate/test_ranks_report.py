"""The report shows timelines, a table of the ranks and load balancing, and nothing of the kind for one process."""

from pathlib import Path
from typing import Any

import pytest
from test_report import Page, write_stage

from motley.evaluate.ranks import waited_for
from motley.evaluate.report import write_report
from motley.parallel.telemetry.step_timer import WAITS, Span
from motley.train.metrics import MetricsWriter, read_metrics

NAMES = ["big <chip>", "small", "small", "smallest"]
TIMELINE = [  # a pipeline of two stages beside two replicas of one rank each, the last of which is slow
    [["forward", 0, [], 0.0, 1.0], ["neighbour", -1, [1], 1.0, 3.0], ["backward", 0, [], 3.0, 4.0],
     ["gradients", -1, [0, 2, 3], 4.0, 9.0], ["optimizer", -1, [], 9.0, 9.5]],
    [["neighbour", -1, [0], 0.0, 1.0], ["forward", 0, [], 1.0, 2.0], ["backward", 0, [], 2.0, 3.0],
     ["gradients", -1, [1, 2, 3], 3.0, 9.0], ["optimizer", -1, [], 9.0, 9.5]],
    [["forward", 0, [], 0.0, 2.0], ["backward", 0, [], 2.0, 5.0], ["gradients", -1, [0, 2, 3], 5.0, 9.0]],
    [["forward", 0, [], 0.0, 4.0], ["backward", 0, [], 4.0, 8.8], ["gradients", -1, [0, 2, 3], 8.8, 9.0]],
]  # fmt: skip
SPANS = [[Span(kind, micro, tuple(whom), start, end) for kind, micro, whom, start, end in row] for row in TIMELINE]


def write_ranks(folder: Path, steps: int = 12, drawn: tuple[int, ...] = (1, 3, 12), **about: Any) -> None:
    """Add to the metrics of a stage what four ranks record."""
    folder.mkdir(parents=True, exist_ok=True)
    with MetricsWriter(folder, resume_step=10**9) as metrics:
        coordinates = {"groups": [0, 0, 1, 2], "replicas": [0, 0, 1, 2], "stages": [0, 1, 0, 0]}
        metrics.write("ranks", step=0, names=NAMES, **coordinates, **about)
        for step in range(1, steps + 1):
            where = {"step": step, "tokens": 100 * step, "seconds": 9.5 * step}
            metrics.write(
                "step_stats", **where, rows=[4, 2, 1], step_seconds=9.5,
                tokens_per_second=[2000.0, 1234.0, 500.0, 100.0], share=[0.4, 0.4, 0.4, 0.2],
                busy_seconds=[2.5] * 4, other_seconds=[0.0] * 4,
                wait_seconds={kind: [1.0 + (kind == "gradients")] * 4 for kind in WAITS},
                idle_share=[0.7, 0.7, 0.42, 0.02], memory_bytes=[2**30] * 4, sent_bytes=[1e6] * 4,
                received_bytes=[1e6] * 4, link_bytes_per_second=[2e6] * 4, loss_scales=[1.0] * 4,
            )  # fmt: skip
            if step in drawn:
                metrics.write("timeline", **where, step_seconds=9.5, spans=TIMELINE)


def words(run: Path) -> str:
    return Page(write_report(run, run / "report.html").read_text(encoding="utf-8")).text


def test_a_wait_is_for_the_neighbour_or_for_the_one_that_worked_last():
    waits = [
        (rank, waited_for(span, rank, SPANS)) for rank, row in enumerate(SPANS) for span in row if span.kind in WAITS
    ]
    assert waits == [(0, 1), (0, 3), (1, 0), (1, 3), (2, 3), (3, 2)]


def test_a_wait_before_anybody_worked_is_for_nobody_in_particular():
    rows = [[Span("numbers", -1, (), 0.0, 1.0)], [Span("other", -1, (), 0.0, 1.0)], [Span("other", -1, (), 0.0, 1.0)]]
    assert waited_for(rows[0][0], 0, rows) is None


def test_the_report_shows_the_ranks(tmp_path: Path):
    write_stage(tmp_path / "run")
    write_ranks(tmp_path / "run", predicted_step_seconds=8.0)
    page, text = write_report(tmp_path / "run", tmp_path / "report.html"), words(tmp_path / "run")
    assert "the ranks" in text
    for name in NAMES:
        assert name in text
    for fact in (
        "1,234",
        "42 %",
        "reduction of gradients",
        "1.0 GiB",
        "2 MB/s",
        "predicted by the plan: 8.00 s (+19 %)",
    ):
        assert fact in text.replace("\N{NO-BREAK SPACE}", " "), fact
    drawn = page.read_text(encoding="utf-8")
    assert "Timeline of step 3" in drawn
    assert "Timeline of step 12" in drawn
    assert "Timeline of step 1<" not in drawn  # still warming up
    assert "waiting for reduction of gradients, rank 3: 5.00 s" in drawn
    assert "waiting for a neighbouring pipeline stage, rank 1: 2.00 s" in drawn
    assert "ranks 0–1" in text
    assert "<chip>" not in drawn


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_ranks_that_have_just_begun_have_a_report_too(steps: int, tmp_path: Path):
    write_stage(tmp_path / "run", steps=3)
    write_ranks(tmp_path / "run", steps=steps, drawn=(1, 2))
    assert ("the ranks" in words(tmp_path / "run")) == (steps > 0)


def test_of_a_single_process_no_ranks_are_shown(tmp_path: Path):
    write_stage(tmp_path / "run")
    assert "the ranks" not in words(tmp_path / "run")


def test_a_run_that_resumes_on_fewer_ranks_shows_those(tmp_path: Path):
    run = tmp_path / "run"
    write_stage(run)
    write_ranks(run)
    with MetricsWriter(run, resume_step=10**9) as metrics:
        one = next(record for record in read_metrics(run) if record["kind"] == "step_stats")
        half: dict[str, Any] = {
            name: value[:2] if isinstance(value, list) else value for name, value in one.items() if name != "kind"
        }
        waits = {kind: values[:2] for kind, values in one["wait_seconds"].items()}
        metrics.write("ranks", step=12, names=["left", "over"], groups=[0, 1], replicas=[0, 1], stages=[0, 0])
        metrics.write("step_stats", **half | {"step": 13, "wait_seconds": waits})
    text = words(run)
    assert "2 ranks" in text
    assert "left" in text
    assert "smallest" not in text


def test_the_report_shows_what_islands_did(tmp_path: Path):
    run = tmp_path / "run"
    write_stage(run)
    with MetricsWriter(run, resume_step=10**9) as metrics:
        for number in (1, 2):
            metrics.write(
                "outer_step", step=10 * number, tokens=100, seconds=1.0, round=number, steps=10, inner_steps=[10, 5],
                island_tokens=[4000, 1234], busy_seconds=[60.0, 30.0], waited_seconds=[0.0, 15.0],
                bytes_sent=[2**20, 2**20], round_seconds=45.0,
            )  # fmt: skip
    text = words(run).replace("\N{NO-BREAK SPACE}", " ")
    for fact in ("the islands", "2 rounds, 45", "8,000", "2,468", "2 min 00 s", "30 s", "2.0 MiB"):
        assert fact in text, fact


def test_the_report_draws_who_waited_for_whom_before_outer_steps(tmp_path: Path):
    run = tmp_path / "run"
    write_stage(run)
    with MetricsWriter(run, resume_step=10**9) as metrics:
        places = {"groups": [0, 1, 2], "replicas": [0, 1, 2], "stages": [0, 0, 0]}
        metrics.write(
            "ranks", step=0, names=["left", "left", "right"], islands=[0, 0, 1], **places, predicted_step_seconds=8.0
        )
        step = [[["forward", 0, [], 0.0, 2.0 + late], ["gradients", -1, [0, 1], 2.0 + late, 9.5]] for late in (0, 2)]
        metrics.write("timeline", step=3, tokens=1, seconds=1.0, island=0, step_seconds=9.5, spans=step)
        for number in (1, 2, 3):
            where = {"step": 10 * number, "tokens": 100, "seconds": 1.0, "round": number}
            metrics.write(
                "step_stats", **where, rows=[4, 2, 1], step_seconds=10.0, tokens_per_second=[2000.0, 1234.0, 500.0],
                share=[0.3, 0.3, 0.4], busy_seconds=[2.5] * 3, other_seconds=[0.0] * 3,
                wait_seconds={kind: [1.0 + (kind == "meeting")] * 3 for kind in WAITS},
                idle_share=[0.7, 0.42, 0.02], memory_bytes=[2**30] * 3, sent_bytes=[1e6] * 3,
                received_bytes=[1e6] * 3, link_bytes_per_second=[2e6] * 3, loss_scales=[1.0] * 3,
            )  # fmt: skip
            early = [["steps", 20, [], 0.0, 4.0], ["meeting", 0, [2], 4.0, 9.0], ["outer", 0, [], 9.0, 10.0]]
            late = [["steps", 1, [], 0.0, 9.0], ["meeting", 0, [], 9.0, 9.5], ["meeting", -1, [0], 9.5, 10.0]]
            metrics.write("timeline", **where, step_seconds=10.0, spans=[early, early, late])
            metrics.write(
                "outer_step", **where, steps=10, inner_steps=[20, 1], island_tokens=[4000, 1234],
                busy_seconds=[60.0, 30.0], waited_seconds=[0.0, 15.0], bytes_sent=[2**20, 2**20], round_seconds=10.0,
            )  # fmt: skip
    drawn = write_report(run, tmp_path / "report.html").read_text(encoding="utf-8")
    for fact in (
        "the ranks of all islands", "by round",
        "3 ranks; a round takes 10.00 s (median of 2); predicted by the plan: 8.00 s of computing (+25 %)",
        "Timeline of step 3 of island 0", "Timeline of round 2", "Timeline of round 3",
        "island 1 · rank 2", "20 steps: 4.00 s", "1 step: 9.00 s", "waiting for fragment 0, for rank 2: 5.00 s",
        "waiting for fragment 0: 500 ms", "waiting for the end of the round, for rank 0: 500 ms",
        "outer step of fragment 0: 1.00 s",
    ):  # fmt: skip
        assert fact in drawn, fact
    assert "Timeline of round 1<" not in drawn  # still warming up
    assert "other islands" in Page(drawn).text
