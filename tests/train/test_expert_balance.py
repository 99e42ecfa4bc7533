"""The router's bias is fast enough for the run's length, and a router that collapses is named while it does."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import tyro
from commands import command
from spawned_ranks import run

from motley.cli import main
from motley.evaluate.report import write_report
from motley.model import SIZES
from motley.train.config import PretrainConfig, SftConfig
from motley.train.expert_balance import FASTEST, SLOWEST, TRAVEL, ByLength, ExpertBalance, imbalance, patience
from motley.train.metrics import read_metrics
from motley.train.run_folder import as_begun, kept_speed, open_run

NANO = SIZES["nano"]  # 8 experts, 2 for each token


@pytest.mark.parametrize("config", [PretrainConfig, SftConfig])
def test_the_bias_can_travel_the_range_of_scores_in_a_short_run_and_takes_v3s_steps_in_a_long_one(config: type) -> None:
    speeds = {steps: config(steps=steps).bias_speed for steps in (1, 20, 120, 400, 1000, 10_000, 1_000_000)}
    assert list(speeds.values()) == sorted(speeds.values(), reverse=True)
    assert all(SLOWEST <= speed <= FASTEST for speed in speeds.values())
    assert speeds[1] == speeds[120] == FASTEST
    assert speeds[1_000_000] == speeds[10_000] == SLOWEST == 1e-3
    for steps in (120, 400, 1000):
        assert speeds[steps] * steps >= 1, "a sigmoid's scores lie between 0 and 1"
    for steps in (400, 1000):
        assert speeds[steps] * steps == pytest.approx(TRAVEL)


def test_the_default_follows_a_changed_length_and_a_given_speed_does_not() -> None:
    config = PretrainConfig(steps=120)
    assert dataclasses.replace(config, steps=1000).bias_speed == ByLength.of(1000)
    for speed in (1e-3, 0.02, 0.0):
        given = PretrainConfig(steps=120, bias_speed=speed)
        assert given.bias_speed == speed
        assert dataclasses.replace(given, steps=1000).bias_speed == speed


def test_the_command_line_knows_a_given_speed_from_none(capsys: pytest.CaptureFixture[str]) -> None:
    left_open = tyro.cli(PretrainConfig, args=["--steps", "120"])
    assert left_open.bias_speed == ByLength.of(120)
    assert isinstance(left_open.bias_speed, ByLength)
    given = tyro.cli(PretrainConfig, args=["--steps", "120", "--bias-speed", "0.001"])
    assert given.bias_speed == 1e-3
    assert not isinstance(given.bias_speed, ByLength)
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    assert "by the number of steps" in " ".join(capsys.readouterr().out.replace("│", "").split())


def test_a_run_goes_on_with_its_speed_and_an_older_one_with_v3s(tmp_path: Path) -> None:
    def goes_on(asked: PretrainConfig) -> float:
        config = as_begun(asked, kept_speed(asked.out))
        open_run(asked.out, "pretrain", config, {})
        return config.bias_speed

    asked = PretrainConfig(out=tmp_path / "run", steps=120)
    assert kept_speed(asked.out) is None
    assert goes_on(asked) == ByLength.of(120)
    assert json.loads((asked.out / "config.json").read_text())["bias_speed"] == ByLength.of(120)
    for kept in (1e-3, 0.004, None):
        file = asked.out / "config.json"
        settings = json.loads(file.read_text())
        settings.pop("bias_speed")
        file.write_text(json.dumps(settings | ({} if kept is None else {"bias_speed": kept})))
        assert goes_on(asked) == (kept or 1e-3)
    with pytest.raises(ValueError, match=r"bias_speed=0.001, now asked for 0.02"):
        goes_on(dataclasses.replace(asked, bias_speed=0.02))


def test_imbalance_is_the_busiest_load_over_the_mean() -> None:
    assert imbalance(torch.tensor([10, 10, 10, 10])) == 1
    assert imbalance(torch.tensor([40, 0, 0, 0])) == 4
    assert imbalance(torch.tensor([7, 1, 0])) == pytest.approx(7 / 8 * 3)
    assert imbalance(torch.tensor([0, 0])) == 1, "nothing was routed"


def watched(loads: list[list[float]], steps: int = 120, shape=NANO) -> list[tuple[int, str]]:  # type: ignore[no-untyped-def]
    balance, said = ExpertBalance(), []
    for step, load in enumerate(loads):
        said += [(step, sentence) for sentence in balance.complaint(load, shape, steps, 1e-3)]
        balance = ExpertBalance(**json.loads(json.dumps(dataclasses.asdict(balance))))  # as through a checkpoint
    return said


def test_a_layer_that_stays_collapsed_is_named_once_with_what_to_do() -> None:
    ((step, sentence),) = watched([[1.2, 3.8, 1.4]] * 120)
    assert step == patience(120) - 1
    assert "MoE layer 1" in sentence
    assert "48% in this step" in sentence
    assert "12% is even, 50% all that one can take" in sentence
    assert "higher --bias-speed than 0.001" in sentence


def test_what_is_uneven_only_in_the_beginning_or_now_and_then_is_not_named() -> None:
    assert watched([[3.9]] * (patience(120) - 1) + [[1.2]] * 100) == []
    assert watched([[3.9], [3.9], [1.4]] * 100) == []
    assert watched([[2.4]] * 1000) == [], "less than half way from even to all that one expert can take"


def test_fewer_and_more_experts_have_their_own_limit_and_no_bias_its_own_remedy() -> None:
    four = dataclasses.replace(NANO, n_routed_experts=4)
    assert watched([[1.45]] * 200, shape=four) == []
    assert len(watched([[1.6]] * 200, shape=four)) == 1, "half of all tokens where a quarter is even"
    many = dataclasses.replace(NANO, n_routed_experts=256, num_experts_per_tok=8)
    assert watched([[2.9]] * 200, shape=many) == []
    assert len(watched([[3.1]] * 200, shape=many)) == 1
    ((_, sentence),) = watched([[3.9]] * 200, shape=dataclasses.replace(NANO, topk_method="greedy"))
    assert "--balance-weight" in sentence
    assert "--bias-speed" not in sentence


def test_a_run_shows_its_balance_at_every_step_and_says_when_it_is_lost(
    data: Path, shape: Path, tmp_path: Path
) -> None:
    """With a bias that cannot move and a high learning rate."""
    values = json.loads(shape.read_text()) | {"n_routed_experts": 8, "num_experts_per_tok": 1}
    (tmp_path / "shape.json").write_text(json.dumps(values))
    asked = {"steps": 80, "precision": "fp32", "bias_speed": 0, "balance_weight": 0, "learning_rate": 0.05}
    done = run(command(tmp_path / "run", data, tmp_path / "shape.json", **asked))
    assert done.returncode == 0, done.stderr
    records = read_metrics(tmp_path / "run")
    steps = [record for record in records if record["kind"] == "train"]
    layers = {len(record["imbalance"]) for record in steps}
    assert len(layers) == 1
    assert min(layers) >= 1
    assert all(1 <= value <= 8 for record in steps for value in record["imbalance"])
    last, load = steps[-1]["imbalance"], [r for r in records if r["kind"] == "experts"][-1]["load"]
    assert last == pytest.approx([max(row) * 8 for row in load], abs=1e-3), "of the same step"
    assert "busiest expert" in done.stderr
    told = [r["message"] for r in records if r["kind"] == "event" and "experts of MoE layer" in r["message"]]
    assert len(told) == 1
    assert told[0] in done.stderr
    page = write_report(tmp_path / "run", tmp_path / "report.html").read_text()
    assert "experts of MoE layer" in page
    assert "the busiest of 8 experts took" in page
