"""Schedules played through: every micro-batch is worked on once, in order, within the memory a stage has."""

import random
from itertools import pairwise

import pytest

from motley.plan.cost_model.configs import Schedule
from motley.plan.cost_model.pipeline_trace import TracedWork, timeline

EACH = {"1f1b": "FB", "zero_bubble": "FBW", "dualpipe": "FBW"}


def length(rows: list[list[TracedWork]]) -> float:
    return max(work.end for row in rows for work in row)


@pytest.mark.parametrize("schedule", EACH)
def test_every_micro_batch_passes_every_stage_once_and_in_order(schedule: Schedule):
    draw = random.Random(3)
    for _ in range(40):
        pp, count = draw.choice((1, 2, 4, 6, 10)), draw.randint(1, 70)
        seconds = [(draw.uniform(0.1, 2), draw.uniform(0.1, 2), draw.uniform(0.1, 2)) for _ in range(pp)]
        rows = timeline(seconds, count, schedule)
        works = {(work.kind, work.stage, work.micro_batch): work for row in rows for work in row}
        assert len(works) == sum(map(len, rows)) == len(EACH[schedule]) * pp * count
        for (kind, stage, micro), work in works.items():
            if kind == "F" and stage:
                assert work.start >= works["F", stage - 1, micro].end
            if kind == "B":
                before = works["F", stage, micro] if stage == pp - 1 else works["B", stage + 1, micro]
                assert work.start >= before.end
            if kind == "W":
                assert work.start >= works["B", stage, micro].end


@pytest.mark.parametrize("schedule", EACH)
def test_a_chip_does_one_thing_at_a_time_and_holds_what_it_has_room_for(schedule: Schedule):
    pp, count = 8, 40
    for row in timeline([(1.0, 1.2, 0.8)] * pp, count, schedule):
        assert all(one.end <= other.start for one, other in pairwise(row))
        held, most = 0, 0
        for work in row:
            held += {"F": 1, "B": -1, "W": 0}[work.kind]
            most = max(most, held)
        assert most <= (pp + 1 if schedule == "dualpipe" else pp - row[0].stage)


@pytest.mark.parametrize(("pp", "count"), [(2, 8), (4, 20), (8, 16), (16, 69)])
def test_bubbles_are_those_of_the_formulas(pp: int, count: int):
    forward, inputs, weights = 1.0, 1.0, 1.0
    whole = count * (forward + inputs + weights)
    assert length(timeline([(1.0, 1.0, 1.0)] * pp, count, "1f1b")) - whole == (pp - 1) * (forward + inputs + weights)
    zero = (pp - 1) * (forward + inputs + weights - 2 * weights)
    assert length(timeline([(1.0, 1.0, 1.0)] * pp, count, "zero_bubble")) - whole == zero
    dual = (pp / 2 - 1) * (2 * forward + 2 * inputs + weights - 3 * weights)  # F and B one after the other
    assert 0 <= length(timeline([(1.0, 1.0, 1.0)] * pp, count, "dualpipe")) - whole <= dual
