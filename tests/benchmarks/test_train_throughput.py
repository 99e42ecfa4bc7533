"""Both sides of the comparison compute in the format they are said to, and are told apart by nothing else."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import memory
import pytest
import torch
import train_throughput
from budget import Budget
from scaling import Case
from scaling import measure as measure_scaling
from test_cases import machine
from train_throughput import Ours, Plan, Side, Theirs, TooSlow, fastest, formats, our_step, race, transformers_step

from motley.data.stream import TokenStream
from motley.model import ModelConfig

ROWS, SEQ_LEN = 2, 32
CPU = torch.device("cpu")


class Answers(list):
    """Where a process of a benchmark puts what it found."""

    put = list.append


@pytest.fixture
def short_rows(monkeypatch: pytest.MonkeyPatch, tiny: ModelConfig) -> None:
    monkeypatch.setattr(train_throughput, "VOCAB_SIZE", tiny.vocab_size)
    monkeypatch.setattr(train_throughput, "SIZES", {"nano": tiny})


def test_an_emulated_format_is_nobodys() -> None:
    assert formats(machine("fp32")) == ["fp32"]
    assert formats(machine("fp32", "bf16")) == ["bf16", "fp32"]
    assert formats(machine("bf16", "fp32")) == ["fp32", "bf16"]


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("format_", ["fp32", "bf16"])
def test_the_peer_multiplies_in_the_format_of_its_setting(
    experts: str, format_: Any, tiny: ModelConfig, prepared: Path
) -> None:
    step = transformers_step(tiny, CPU, Theirs(experts, format=format_))
    seen: set[torch.dtype] = set()

    def note(module: torch.nn.Module, _: Any, output: Any) -> None:
        if type(module) is torch.nn.Linear:
            seen.add(output.dtype)

    with torch.nn.modules.module.register_module_forward_hook(note):
        loss = step(TokenStream(prepared, "train", SEQ_LEN).rows(0, ROWS))
    assert seen == {torch.float32 if format_ == "fp32" else torch.bfloat16}
    assert loss == pytest.approx(math.log(tiny.vocab_size), abs=0.5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_ours_takes_the_same_rows_and_format(optimizer: Any, tiny: ModelConfig, prepared: Path) -> None:
    step = our_step(tiny, CPU, Ours(optimizer, format="fp32"))
    losses = [step(TokenStream(prepared, "train", SEQ_LEN).rows(0, ROWS)) for _ in range(6)]
    assert losses[0] == pytest.approx(math.log(tiny.vocab_size), abs=0.5)
    assert losses[-1] < losses[0]


def test_a_setting_names_all_that_tells_it_from_others() -> None:
    every = [
        Theirs(experts, compiled, kept, again, attention, format_)
        for experts in ("eager", "grouped_mm")
        for compiled in (False, True)
        for kept in (False, True)
        for again in (False, True)
        for attention in ("sdpa", "eager")
        for format_ in ("bf16", "fp32")
    ]
    assert len({str(setting) for setting in every}) == len(every)
    assert "fp32" in str(Ours("muon", format="fp32"))


def test_a_trial_that_took_too_long_is_not_the_fastest() -> None:
    slow, quick = Theirs("eager"), Theirs("grouped_mm")
    assert fastest({slow: None, quick: 3.0}) == quick
    with pytest.raises(TooSlow, match="transformers, AdamW, bf16, eager"):
        fastest({slow: None})


def test_a_side_that_does_not_answer_is_ended(tiny: ModelConfig, prepared: Path) -> None:
    side = Side(Ours("adamw", format="fp32"), tiny, prepared, ROWS)
    with pytest.raises(TooSlow, match="motley, AdamW, fp32: no answer within 0 s"):
        side.ready(0.0)
    side.end()
    assert not side._process.is_alive()


@pytest.mark.slow(15)
def test_a_race_runs_from_end_to_end(short_rows: None, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_throughput, "EXPERTS", ("grouped_mm",))
    plan = Plan(Budget(), rows=1, warm_up=1, turns=2, steps=1, trials=False)
    found = race(machine("fp32"), "nano", prepared, plan)
    assert [side["turns"] for side in found["sides"].values()] == [2, 2, 2]
    assert all(side["setting"]["format"] == "fp32" for side in found["sides"].values())
    adamw, theirs, _ = (side["median"] for side in found["sides"].values())
    assert found["ratio_to_transformers"] == pytest.approx(adamw / theirs)
    flops, peak = found["settings"]["training_flops_per_token"], found["settings"]["peak_gflops"]["fp32"]
    for side in found["sides"].values():
        assert side["share_of_peak"] == pytest.approx(side["median"] * flops / (peak * 1e9))
    said = train_throughput.table("nano", found)
    for name in found["sides"]:
        assert name in said


@pytest.mark.parametrize("side", [Ours("muon", format="fp32"), Theirs("eager", format="fp32", checkpointed=True)])
def test_bytes_of_a_step_are_measured(side: Any, tiny: ModelConfig) -> None:
    answers = Answers()
    memory.measure(0, side, tiny, ROWS, SEQ_LEN, answers)
    ((rank, found),) = answers
    assert rank == 0
    assert 0 <= found < 1 << 30  # what earlier tests freed may serve so small a step


def test_seconds_of_a_case_are_measured(tiny: ModelConfig) -> None:
    answers = Answers()
    measure_scaling(0, Case("batch", 2, dataclasses.replace(tiny), ROWS, SEQ_LEN), "fp32", 1, answers)
    (seconds, most) = answers[0][1]
    assert seconds > 0
    assert most >= 0
