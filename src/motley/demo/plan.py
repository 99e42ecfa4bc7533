"""What the demo will do on this machine, and how long each stage should take.

time for the journey  −  measuring and trying (spent already)
                      −  data, problems, evaluation, report (measured on one machine, scaled by the speed of Python)
                      =  training
level (levels.py)     =  the richest whose tokens fit into it, at the seconds of real steps tried on this machine
steps of each stage   =  its share of the time / seconds of one such step

Before each training stage the plan is looked at again with the time that is left of what was promised (`replan`).
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from motley.demo.levels import Level, level_named, levels_of
from motley.demo.trial import slowness, step_seconds
from motley.errors import InputError
from motley.fleet.device import choose_device, number_format
from motley.fleet.probe import Machine, in_gigabytes
from motley.model import ModelConfig
from motley.plan.network.flops import training_flops_per_token
from motley.progress import in_words, note
from motley.train.config import PretrainConfig, SftConfig, TrainingConfig

SPARE_PROBLEMS = 1.1  # rows are not filled to the last token
REPEATED = 1.5  # each problem may come so often before others are written
EVALUATED = 500  # standard error at most 2.2 %
# Seconds of the other stages on two quiet cores of an AMD EPYC with AVX2, which `slowness` compares with.
DATA_SECONDS, SECONDS_PER_TEXT_BYTE = 4.0, 0.6e-6
SECONDS_PER_PROBLEM = 8e-5
FIXED_STAGES = {"eval": 13.0, "export": 0.5, "report": 1.5}
OVERHEAD = 1.06  # reading rows, validation and checkpoints, on top of the steps themselves
FIXED_SECONDS = 4.0  # of a training stage: packing, first steps, writing the model
TRIAL_STEPS = 30  # of one network
TRIAL_SECONDS = 5.0  # after which no further step of it is tried
FEWEST_STEPS = 20
FEWEST_EVALUATED = 60  # so little training does not deserve more: a model that learned nothing never stops talking
TEXT_BYTES_PER_TOKEN = 5  # more than a token stands for, so that no text is read twice
LEAST_TEXT_BYTES, MOST_TEXT_BYTES = 4_000_000, 32_000_000  # fewer make a poor vocabulary, more are never read
MEMORY_BYTES = 1.5e9  # of the whole demo, PyTorch included (it held 0.9 GB at most)

Paces = Mapping[str, tuple[float, float]]
"""Seconds of one step of each level that was tried, by its name: of pretraining, of fine-tuning."""


@dataclass(frozen=True)
class DemoPlan:
    """The plan: everything the stages are asked to do, and the seconds each should take.

    Attributes:
        level: name of what is learned.
        pretrain, finetune: settings of the training stages.
        problems: conversations to write.
        evaluated: fresh problems asked at the end.
        text_bytes: read of the text, at most.
        step_seconds: of pretraining and fine-tuning, as tried.
        enough_minutes: for the whole journey, after which the level's accuracy was seen; None if this plan has that.
        seconds: of each stage, by name.
    """

    level: str
    pretrain: PretrainConfig
    finetune: SftConfig
    problems: int
    evaluated: int
    text_bytes: int
    step_seconds: tuple[float, float]
    enough_minutes: float | None
    seconds: dict[str, float]

    @property
    def seed(self) -> int:
        return self.pretrain.seed

    @property
    def skill(self) -> Level:
        return level_named(self.level)

    @property
    def size(self) -> str:
        return self.skill.size

    @property
    def vocab_size(self) -> int:
        return self.skill.vocab_size

    @property
    def families(self) -> tuple[str, ...]:
        return self.skill.families

    def shape(self, vocab_size: int) -> ModelConfig:
        return dataclasses.replace(self.skill.shape, vocab_size=vocab_size)

    @property
    def pretrain_tokens(self) -> int:
        return self.pretrain.steps * self.pretrain.batch_rows * self.pretrain.seq_len

    @property
    def finetune_tokens(self) -> int:
        return self.finetune.steps * self.finetune.batch_rows * self.finetune.seq_len

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        for stage in ("pretrain", "finetune"):
            values[stage] = {name: str(v) if isinstance(v, Path) else v for name, v in values[stage].items()}
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "DemoPlan":
        """The inverse of `to_json`. Raises InputError for the plan of another version."""
        try:
            first, second = dict(values["pretrain"]), dict(values["finetune"])
            first |= {"out": Path(first["out"]), "data": tuple(first["data"])}
            second |= {"out": Path(second["out"]), "data": tuple(second["data"]), "model": Path(second["model"])}
            made: dict[str, Any] = {
                "pretrain": PretrainConfig.of_saved(first), "finetune": SftConfig.of_saved(second),
                "step_seconds": tuple(values["step_seconds"]),
            }  # fmt: skip
            plan = cls(**values | made)
            level_named(plan.level)
        except (KeyError, TypeError) as error:
            raise InputError(
                f"the plan of this demo was made by another version of motley ({error}); choose another --out, or "
                "remove the folder to begin again"
            ) from None
        return plan


def make_plan(
    machine: Machine, minutes: float, seed: int, spent: float = 0.0, levels: Sequence[Level] | None = None
) -> DemoPlan:
    """Try steps of the networks and fit the journey into `minutes`, of which measuring took `spent` seconds already.

    levels: the richest first; None takes those for this kind of device.

    Where that is less than the easiest level needs here, as much as fits is planned (`warnings` says so).
    """
    started = time.monotonic() - spent
    slower = slowness()
    paces: dict[str, tuple[float, float]] = {}
    known: dict[tuple[Any, ...], float] = {}  # levels may share a network and its steps

    def tried(level: Level) -> tuple[float, float]:
        pair = []
        for config in (level.pretrain, level.finetune):
            key = (level.shape, config.batch_rows, config.seq_len, config.mtp_weight)
            if key not in known:
                note(f"trying a few steps of the network `{level.size}`")
                known[key] = _step_seconds(level, config, machine)
            pair.append(known[key])
        return pair[0], pair[1]

    levels = levels or levels_of(machine.device)
    for level in levels:
        left = 60 * minutes - (time.monotonic() - started) - sum(other_seconds(level, slower).values())
        if level is not levels[-1] and least_seconds(level, machine) > left:
            continue
        paces[level.name] = tried(level)
        if training_seconds(level, paces[level.name]) <= left:
            break
    return fitted(levels, paces, slower, minutes, time.monotonic() - started, seed)


def _step_seconds(level: Level, config: TrainingConfig, machine: Machine) -> float:
    chosen = number_format("auto", lambda: machine)
    device = choose_device("auto")
    return sum(step_seconds(level.shape, config, device, chosen, steps=TRIAL_STEPS, within=TRIAL_SECONDS))


def other_seconds(level: Level, slower: float, times: float = 1.0) -> dict[str, float]:
    """What the stages beside training should take.

    Args:
        level: what is trained.
        slower: than the machine where they were measured, so many times.
        times: the level's tokens, so many times.
    """
    text, problems = text_bytes(times * level.pretrain_tokens), times * problems_for(level, level.finetune_tokens)
    seconds = {
        "data": DATA_SECONDS + text * SECONDS_PER_TEXT_BYTE, "problems": problems * SECONDS_PER_PROBLEM, **FIXED_STAGES,
    }  # fmt: skip
    return {name: value * slower for name, value in seconds.items()}


def text_bytes(tokens: float) -> int:
    """Of text to read for so many tokens of pretraining."""
    return round(min(max(TEXT_BYTES_PER_TOKEN * tokens, LEAST_TEXT_BYTES), MOST_TEXT_BYTES))


def problems_for(level: Level, tokens: float) -> int:
    """To write for so many tokens of fine-tuning."""
    return round(tokens / level.tokens_per_problem * SPARE_PROBLEMS)


def training_seconds(level: Level, pace: tuple[float, float]) -> float:
    """Of both training stages with all the tokens that the level needs."""
    steps = (level.pretrain_tokens / tokens_of(level.pretrain), level.finetune_tokens / tokens_of(level.finetune))
    return sum(number * seconds for number, seconds in zip(steps, pace, strict=True)) * OVERHEAD + 2 * FIXED_SECONDS


def least_seconds(level: Level, machine: Machine) -> float:
    """Of the same at the fastest product that the machine was seen to make: what takes longer need not be tried."""
    tokens = level.pretrain_tokens + level.finetune_tokens
    return training_flops_per_token(level.shape, level.finetune.seq_len) * tokens / (1e9 * machine.peak_gflops())


def tokens_of(config: TrainingConfig) -> int:
    """Of one step."""
    return config.batch_rows * config.seq_len


def fitted(levels: Sequence[Level], paces: Paces, slower: float, minutes: float, spent: float, seed: int) -> DemoPlan:
    """The plan for measured seconds of steps; nothing is measured here.

    Args:
        levels: the richest first.
        paces: seconds of steps of the levels that were tried.
        slower: as in `other_seconds`.
        minutes: for the whole journey.
        spent: seconds of them that measuring took.
        seed: of everything.
    """

    def left(level: Level, times: float = 1.0) -> float:
        return 60 * minutes - spent - sum(other_seconds(level, slower, times).values())

    tried = [level for level in levels if level.name in paces]
    level = next((one for one in tried if training_seconds(one, paces[one.name]) <= left(one)), tried[-1])
    pace = paces[level.name]
    needed = training_seconds(level, pace)
    enough = None if needed <= left(level) else math.ceil(2.1 * (needed + 60 * minutes - left(level)) / 60) / 2
    times = max(0.01, left(level) / needed)  # as many tokens as the level asks for, about
    training = left(level, times)
    share = level.pretrain_tokens / tokens_of(level.pretrain) * pace[0] * OVERHEAD / (needed - 2 * FIXED_SECONDS)
    plan = DemoPlan(
        level.name, dataclasses.replace(level.pretrain, seed=seed), dataclasses.replace(level.finetune, seed=seed),
        problems=0, evaluated=EVALUATED, text_bytes=text_bytes(times * level.pretrain_tokens), step_seconds=pace,
        enough_minutes=enough, seconds=other_seconds(level, slower, times),
    )  # fmt: skip
    return _both_stages(plan, share, training)


def warnings(plan: DemoPlan, machine: Machine, minutes: float, longer: str) -> list[str]:
    """What is to be said before it starts: that memory, machine or time are too small, and what helps.

    longer: the command for a demo of `plan.enough_minutes`.
    """
    said = []
    if machine.available_memory_bytes < MEMORY_BYTES:
        said.append(
            f"only {in_gigabytes(machine.available_memory_bytes)} of memory are free and the demo needs about "
            f"{in_gigabytes(int(MEMORY_BYTES))}: end other programs, or the system may end this one"
        )
    if plan.enough_minutes is not None:
        said.append(
            f"--minutes {minutes:g} is too short for this machine (a step takes {plan.step_seconds[1]:.2f} s): the "
            f"easiest {len(plan.families)} kinds of problem need about {in_words(60 * plan.enough_minutes)} here, and "
            f"in less the answers will be poor. The longer run: {longer}"
        )
    return said


def replan(plan: DemoPlan, stage: str, left: float, step: float, levels: Sequence[Level] = ()) -> DemoPlan:
    """The plan with the training that is still to come fitted into the time that is left.

    Before fine-tuning the level may change to another of the same network, which asks for more or less.

    Args:
        plan: so far.
        stage: the training stage that is next, "pretrain" or "sft".
        left: seconds of what was promised, for this stage and all behind it.
        step: seconds of a step of fine-tuning, as measured last.
        levels: the richest first; those of another network are passed over.
    """
    written = plan
    training = left - sum(plan.seconds[name] for name in ("eval", "export", "report"))
    reading = plan.step_seconds[0] * step / plan.step_seconds[1]
    plan = dataclasses.replace(plan, step_seconds=(reading, step))
    if stage == "pretrain":
        first, second = (plan.seconds[name] - FIXED_SECONDS for name in ("pretrain", "sft"))
        new = _both_stages(plan, first / (first + second), training)
    else:
        plan = _at_level(plan, levels, training - FIXED_SECONDS)
        new = _with_steps(plan, "sft", training)
    enough = new.level == written.level and new.problems <= REPEATED * written.problems
    return dataclasses.replace(new, problems=written.problems) if enough else new


def step_again(plan: DemoPlan, machine: Machine, pretrain_seconds: float) -> float:
    """Seconds of a step of fine-tuning, measured once more: between what is tried now and the pace of pretraining.

    A trial sees a moment, pretraining a past; other work may end or begin after either.

    pretrain_seconds: that pretraining took.
    """
    trial = _step_seconds(plan.skill, plan.finetune, machine)
    pace = pretrain_seconds / (plan.pretrain.steps * OVERHEAD * plan.step_seconds[0]) * plan.step_seconds[1]
    return math.sqrt(trial * pace)


def _at_level(plan: DemoPlan, levels: Sequence[Level], training: float) -> DemoPlan:
    """The richest level of the plan's network whose fine-tuning takes at most `training` seconds, else the easiest."""
    able = [level for level in levels if level.shape == plan.skill.shape] or [plan.skill]
    step = plan.step_seconds[1] * OVERHEAD
    found = next((one for one in able if one.finetune_tokens / tokens_of(one.finetune) * step <= training), able[-1])
    return dataclasses.replace(plan, level=found.name, finetune=dataclasses.replace(found.finetune, seed=plan.seed))


