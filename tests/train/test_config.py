"""A setting that cannot be meant is refused by name, before anything is read or trained."""

import math
import re
from typing import Any

import pytest

from motley.errors import InputError
from motley.train.config import PretrainConfig, SftConfig, TrainingConfig
from motley.train.lr_schedule import check_stages

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
    for config in (TrainingConfig, PretrainConfig, SftConfig):
        with pytest.raises(InputError) as refused:
            config(**{name: value})
        assert str(refused.value).startswith(f"{option} is {value}; it must be ")


def test_the_ends_of_the_ranges_are_allowed() -> None:
    TrainingConfig(warmup_steps=0, decay_share=0, final_share=1, weight_decay=0, mtp_weight=0, balance_weight=0,
                   bias_speed=0, clip=math.inf, steps=1, valid_rows=1)  # fmt: skip
    TrainingConfig(decay_share=1, final_share=0)


@pytest.mark.parametrize(
    ("warmup", "fault"),
    [
        ("64", "has '64'; it takes LENGTH:SHARE"),
        ("64:0.3,", "has ''; it takes LENGTH:SHARE"),
        ("64:0.3:1", "has '64:0.3:1'"),
        ("a:0.3", "has 'a:0.3'"),
        ("0:0.3", "lengths are at least 1"),
        ("64:0.3,32:0.6", "must grow from one stage to the next"),
        ("64:0.6,128:0.6", "must grow from one stage to the next"),
        ("64:0", "above 0 and at most 1"),
        ("64:1.5", "above 0 and at most 1"),
        ("64:nan", "above 0 and at most 1"),
    ],
)
def test_a_warmup_of_lengths_that_cannot_be_meant_is_refused(warmup: str, fault: str) -> None:
    with pytest.raises(InputError, match=f"--seq-len-warmup .*{re.escape(fault)}"):
        PretrainConfig(seq_len_warmup=warmup)


def test_sequences_grow_at_the_shares_that_were_asked_for() -> None:
    config = PretrainConfig(steps=10, seq_len_warmup="64:0.3,128:0.6")
    assert [config.length(step) for step in range(10)] == [64] * 3 + [128] * 3 + [256] * 4
    assert {PretrainConfig(steps=10).length(step) for step in range(10)} == {256}


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_a_weight_of_ngrams_is_a_share(weight: float) -> None:
    with pytest.raises(InputError, match=r"--ngram-weight is .* it must be from 0 to 1"):
        PretrainConfig(ngram_weight=weight)


@pytest.mark.parametrize("length", [60, 256, 512])
def test_a_length_into_which_rows_cannot_be_cut_is_refused(length: int) -> None:
    fault = f"--seq-len-warmup has sequences of {length} tokens, into which --seq-len 256 cannot be cut"
    with pytest.raises(InputError, match=fault):
        check_stages(f"64:0.3,{length}:0.6" if length > 64 else f"{length}:0.3", 256)


def test_conversations_are_never_cut() -> None:
    assert not hasattr(SftConfig(), "seq_len_warmup")
    assert {SftConfig(steps=10).length(step) for step in range(10)} == {SftConfig().seq_len}
