"""The report shows what the run has, says what it lacks, and is complete in itself."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from motley.errors import InputError
from motley.evaluate.charts import FIRST, THEME, Curve, heat_map, interval_chart, line_chart, smoothed
from motley.evaluate.report import write_report
from motley.fleet import Machine, MatmulRate
from motley.model import SIZES
from motley.page import Html, element, in_count, interval_95
from motley.train.metrics import MetricsWriter

EVIL = "<script>alert('x')</script> & \"<img src=https://example.org/x>\""


class Page(HTMLParser):
    """Checks nesting while reading; keeps visible text and everything that could load something."""

    VOID = frozenset({"meta", "br", "img", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.references: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data")]
        self.references += [r for _, v in attrs for r in re.findall(r"url\(([^)]*)\)", v or "")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"{tag} closed but never opened"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\N{NO-BREAK SPACE}", " ").split())


def write_stage(folder: Path, steps: int = 30, message: str = "step skipped: loss is not finite") -> None:
    with MetricsWriter(folder) as writer:
        for step in range(1, steps + 1):
            where = {"step": step, "tokens": 4096 * step, "seconds": 0.5 * step}
            loss = math.nan if step == 7 else 3 + 5 / step
            writer.write(
                "train",
                **where,
                loss=loss,
                mtp_loss=loss + 0.5,
                balance_loss=1.0,
                learning_rate=0.01,
                grad_norm=1.0,
                tokens_per_second=8192.0,
                memory_bytes=1e9,
            )
            if step == 7:
                writer.write("event", **where, message=message)
            if step % 10 == 0:
                writer.write("valid", **where, loss=4.0, bits_per_byte=1.375)
                writer.write("experts", **where, load=[[0.25, 0.25, 0.4, 0.1], [0.0, 1.0, 0.0, 0.0]])


def problem_results() -> dict[str, Any]:
    return {
        "accuracy": 0.75,
        "standard_error": 0.03,
        "count": 200,
        "truncated_share": 0.02,
        "families": {
            "chain_sum": {"count": 100, "accuracy": 1.0, "standard_error": 0.0},
            "countdown": {"count": 100, "accuracy": 0.4, "standard_error": 0.05},
        },
        "samples": [
            {"family": "chain_sum", "question": "1 + 1 =", "thinking": "two", "answer": "2", "correct": True},
            {
                "family": "countdown",
                "question": EVIL,
                "thinking": EVIL,
                "answer": EVIL,
                "correct": False,
                "expected": EVIL,
            },
        ],
    }


def journey() -> dict[str, Any]:
    rates = (MatmulRate("fp32", 9, 9, 9, 195.0), MatmulRate("bf16", 9, 9, 9, 850.0))
    machine = Machine("cpu", "Some <Chip>", 2, 2, 8 * 10**9, 7 * 10**9, None, rates, 70.0, "bf16")
    return {
        "machine": machine.to_dict(),
        "started": "2026-11-23T20:15:00+00:00",
        "model": {"name": "demo", "config": SIZES["nano"].to_hf()},
        "data": {
            "format": 1,
            "kind": "text",
            "vocab_size": 4096,
            "duplicates": 14,
            "dropped": 3,
            "train": {"documents": 1500, "bytes": 3_000_000, "tokens": 900_000, "rows": 0},
            "valid": {"documents": 32, "bytes": 60_000, "tokens": 20_000, "rows": 0},
            "inputs": {},
        },
        "stages": [
            {"name": "data", "title": "Prepare data", "predicted_seconds": 20, "seconds": 30, "folder": None},
            {
                "name": "pretrain",
                "title": "Pretraining",
                "predicted_seconds": 80,
                "seconds": 90,
                "folder": "pretrain",
                "note": "the Python standard library",
            },
        ],
        "results": {"text": {"bits_per_byte": 1.25, "tokens": 20_000}, "problems": problem_results()},
    }


def report(run: Path) -> Page:
    write_report(run, run / "report.html")
    return Page((run / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Page:
    run = tmp_path_factory.mktemp("journey")
    write_stage(run / "pretrain", message=EVIL)
    (run / "journey.json").write_text(json.dumps(journey()), encoding="utf-8")
    return report(run)


def test_the_page_tells_the_whole_journey(whole: Page):
    for expected in (
        "Some <Chip> (2 CPU cores",
        "23 November 2026, 20:15 UTC",
        "Prepare data",
        "predicted 1 min 20 s",
        "All stages: 2 min 00 s, predicted 1 min 40 s (+20 %).",
        "the Python standard library",
        "2 of 8 routed + 1 shared",
        "4,237,760",
        "3.33",  # bytes per token
        "Loss against tokens",
        "Loss against wall time",
        "Held-out bits per byte against tokens",
        "Held-out bits per byte against wall time",
        "Learning rate",
        "Load of the experts",
        "Imbalance",
        "Throughput",
        "Memory",
        "75.0 % right, 95 % interval 68.6 to 80.5 % (standard error 3.0 points), 200 problems",
        "2.0 % of the answers were cut off",
        "1.250",
        "More often wrong than right: countdown.",
    ):
        assert expected in whole.text, expected
    assert "Not in this report" not in whole.text


def test_nothing_outside_the_page_is_loaded_and_nothing_runs(whole: Page):
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(whole.tags)
    assert whole.references
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in whole.references)


def test_text_from_outside_stays_text(whole: Page):
    """In questions, thinking, answers, expected answers and events; the parser saw no such element."""
    assert whole.text.count(" ".join(EVIL.split())) >= 5
    assert "img" not in whole.tags


def test_charts_use_the_colours_of_the_page(whole: Page, tmp_path: Path):
    charts = [
        line_chart([Curve("a", [1, 2], [3, 4], FIRST)], "x", "y"),
        heat_map([[0.5, 0.5]], "x", "y"),
        interval_chart(["a"], [0.5], [(0.4, 0.6)], "x"),
    ]
    for chart in charts:
        assert "var(--" in chart
        assert not any(stand_in in chart for stand_in in THEME)
        assert "<style" not in chart


def test_a_stage_run_alone_is_a_report_that_says_what_is_missing(tmp_path: Path):
    write_stage(tmp_path / "runs/mine")
    page = report(tmp_path / "runs/mine")
    assert "Loss against tokens" in page.text
    assert "step 7: step skipped: loss is not finite" in page.text
    assert "1 training step was skipped" in page.text
    missing = page.text.partition("Not in this report")[2]
    for part in ("machine", "started", "architecture", "statistics of the data", "accuracy", "bits per byte"):
        assert part in missing


def test_a_folder_with_one_stage_shows_that_stage(tmp_path: Path):
    write_stage(tmp_path / "pretrain")
    assert "Pretrain" in report(tmp_path).text


def test_a_model_left_by_the_stage_tells_the_architecture(tmp_path: Path):
    write_stage(tmp_path / "pretrain")
    (tmp_path / "pretrain/model").mkdir()
    (tmp_path / "pretrain/model/config.json").write_text(json.dumps(SIZES["nano"].to_hf()))
    page = report(tmp_path)
    assert "4,237,760" in page.text
    assert "the model's architecture" not in page.text


def test_a_journey_without_training_is_a_report_too(tmp_path: Path):
    (tmp_path / "journey.json").write_text(json.dumps({"results": {"problems": problem_results()}}))
    page = report(tmp_path)
    assert "75.0 % right" in page.text
    assert "no stage left a metrics.jsonl" in page.text


@pytest.mark.parametrize("part", sorted(journey()))
def test_every_part_is_optional(tmp_path: Path, part: str):
    value = journey()
    del value[part]
    write_stage(tmp_path / "pretrain", steps=12)
    (tmp_path / "journey.json").write_text(json.dumps(value))
    assert "Loss against tokens" in report(tmp_path).text


def test_a_run_that_was_just_begun_is_a_report_too(tmp_path: Path):
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", step=1, tokens=10, seconds=1.0, loss=8.0)
    assert "Loss against tokens" in report(tmp_path).text
    (tmp_path / "metrics.jsonl").write_text("")
    assert "no stage left a metrics.jsonl" in report(tmp_path).text


def test_where_there_is_no_run_nothing_is_written(tmp_path: Path):
    with pytest.raises(InputError, match="not a folder"):
        write_report(tmp_path / "nowhere", tmp_path / "report.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"neither journey\.json nor a metrics\.jsonl"):
        write_report(tmp_path / "empty", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_stage_outside_the_run_is_refused(tmp_path: Path):
    run = tmp_path / "run"
    write_stage(tmp_path / "other")
    run.mkdir()
    (run / "journey.json").write_text(json.dumps({"stages": [{"name": "x", "folder": "../other"}]}))
    with pytest.raises(InputError, match="outside the run"):
        write_report(run, run / "report.html")


def test_the_same_run_gives_the_same_page(tmp_path: Path):
    write_stage(tmp_path / "run")
    write_report(tmp_path / "run", tmp_path / "a.html")
    write_report(tmp_path / "run", tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_long_run_does_not_make_a_heavy_page(tmp_path: Path):
    steps = list(range(200_000))
    chart = line_chart([Curve("", steps, [1 / (step + 1) for step in steps])], "x", "y")
    assert len(chart) < 40_000


def test_smoothing_neither_lags_nor_fills_gaps():
    line = [float(value) for value in range(600)]
    assert smoothed(line) == pytest.approx(line)
    with_gap: list[float | None] = [1.0] * 200
    with_gap[50] = None
    with_gap[51] = math.nan
    result = smoothed(with_gap)
    assert [place for place, value in enumerate(result) if value is None] == [50, 51]
    assert all(value == pytest.approx(1.0) for value in result if value is not None)
    assert smoothed([]) == []


def test_intervals_are_wilsons_and_stay_within_0_and_1():
    low, high = interval_95({"accuracy": 1.0, "count": 10, "standard_error": 0.0})
    assert (low, high) == (pytest.approx(0.7225, abs=1e-3), 1.0)
    low, high = interval_95({"accuracy": 0.5, "count": 100})
    assert (low, high) == (pytest.approx(0.4038, abs=1e-3), pytest.approx(0.5962, abs=1e-3))
    assert interval_95({"accuracy": 0.5, "standard_error": 0.1}) == pytest.approx((0.304, 0.696))


def test_elements_escape_everything_that_is_not_html():
    made = element("p", "<b>", Html("<b></b>"), class_='"><script>')
    assert made == '<p class="&quot;&gt;&lt;script&gt;">&lt;b&gt;<b></b></p>'


def test_counts_are_short():
    counts = [in_count(number).replace("\N{NO-BREAK SPACE}", " ") for number in (950, 4_237_760, 6.71e11, 1.48e13)]
    assert counts == ["950", "4.24 M", "671 B", "14.8 T"]