def _both_stages(plan: DemoPlan, share: float, training: float) -> DemoPlan:
    """The plan with `share` of the seconds of training for reading; fine-tuning has what is left."""
    plan = _with_steps(plan, "pretrain", share * (training - 2 * FIXED_SECONDS) + FIXED_SECONDS)
    return _with_steps(plan, "sft", training - plan.seconds["pretrain"])


def _with_steps(plan: DemoPlan, stage: str, seconds: float) -> DemoPlan:
    """The plan with the steps of a training stage that fit into its time, or the fewest; and what depends on them."""
    name, index = ("pretrain", 0) if stage == "pretrain" else ("finetune", 1)
    each = plan.step_seconds[index] * OVERHEAD
    steps = int((seconds - FIXED_SECONDS) / each)
    evaluated = FEWEST_EVALUATED if stage == "sft" and steps < FEWEST_STEPS else plan.evaluated
    steps = max(steps, FEWEST_STEPS)
    every = max(1, steps // 5)
    config = dataclasses.replace(getattr(plan, name), steps=steps, valid_every=every, checkpoint_every=every)
    foreseen = plan.seconds | {stage: steps * each + FIXED_SECONDS}
    plan = dataclasses.replace(plan, seconds=foreseen, evaluated=evaluated, **{name: config})
    return dataclasses.replace(plan, problems=problems_for(plan.skill, plan.finetune_tokens))
