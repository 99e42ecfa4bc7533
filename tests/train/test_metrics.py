"""metrics.jsonl reads as if the run had never been interrupted."""

import json
import math
from pathlib import Path

import pytest

from motley.errors import InputError
from motley.train.metrics import MetricsWriter, imbalances, read_metrics, upgraded


def write_steps(folder: Path, first: int, last: int, resume_step: int = 0) -> None:
    with MetricsWriter(folder, resume_step) as writer:
        for step in range(first, last + 1):
            writer.write("train", step=step, tokens=4096 * step, seconds=1.5 * step, loss=9.0 / step)
            if step % 5 == 0:
                writer.write("valid", step=step, tokens=4096 * step, seconds=1.5 * step, loss=8.0, bits_per_byte=2.0)


def test_an_interrupted_run_leaves_the_same_file_as_an_uninterrupted_one(tmp_path: Path):
    write_steps(tmp_path / "whole", 1, 20)
    write_steps(tmp_path / "broken", 1, 13)
    write_steps(tmp_path / "broken", 11, 20, resume_step=10)
    assert (tmp_path / "broken/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_half_written_last_line_is_passed_over_and_dropped_on_resume(tmp_path: Path, cut: int):
    write_steps(tmp_path, 1, 12)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert [record["step"] for record in read_metrics(path) if record["kind"] == "train"] == list(range(1, 12))
    write_steps(tmp_path, 13, 15, resume_step=12)
    assert [record["step"] for record in read_metrics(tmp_path) if record["kind"] == "train"] == [
        *range(1, 12),
        *range(13, 16),
    ]


def test_a_run_that_starts_over_forgets_the_old_one(tmp_path: Path):
    write_steps(tmp_path, 1, 9)
    write_steps(tmp_path, 1, 2)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_records_are_readable_by_others_as_soon_as_they_are_written(tmp_path: Path):
    writer = MetricsWriter(tmp_path)
    writer.write("event", step=3, tokens=10, message="übersprungen: loss is not finite")
    assert read_metrics(tmp_path) == [
        {"kind": "event", "step": 3, "tokens": 10, "message": "übersprungen: loss is not finite"}
    ]
    writer.close()


def test_values_that_are_not_finite_are_written_as_null(tmp_path: Path):
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", step=1, loss=math.nan, grad_norm=math.inf, learning_rate=0.1)
        writer.write("experts", step=1, load=[[0.5, math.nan], [1.0, 0.0]])

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert (first["loss"], first["grad_norm"], first["learning_rate"]) == (None, None, 0.1)
    assert second["load"] == [[0.5, None], [1.0, 0.0]]


def test_a_broken_line_is_named_by_file_and_number(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tra\n{"kind": "train", "step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)
    path.write_text('{"kind": "train", "step": 1}\n[1, 2]\n')
    with pytest.raises(InputError, match=r"line 2 is no record"):
        read_metrics(path)


def test_a_missing_file_is_said_so(tmp_path: Path):
    with pytest.raises(InputError, match="does not exist"):
        read_metrics(tmp_path / "nowhere")


def test_tensorboard_sees_each_step_once(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_steps(tmp_path, 1, 13)
    write_steps(tmp_path, 11, 20, resume_step=10)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = events.Scalars("train/loss")
    assert [scalar.step for scalar in scalars] == list(range(1, 21))
    assert [scalar.value for scalar in scalars] == pytest.approx([9.0 / step for step in range(1, 21)])
    assert sorted(events.Tags()["scalars"]) == ["train/loss", "valid/bits_per_byte", "valid/loss"]


def test_tensorboard_gets_the_imbalance_of_each_layer(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path) as writer:
        writer.write("experts", step=5, tokens=100, load=[[0.25] * 4, [0.5, 0.5, 0.0, 0.0]])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("experts/imbalance_of_moe_layer_0")[0].value == pytest.approx(1.0)
    assert events.Scalars("experts/imbalance_of_moe_layer_1")[0].value == pytest.approx(2.0)


def test_imbalance_is_the_busiest_expert_over_its_fair_share():
    assert imbalances([[0.25] * 4, [0.7, 0.1, 0.1, 0.1], [0.0, 0.0]]) == pytest.approx([1.0, 2.8, 1.0])


def test_an_unknown_kind_of_record_is_refused(tmp_path: Path):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match="unknown kind"):
        writer.write("trian", step=1)


OLD_RECORDS = """
{"kind": "crew", "step": 0, "names": ["a", "b"], "islands": [0, 1], "teams": [0, 1], "lanes": [0, 1], "stages": [0, 0]}
{"kind": "train", "step": 1, "tokens": 10, "seconds": 1.0, "loss": 3.0}
{"kind": "workers", "step": 1, "rows": [4, 4], "share": [0.5, 0.5], "round": 1, "step_seconds": 1.0}
{"kind": "islands", "step": 1, "round": 1, "waited_seconds": [0.0, 0.5]}
"""


def test_records_of_earlier_versions_are_read_under_their_present_names(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(OLD_RECORDS.lstrip())
    with pytest.warns(UserWarning, match="crew as ranks, islands as outer_step, workers as step_stats"):
        ranks, train, stats, outer = read_metrics(tmp_path)
    place = {"islands": [0, 1], "groups": [0, 1], "replicas": [0, 1], "stages": [0, 0]}
    assert ranks == {"kind": "ranks", "step": 0, "names": ["a", "b"], **place}
    assert train == {"kind": "train", "step": 1, "tokens": 10, "seconds": 1.0, "loss": 3.0}
    assert (stats["kind"], stats["rows"], stats["round"]) == ("step_stats", [4, 4], 1)
    assert outer == {"kind": "outer_step", "step": 1, "round": 1, "waited_seconds": [0.0, 0.5]}
    assert [upgraded(record) for record in (ranks, train, stats, outer)] == [ranks, train, stats, outer]


def test_a_resumed_run_of_an_earlier_version_has_all_records_under_present_names(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(OLD_RECORDS.lstrip())
    with pytest.warns(UserWarning, match="earlier version"), MetricsWriter(tmp_path, resume_step=1) as writer:
        writer.write("ranks", step=1, names=["a"], groups=[0], replicas=[0], stages=[0])
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["ranks", "train", "step_stats", "outer_step", "ranks"]


def test_what_old_code_writes_is_written_under_present_names(tmp_path: Path):
    with MetricsWriter(tmp_path) as writer:
        writer.write("crew", step=0, names=["a"], teams=[0], lanes=[0], stages=[0])
    names = {"names": ["a"], "groups": [0], "replicas": [0], "stages": [0]}
    assert read_metrics(tmp_path) == [{"kind": "ranks", "step": 0, **names}]
