"""The race's two sides, its clock, and the counts that stand beside them."""

import argparse
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import horizon
import narrow
import numpy as np
import pytest
import thrift
import thrift_runs
import thrift_sides
import torch
from budget import Budget
from horizon import ordinary_recipe, passes
from thrift_runs import built, counted, load_libraries, trained, warm_up
from thrift_sides import Llama, Recipe

from motley.data.stream import TokenStream
from motley.model import ModelConfig
from motley.train.ngram_targets import DISCOUNT

CPU = torch.device("cpu")
SEQ_LEN = 32


@pytest.fixture
def rows(prepared: Path) -> TokenStream:
    return TokenStream(prepared, "train", SEQ_LEN)


@pytest.fixture
def held_out(prepared: Path) -> TokenStream:
    return TokenStream(prepared, "valid", SEQ_LEN, shuffle=False)


@pytest.fixture
def llama(tiny: ModelConfig) -> Llama:
    return Llama(tiny.vocab_size, 32, 64, 2, 2)


@pytest.fixture(params=["ordinary", "ours"])
def recipe(request: pytest.FixtureRequest, llama: Llama, tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(thrift_sides, "SEQ_LEN", SEQ_LEN)
    batches = ((0.0, 2),)
    if request.param == "ordinary":
        return dataclasses.replace(ordinary_recipe(llama, "fp32"), batches=batches)
    return Recipe(tiny, 4e-3, batches, lengths=((16, 0.5),), mtp_weight=0.0, precision="fp32", ngram_weight=0.5)


class KneserNey:
    """Interpolated, of order three, from the definition."""

    def __init__(self, text: np.ndarray) -> None:
        self.triples = Counter(zip(text[:-2].tolist(), text[1:-1].tolist(), text[2:].tolist(), strict=True))
        self.pairs = Counter((b, c) for _, b, c in self.triples)  # of different tokens before
        self.singles = Counter(c for _, c in self.pairs)

    def probability(self, before: int | None, last: int, target: int) -> float:
        """Of `target` after `last`, and what came before that."""
        lower = self.singles[target] / len(self.pairs)
        after_one = {c: count for (b, c), count in self.pairs.items() if b == last}
        after_two = {c: count for (a, b, c), count in self.triples.items() if (a, b) == (before, last)}
        for counts in (after_one, after_two):
            if total := sum(counts.values()):
                own = max(counts.get(target, 0) - DISCOUNT, 0.0)
                lower = (own + DISCOUNT * len(counts) * lower) / total
        return lower


def test_the_counts_own_loss_is_that_of_interpolated_kneser_ney(
    rows: TokenStream, held_out: TokenStream, tiny: ModelConfig
) -> None:
    found = counted(rows, held_out, tiny.vocab_size, 1)
    text, batch = rows.text(1 << 20), held_out.rows(0, 1)
    assert int(batch.targets.min()) >= 0
    ids, targets = batch.input_ids[0].tolist(), batch.targets[0].tolist()
    model = KneserNey(text)
    nats = [-np.log(model.probability(ids[i - 1] if i else None, ids[i], targets[i])) for i in range(SEQ_LEN)]
    assert found["loss"] == pytest.approx(float(np.mean(nats)), rel=1e-4)
    assert found["tokens"] == len(text)
    assert found["seconds"] > 0


def test_warming_up_changes_nothing_that_is_learned(recipe: Recipe, rows: TokenStream) -> None:
    learner = built(recipe, CPU, 0, rows)
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    warm_up(learner, recipe, rows)
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.model.state_dict().items())
    assert not any(name.endswith(":exp_avg") for name in learner.optimizer.state_tensors())
    assert all(parameter.grad is None for parameter in learner.model.parameters())


