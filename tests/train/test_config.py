"""A setting that cannot be meant is refused by name, before anything is read or trained."""

import math
from typing import Any

import pytest

from motley.errors import InputError
from motley.train.config import FinetuneConfig, PretrainConfig, TrainingConfig

BAD: dict[str, list[Any]] = {
    "steps": [0, -1], "batch_rows": [0], "micro_batch": [0], "seq_len": [0], "valid_every": [0], "valid_rows": [0],
    "checkpoint_every": [0], "keep_last": [0], "warmup_steps": [-5], "seed": [-1], "decay_share": [7, -0.1, math.nan],
    "final_share": [-3, 1.01, math.nan], "weight_decay": [math.nan, -0.1, math.inf], "mtp_weight": [-1, math.nan],
    "balance_weight": [-1, math.inf], "bias_speed": [-1, math.nan], "learning_rate": [0, math.nan, math.inf],
    "clip": [0, -1, math.nan],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_setting_out_of_its_range_is_refused_by_name(name: str, value: Any) -> None:
    option = f"--{name.replace('_', '-')}"
    for config in (TrainingConfig, PretrainConfig, FinetuneConfig):
        with pytest.raises(InputError) as refused:
            config(**{name: value})
        assert str(refused.value).startswith(f"{option} is {value}; it must be ")


def test_the_ends_of_the_ranges_are_allowed() -> None:
    TrainingConfig(warmup_steps=0, decay_share=0, final_share=1, weight_decay=0, mtp_weight=0, balance_weight=0,
                   bias_speed=0, clip=math.inf, steps=1, valid_rows=1)  # fmt: skip
    TrainingConfig(decay_share=1, final_share=0)
