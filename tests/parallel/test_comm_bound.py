"""A crew joined by a slow link is told so, once, and how to do better."""

from pathlib import Path
from typing import Any

import pytest
from commands import command, events
from spawned_ranks import run_ranks

from motley.parallel.telemetry.comm_bound import IN_A_ROW, CommBoundWatch
from motley.parallel.telemetry.step_stats import StepStats
from motley.parallel.telemetry.step_timer import KINDS
from motley.train.config import TrainingConfig

SLOW_LINK = """
pools:
  - {name: here, chip: desktop-core, chips_per_node: 1}
  - {name: there, chip: desktop-core, chips_per_node: 1, emulated: {speed: 1.0, link: {bandwidth: 1 Mb/s}}}
"""


def step(*workers: dict[str, float]) -> StepStats:
    """A step in which each worker spent so many seconds at each kind of thing."""
    seconds = [dict.fromkeys(KINDS, 0.0) | worker for worker in workers]
    return StepStats(step_seconds=max(sum(worker.values()) for worker in seconds), seconds=seconds)


SLOW = step({"forward": 1.0, "gradients": 1.0, "spreading": 0.5}, {"forward": 0.5, "gradients": 1.5, "spreading": 0.5})
QUICK = step({"forward": 20.0, "gradients": 1.0}, {"forward": 5.0, "gradients": 16.0})
"""Worker 1 waits most of the step, but for worker 0."""


def test_what_a_worker_waits_for_a_slower_one_is_no_fault_of_the_link() -> None:
    assert (SLOW.exchange_seconds, QUICK.exchange_seconds) == (1.5, 1.0)
    seen = CommBoundWatch()
    assert [seen.complaint(QUICK, TrainingConfig()) for _ in range(10)] == [[]] * 10


def test_messages_that_take_most_of_several_steps_in_a_row_are_said_once() -> None:
    seen = CommBoundWatch()
    steps = [SLOW, QUICK, *[SLOW] * (IN_A_ROW + 5)]
    said = [seen.complaint(timing, TrainingConfig()) for timing in steps]
    assert [len(messages) for messages in said] == [0] * (IN_A_ROW + 1) + [1] + [0] * 5
    ((sentence,),) = (messages for messages in said if messages)
    assert sentence.startswith("gradients and weights travel for 1.5 s of a step of 2.5 s: these links are slow, and ")
    assert "--islands N or a plan for measured links" in sentence


def test_what_the_sentence_advises_can_be_done() -> None:
    for config, advised in (
        (TrainingConfig(elastic=True), "--islands N, without --elastic, or a plan"),
        (TrainingConfig(plan=Path("plan.json")), "measure them (`motley fleet probe` under torchrun) and plan again"),
    ):
        seen = CommBoundWatch(slow=IN_A_ROW)
        (sentence,) = seen.complaint(SLOW, config)
        assert advised in sentence
        assert ("--islands" in sentence) == (config.plan is None)


def test_messages_as_short_as_a_busy_machine_makes_them_are_not_spoken_of() -> None:
    seen, tiny = CommBoundWatch(), step({"forward": 0.001, "gradients": 0.3}, {"forward": 0.001, "gradients": 0.3})
    assert [seen.complaint(tiny, TrainingConfig()) for _ in range(10)] == [[]] * 10


@pytest.mark.slow(20)
def test_a_crew_over_a_slow_link_is_told_so_in_the_terminal_and_in_the_metrics(
    data: Path, shape: Path, tmp_path: Path
) -> None:
    out, fleet = tmp_path / "run", tmp_path / "fleet.yaml"
    fleet.write_text(SLOW_LINK)
    settings: dict[str, Any] = {"precision": "fp32", "emulate": fleet, "emulate_by": "wait", "steps": IN_A_ROW + 1}
    arguments = command(out, data, shape, seq_len_warmup="", valid_rows=2, **settings)
    done = run_ranks(2, arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("gradients and weights travel for ") == 1
    (event,) = events(out)
    assert event.startswith("gradients and weights travel for ")
    assert event.endswith("else give more --batch-rows")