def test_what_comes_before_a_run_is_not_on_its_clock(
    recipe: Recipe, rows: TokenStream, held_out: TokenStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Imports and compilers, on either side: a run that takes one step has a first step as long as a step."""
    now = [0.0]

    def passing(seconds: float, work: Any) -> Any:
        def do(*arguments: Any) -> Any:
            now[0] += seconds
            return work(*arguments)

        return do

    monkeypatch.setattr(thrift_runs.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(thrift_runs, "load_libraries", passing(1000.0, load_libraries))
    monkeypatch.setattr(thrift_runs, "warm_up", passing(100.0, warm_up))
    monkeypatch.setattr(thrift_runs, "built", passing(10.0, built))
    found = trained(recipe, rows, held_out, CPU, 0, 5.0, held_out_rows=2, marks=())
    assert found["seconds"] == 10.0  # drawing weights and counting are the run's own


def test_a_run_by_tokens_goes_on_where_it_was_broken_off(
    recipe: Recipe, rows: TokenStream, held_out: TokenStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thrift_runs, "SAVED_EVERY", 0.0)
    rate = 2 * SEQ_LEN / 1.0  # a step a second

    def run(file: Path, stream: Any) -> dict[str, Any]:
        return trained(recipe, stream, held_out, CPU, 0, 8.0, 2, (0.25, 0.5), rate, file)

    class Broken(TokenStream):
        """Rows that come to an end in the middle."""

        def rows(self, position: int, count: int) -> Any:
            if position >= 10:
                raise KeyboardInterrupt
            return super().rows(position, count)

    whole = run(tmp_path / "whole", rows)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", Broken(rows.folder, "train", SEQ_LEN))
    again = run(tmp_path / "broken", rows)
    assert whole["steps"] == again["steps"] == 8
    assert whole["tokens"] == again["tokens"] == 8 * 2 * SEQ_LEN
    assert [mark[:2] for mark in whole["curve"]] == [mark[:2] for mark in again["curve"]]
    assert again["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_a_curve_passes_the_counts_where_it_stays_below_them() -> None:
    curve = [(1.0, 10, 5.0), (2.0, 20, 3.9), (3.0, 30, 4.1), (4.0, 40, 3.8), (5.0, 50, 3.7)]
    assert passes(curve, 4.0) == (4.0, 40, 3.8)
    assert passes(curve, 3.0) is None
    assert passes(curve, 6.0) == (1.0, 10, 5.0)


@pytest.mark.slow(10)
def test_a_race_shows_the_counts_and_the_horizon_beside_both_sides(
    tmp_path: Path, llama: Llama, tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch, prepared: Path
) -> None:
    for module in (thrift, horizon):
        monkeypatch.setattr(module, "VOCAB_SIZE", tiny.vocab_size)
    monkeypatch.setattr(thrift, "SIZES", {"small": (llama, tiny)})
    monkeypatch.setattr(thrift, "QUICK_MINUTES", 0.002)
    text = [str(file) for file in sorted(prepared.parent.glob("*.txt"))]
    arguments = argparse.Namespace(
        text=text, size="small", minutes=10.0, seeds=3, levers=["ngrams"], horizon=60.0, device="cpu",
        folder=tmp_path, quick=True, json=False,
    )  # fmt: skip
    folder, found = thrift.whole_race(arguments, Budget(None))
    said = thrift.table(found)
    assert f"{found['counts']['loss']:.4f}" in next(line for line in said.splitlines() if line.startswith("counts"))
    assert "ordinary, on" in said
    assert found["cpu_flags"] is not None
    assert json.loads((folder / "result.json").read_text())["horizon"]["counts"]["loss"] == found["counts"]["loss"]
    assert "counts alone" in (folder / "race.svg").read_text(encoding="utf-8")


@pytest.mark.slow(5)
def test_narrow_numbers_are_compared_from_end_to_end(tmp_path: Path, prepared: Path) -> None:
    text = [str(file) for file in sorted(prepared.parent.glob("*.txt"))]
    arguments = argparse.Namespace(what="moments", text=text, steps=300, seeds=3, quick=True, json=False)
    found = narrow.compared(arguments, tmp_path, Budget(0.0))
    assert set(found["losses"]) == set(narrow.SIDES["moments"])
    assert found["settings"]["steps"] == narrow.QUICK_STEPS[0]  # no time for more
    assert "mean" in narrow.told(found)
