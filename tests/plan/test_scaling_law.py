"""Laws of the loss: the fit finds a known law again, the plan says what it says and how far it reaches."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from motley.errors import InputError
from motley.model import SIZES
from motley.plan.command import PlanConfig, plan, plan_summary
from motley.plan.network.flops import active_parameters, multiplying_parameters
from motley.plan.network.spec import deepseek
from motley.plan.scaling_law import DENSE, SPARSE, FittedRun, LossLaw, expected_loss, fitted, load_laws

TRUE = LossLaw(1.7, 400.0, 0.34, 410.0, 0.28, 0, 0.0, 0.0, "")
SIZES_OF_RUNS = (2e5, 5e5, 1e6, 2e6)
LENGTHS = (5e5, 1e6, 2e6, 4e6)


def runs(noise: float = 0.0) -> list[FittedRun]:
    chance = np.random.default_rng(0)
    return [
        FittedRun(size, length, TRUE.loss(size, length) * (1 + noise * chance.standard_normal()))
        for size in SIZES_OF_RUNS
        for length in LENGTHS
    ]


def test_a_law_is_found_again_from_losses_that_follow_it() -> None:
    law = fitted(runs(), "made up")
    for found, true in ((law.floor, 1.7), (law.alpha, 0.34), (law.beta, 0.28), (law.a, 400.0), (law.b, 410.0)):
        assert found == pytest.approx(true, rel=1e-3)
    assert law.error < 1e-5
    assert (law.runs, law.largest_flops) == (16, 6 * 2e6 * 4e6)


def test_noise_in_the_losses_moves_what_lies_ahead_of_the_runs_little() -> None:
    law = fitted(runs(noise=0.003), "made up")
    assert law.loss(2e7, 4e7) == pytest.approx(TRUE.loss(2e7, 4e7), rel=0.05)
    assert 0.001 < law.error < 0.006


def test_too_few_runs_or_runs_alike_are_refused() -> None:
    with pytest.raises(InputError, match="5 runs do not fix a law"):
        fitted(runs()[:5], "")
    with pytest.raises(InputError, match="of 3 sizes and 3 lengths"):
        fitted([run for run in runs() if run.parameters < 6e5], "")
    with pytest.raises(InputError, match="does not fall with both"):
        fitted([replace(run, loss=run.parameters / 1e5) for run in runs()], "")


def test_the_best_split_of_a_budget_beats_its_neighbours() -> None:
    for flops in (1e13, 1e16):
        parameters, tokens = TRUE.best_split(flops)
        assert 6 * parameters * tokens == pytest.approx(flops)
        least = TRUE.loss(parameters, tokens)
        for times in (0.9, 1.1):
            assert TRUE.loss(parameters * times, tokens / times) > least


def test_parameters_that_multiply_are_the_active_ones_without_lookups_and_norms() -> None:
    config = SIZES["nano"]
    counted = multiplying_parameters(config)
    assert counted < active_parameters(config) - config.vocab_size * config.hidden_size
    assert counted == pytest.approx(active_parameters(config) - config.vocab_size * config.hidden_size, rel=0.01)


def test_each_kind_of_model_has_its_law_and_far_beyond_the_runs_nothing_is_said() -> None:
    laws = {SPARSE: replace(TRUE, largest_flops=1e13), DENSE: replace(TRUE, floor=1.0, largest_flops=1e13)}
    sparse = deepseek(SIZES["nano"])
    dense = deepseek(replace(SIZES["nano"], n_routed_experts=None))
    near, other = (expected_loss(laws, shape, 1e6) for shape in (sparse, dense))
    assert near is not None
    assert other is not None
    assert near["nats_per_token"] == pytest.approx(TRUE.loss(multiplying_parameters(sparse), 1e6))
    assert near["with_twice_the_tokens"] < near["nats_per_token"]
    assert other["nats_per_token"] == pytest.approx(TRUE.loss(multiplying_parameters(dense), 1e6) - 0.7)
    far = expected_loss(laws, sparse, 1e12)
    assert far is not None
    assert far["nats_per_token"] is None
    assert far["times_beyond"] > 1000
    assert expected_loss({DENSE: TRUE}, sparse, 1e6) is None


def test_the_laws_that_motley_has_come_from_at_least_twelve_runs_each_and_fall() -> None:
    laws = load_laws()
    assert set(laws) == {SPARSE, DENSE}
    for law in laws.values():
        assert law.runs >= 12
        assert law.error < 0.02
        assert law.loss(2e6, 4e6) < law.loss(1e6, 4e6) < law.loss(1e6, 2e6)
        assert law.floor >= 0


FLEET = "pools: [{name: one, chip: desktop-core, chips_per_node: 1}]"


def test_a_plan_says_the_loss_of_its_tokens_by_laws_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text(FLEET)
    own = replace(TRUE, runs=16, largest_flops=1e14, about="my own runs")
    (tmp_path / "losses.yaml").write_text(yaml.safe_dump({"laws": {SPARSE: asdict(own)}}))
    config = PlanConfig(
        "nano", tmp_path / "fleet.yaml", "2M", 256, 16, losses=tmp_path / "losses.yaml", out=tmp_path / "plan.json"
    )
    result = plan(config)
    expected = own.loss(multiplying_parameters(SIZES["nano"]), 2e6)
    assert f"expected loss: {expected:.3f} nats a token" in plan_summary(result)
    assert "my own runs; within the runs behind it" in plan_summary(result)
    kept = json.loads((tmp_path / "plan.json").read_text())
    assert kept["expected_loss"]["nats_per_token"] == pytest.approx(expected)
    assert "not said" in plan_summary(plan(replace(config, tokens="100T", losses=None)))


def test_a_file_without_laws_is_refused(tmp_path: Path) -> None:
    law = yaml.safe_dump({"laws": {SPARSE: asdict(replace(TRUE, runs=16, largest_flops=1e14))}})
    (tmp_path / "losses.yaml").write_text(law.replace("100000000000000.0", "1e14"))
    assert load_laws(tmp_path / "losses.yaml")[SPARSE].largest_flops == 1e14, "which YAML takes for a word"
    none = ["", "laws: 3", "laws: {}", "laws: {sparse: {floor: 1}}", "{", "[]"]
    for text in (*none, law.replace("sparse", "spare"), law.replace("0.34", "-1"), law.replace("1.7", "low")):
        (tmp_path / "losses.yaml").write_text(text)
        with pytest.raises(InputError, match=r"losses\.yaml holds no laws"):
            load_laws(tmp_path / "losses.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        load_laws(tmp_path / "missing.yaml")
