"""What the demo will do on this machine, and how long each stage should take.

time for the journey  −  measuring and trying (spent already)
                      −  data, problems, evaluation, report (measured on one machine, scaled by speed)
                      =  training, split between pretraining and fine-tuning
steps of each         =  its time / seconds of one real step, tried on this machine
"""

import dataclasses
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from motley.fleet.device import ACTIVATIONS, choose_device, number_format
from motley.fleet.probe import Machine
from motley.journey.trial import step_seconds
from motley.model import SIZES, ModelConfig
from motley.progress import in_words, note
from motley.train.config import FinetuneConfig, PretrainConfig

VOCAB_SIZE = 2048  # a small head leaves more of the time to the layers
PRETRAINING_SHARE = 0.3  # of the training time; the rest teaches the skill
TOKENS_PER_PROBLEM = 62  # mean length of a conversation, all families
SPARE_PROBLEMS = 1.1  # rows are not filled to the last token
EVALUATED = 500  # standard error at most 2.2 %
# Seconds of the other stages on the machine where they were measured (two cores), and its fp32 rate.
MEASURED_SECONDS = {"data": 8.0, "problems": 2.0, "eval": 11.0, "export": 0.5, "report": 1.5}
MEASURED_FP32_GFLOPS = 190.0
OVERHEAD = 1.06  # reading rows, validation and checkpoints, on top of the steps themselves
FIXED_SECONDS = 4.0  # of a training stage: packing, first steps, writing the model
FEWEST_STEPS = 20
FEWEST_EVALUATED = 60  # so little training does not deserve more: a model that learned nothing never stops talking


@dataclass(frozen=True)
class DemoPlan:
    """The plan: everything the stages are asked to do, and the seconds each should take."""

    size: str
    vocab_size: int
    pretrain: PretrainConfig
    finetune: FinetuneConfig
    problems: int
    evaluated: int
    seconds: dict[str, float]

    def shape(self, vocab_size: int) -> ModelConfig:
        return dataclasses.replace(SIZES[self.size], vocab_size=vocab_size)

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
        first, second = dict(values["pretrain"]), dict(values["finetune"])
        first |= {"out": Path(first["out"]), "data": tuple(first["data"])}
        second |= {"out": Path(second["out"]), "data": tuple(second["data"]), "model": Path(second["model"])}
        return cls(**values | {"pretrain": PretrainConfig(**first), "finetune": FinetuneConfig(**second)})


def make_plan(machine: Machine, minutes: float, seed: int, spent: float = 0.0) -> DemoPlan:
    """Fit the journey into `minutes`, of which measuring took `spent` seconds and the trial here takes some more.

    Where that is less than the fewest steps worth while take here, those are planned, and it is said aloud.
    """
    started = time.monotonic() - spent
    size = "nano" if machine.device == "cpu" else "micro"
    first = PretrainConfig(model=size, batch_rows=16, seq_len=256, micro_batch=16, learning_rate=4e-3, seed=seed)
    second = FinetuneConfig(batch_rows=8, seq_len=256, micro_batch=8, learning_rate=3e-3, seed=seed)
    device = choose_device("auto")
    dtype = ACTIVATIONS[number_format("auto", lambda: machine)]
    shape = dataclasses.replace(SIZES[size], vocab_size=VOCAB_SIZE)
    first_step = sum(step_seconds(shape, first, device, dtype))
    second_step = sum(step_seconds(shape, second, device, dtype))

    slower = MEASURED_FP32_GFLOPS / machine.peak_gflops("fp32") if device.type == "cpu" else 1.0
    seconds = {name: value * max(slower, 0.5) for name, value in MEASURED_SECONDS.items()}
    training = 60 * minutes - (time.monotonic() - started) - sum(seconds.values()) - 2 * FIXED_SECONDS
    first_steps = int(PRETRAINING_SHARE * training / (first_step * OVERHEAD))
    second_steps = int((1 - PRETRAINING_SHARE) * training / (second_step * OVERHEAD))
    evaluated = EVALUATED
    if min(first_steps, second_steps) < FEWEST_STEPS:
        evaluated = FEWEST_EVALUATED
        first_steps, second_steps = max(first_steps, FEWEST_STEPS), max(second_steps, FEWEST_STEPS)
        longer = (first_steps * first_step + second_steps * second_step) * OVERHEAD - training
        note(
            f"--minutes {minutes:g} is too short for this machine (a step takes {first_step:.2f} s): the fewest steps "
            f"worth while take about {in_words(60 * minutes + longer)}, and the answers will be poor"
        )
    first = _with_steps(first, first_steps)
    second = _with_steps(second, second_steps)
    seconds["pretrain"] = first_steps * first_step * OVERHEAD + FIXED_SECONDS
    seconds["sft"] = second_steps * second_step * OVERHEAD + FIXED_SECONDS
    problems = round(second_steps * second.batch_rows * second.seq_len / TOKENS_PER_PROBLEM * SPARE_PROBLEMS)
    return DemoPlan(size, VOCAB_SIZE, first, second, problems, evaluated, seconds)


def _with_steps(config: Any, steps: int) -> Any:
    every = max(1, steps // 5)
    return dataclasses.replace(config, steps=steps, valid_every=every, checkpoint_every=every)
