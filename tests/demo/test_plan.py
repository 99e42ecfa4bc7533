"""What fits a machine is planned from measured seconds of steps: fast, slow and tiny machines are numbers here."""

import dataclasses
import json
from pathlib import Path

import pytest

from motley.data.tasks import fresh_problems, make_problems, substance
from motley.demo.demo import DemoConfig, longer_command
from motley.demo.levels import ACCELERATOR_LEVELS, LEVELS, Level
from motley.demo.plan import (
    FEWEST_STEPS,
    FIXED_SECONDS,
    DemoPlan,
    fitted,
    replan,
    tokens_of,
    training_seconds,
    warnings,
)
from motley.demo.show import replanned
from motley.errors import InputError
from motley.fleet.probe import Machine, MatmulRate, host_memory

MINUTES = 8.0
SPENT = 15.0


def machine(available: float = 8e9) -> Machine:
    rate = MatmulRate("fp32", 2048, 2048, 2048, 100.0)
    return Machine("cpu", "a chip", 2, 2, int(16e9), int(available), None, (rate,), 20.0, "fp32")


def paces(tokens_per_second: float) -> dict[str, tuple[float, float]]:
    """As if `pico` took so many tokens a second and larger networks fewer."""
    found = {}
    for level in LEVELS:
        rate = tokens_per_second * (1.0 if level.size == "pico" else 0.4)
        found[level.name] = (tokens_of(level.pretrain) / rate, tokens_of(level.finetune) / rate)
    return found


def planned(tokens_per_second: float, minutes: float = MINUTES, slower: float = 1.0) -> DemoPlan:
    return fitted(LEVELS, paces(tokens_per_second), slower, minutes, SPENT, seed=0)


def rate_for(level: Level, minutes: float = MINUTES) -> float:
    """Tokens a second at which the level just fits into the time."""
    plans = ((rate, planned(rate, minutes)) for rate in range(200, 200_000, 100))
    return next(rate for rate, plan in plans if plan.level == level.name and plan.enough_minutes is None)


def test_the_slower_the_machine_the_smaller_the_skill_and_never_less_than_three_kinds() -> None:
    levels = [planned(rate).skill for rate in (300_000, 100_000, 30_000, 10_000, 5_000, 2_000, 800, 100)]
    places = [LEVELS.index(level) for level in levels]
    assert places == sorted(places)
    assert (places[0], places[-1]) == (0, len(LEVELS) - 1)
    assert all(len(level.families) >= 3 for level in ACCELERATOR_LEVELS)
    assert len({len(level.families) for level in levels}) > 1


def test_a_level_is_planned_only_where_its_tokens_fit() -> None:
    for level in LEVELS:
        plan = planned(rate_for(level))
        assert plan.level == level.name
        assert plan.enough_minutes is None
        assert plan.finetune_tokens > 0.97 * level.finetune_tokens
        assert plan.pretrain_tokens > 0.9 * level.pretrain_tokens


@pytest.mark.parametrize("tokens_per_second", [200_000, 40_000, 12_000, 6_000, 3_000, 700])
@pytest.mark.parametrize("slower", [0.5, 1.0, 3.0])
def test_what_is_planned_ends_when_the_time_is_over(tokens_per_second: float, slower: float) -> None:
    plan = planned(tokens_per_second, slower=slower)
    assert 0.95 * 60 * MINUTES <= SPENT + sum(plan.seconds.values()) <= 60 * MINUTES


def test_where_even_the_easiest_is_too_much_it_says_so_and_offers_the_time_that_is_enough() -> None:
    plan = planned(150)
    assert plan.level == LEVELS[-1].name
    assert plan.enough_minutes is not None
    assert plan.pretrain.steps >= FEWEST_STEPS
    longer = planned(150, minutes=plan.enough_minutes)
    assert longer.enough_minutes is None, "the longer run that is offered is long enough"
    (said,) = warnings(plan, machine(), MINUTES, f"motley demo --minutes {plan.enough_minutes:g}")
    assert "--minutes 8 is too short for this machine" in said
    assert said.endswith(f"The longer run: motley demo --minutes {plan.enough_minutes:g}")


def test_the_longer_run_goes_to_a_folder_of_its_own_and_keeps_what_was_asked() -> None:
    config = DemoConfig(out=Path("runs/my demo"), data=("my notes",), seed=3)
    command = longer_command(config, 22.5)
    assert command.endswith("demo --out 'runs/my demo-22.5-minutes' --minutes 22.5 --seed 3 --data 'my notes'")


def test_no_time_at_all_still_trains_the_fewest_steps() -> None:
    plan = planned(100, minutes=0.1)
    assert plan.pretrain.steps == plan.finetune.steps == FEWEST_STEPS
    assert plan.evaluated < 500
    assert plan.seconds["sft"] == pytest.approx(FEWEST_STEPS * plan.step_seconds[1] * 1.06 + FIXED_SECONDS)


