"""What every run of several islands has to say of its workers: in the metrics, in plain text and in the report."""

from pathlib import Path

import pytest

from motley.evaluate.report import write_report
from motley.parallel.telemetry.step_timer import WAITS
from motley.train.metrics import read_metrics


def assert_all_workers_are_told(out: Path, said: str, islands: list[int], page: Path) -> None:
    """What a run of three rounds, with these islands of its workers, wrote and said of them."""
    workers = range(len(islands))
    records = read_metrics(out)
    comms, told, timelines = (
        [record for record in records if record["kind"] == kind] for kind in ("ranks", "step_stats", "timeline")
    )
    assert comms[0]["islands"] == islands
    assert comms[0]["replicas"] == list(workers)
    assert [record["step"] for record in told] == [5, 10, 15]
    for record in told:
        assert sum(record["share"]) == pytest.approx(1)
        for name in ("tokens_per_second", "idle_share", "memory_bytes", "link_bytes_per_second", "loss_scales"):
            assert len(record[name]) == len(islands), name
        assert set(record["wait_seconds"]) == set(WAITS)
    rounds = [record for record in timelines if "round" in record]
    assert [record["round"] for record in rounds] == [1, 2, 3]
    assert all(len(record["spans"]) == len(islands) for record in rounds)
    lines = [line.partition(": ")[2].split() if said.startswith("localhost: ") else line.split()
             for line in said.splitlines()]  # fmt: skip
    head = next(number for number, line in enumerate(lines) if line[:3] == ["rank", "island", "chip"])
    assert [line[:2] for line in lines[head + 1 : head + 1 + len(islands)]] == [
        [f"{worker}", f"{island}"] for worker, island in zip(workers, islands, strict=True)
    ]
    drawn = write_report(out, page).read_text(encoding="utf-8")
    assert "the ranks of all islands" in drawn
    assert "Timeline of round 2" in drawn
    for worker, island in zip(workers, islands, strict=True):
        assert f"island {island} · rank {worker}" in drawn