def test_low_memory_is_said(tmp_path: Path) -> None:
    plan = planned(20_000)
    assert warnings(plan, machine(), MINUTES, "") == []
    (tmp_path / "memory.max").write_text(str(1_200_000_000))
    (tmp_path / "memory.current").write_text(str(200_000_000))
    _, free = host_memory(cgroups=tmp_path)
    assert free <= 1_000_000_000
    (said,) = warnings(plan, machine(free), MINUTES, "")
    assert "of memory are free" in said


def test_four_gigabytes_are_enough_memory() -> None:
    assert warnings(planned(20_000), machine(3.2e9), MINUTES, "") == []


# ------------------------------------------------------------------------------------------------ again


def test_a_plan_made_again_ends_when_the_first_promised() -> None:
    plan = planned(20_000)
    training = plan.seconds["pretrain"] + plan.seconds["sft"]
    behind = sum(plan.seconds[name] for name in ("eval", "export", "report"))
    for late in (-20.0, 0.0, 60.0):
        left = training + behind - late
        again = replan(plan, "pretrain", left, plan.step_seconds[1], LEVELS)
        assert again.seconds["pretrain"] + again.seconds["sft"] + behind == pytest.approx(left, abs=1)
        assert again.pretrain.steps == pytest.approx(plan.pretrain.steps * (training - late) / training, rel=0.05)


@pytest.mark.parametrize("times", [0.5, 1.0, 2.0])
def test_a_machine_that_became_slower_or_faster_gets_fewer_or_more_steps_of_fine_tuning(times: float) -> None:
    plan = planned(1.1 * rate_for(LEVELS[1]))
    left = sum(plan.seconds[name] for name in ("sft", "eval", "export", "report"))
    again = replan(plan, "sft", left, times * plan.step_seconds[1], LEVELS)
    assert again.finetune.steps == pytest.approx(plan.finetune.steps / times, rel=0.02)
    assert again.pretrain == plan.pretrain, "what is done keeps its plan"
    assert again.seconds["sft"] == pytest.approx(plan.seconds["sft"], abs=2 * times * plan.step_seconds[1] * 1.06)


def test_the_skill_follows_the_time_that_is_left_within_the_same_network() -> None:
    plan = planned(1.05 * rate_for(LEVELS[1]))
    left = sum(plan.seconds[name] for name in ("sft", "eval", "export", "report"))
    slow = replan(plan, "sft", left, 20 * plan.step_seconds[1], LEVELS)
    fast = replan(slow, "sft", left, plan.step_seconds[1] / 20, LEVELS)
    assert slow.level == LEVELS[-1].name
    assert fast.level == LEVELS[1].name, "the richest of this network"
    assert fast.shape(512) == slow.shape(512) == plan.shape(512)
    said = replanned(plan, slow, "sft", left)
    assert said is not None
    assert "instead of" in said
    assert "other problems" in said


def test_more_problems_are_written_only_where_training_would_repeat_the_first_too_often() -> None:
    plan = planned(1.1 * rate_for(LEVELS[1]))
    left = sum(plan.seconds[name] for name in ("sft", "eval", "export", "report"))
    assert replan(plan, "sft", left, plan.step_seconds[1] / 1.2, LEVELS).problems == plan.problems
    assert replan(plan, "sft", left, plan.step_seconds[1] / 3, LEVELS).problems > 2 * plan.problems


def test_a_small_change_is_not_worth_a_line() -> None:
    plan = planned(20_000)
    left = sum(plan.seconds[name] for name in ("sft", "eval", "export", "report"))
    assert replanned(plan, replan(plan, "sft", left, plan.step_seconds[1], LEVELS), "sft", left) is None


# ------------------------------------------------------------------------------------------------ levels


@pytest.mark.parametrize("level", ACCELERATOR_LEVELS, ids=lambda level: level.name)
def test_a_level_has_enough_fresh_problems_that_no_training_draw_contains(level: Level) -> None:
    fresh = list(fresh_problems(level.families, 500, 0, set()))
    assert len({substance(problem.question) for problem in fresh}) == 500
    trained = {substance(problem.question) for problem in make_problems(level.families, 4000, 0)}
    assert not trained & {substance(problem.question) for problem in fresh}


@pytest.mark.parametrize("level", ACCELERATOR_LEVELS, ids=lambda level: level.name)
def test_a_level_says_what_it_needs_consistently(level: Level) -> None:
    assert level.pretrain.model == level.size
    shape = level.shape
    widths = (shape.hidden_size, shape.intermediate_size, shape.moe_intermediate_size, shape.qk_nope_head_dim,
              shape.qk_rope_head_dim, shape.v_head_dim, shape.vocab_size)  # fmt: skip
    assert all(width % 16 == 0 for width in widths), "the CPU kernels need whole vectors"
    assert training_seconds(level, (1.0, 1.0)) > 2 * FIXED_SECONDS


def test_a_plan_survives_the_journeys_file_and_that_of_another_version_is_refused() -> None:
    plan = planned(20_000)
    values = json.loads(json.dumps(plan.to_json()))
    assert DemoPlan.from_json(values) == plan
    for broken in (values | {"level": "unheard of"}, {"size": "nano"}, values | {"surplus": 1}):
        with pytest.raises(InputError, match="another version of motley"):
            DemoPlan.from_json(broken)
    assert dataclasses.replace(plan, problems=1) != plan
