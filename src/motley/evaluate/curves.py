"""The charts of one training stage, from its metrics."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motley.evaluate.charts import FIRST, MUTED, SECOND, THIRD, Curve, heat_map, line_chart, smoothed
from motley.page import Html, as_number, element, figure
from motley.train.metrics import imbalances


@dataclass(frozen=True)
class ReportStage:
    """One stage of the journey, with its metrics if it trained anything."""

    name: str
    title: str
    seconds: float | None
    predicted_seconds: float | None
    note: str
    folder: Path | None
    records: tuple[dict[str, Any], ...]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]


def stage_section(stage: ReportStage) -> Html:
    """The section of the page about one stage: all its charts, and what happened."""
    train, valid, experts = stage.of_kind("train"), stage.of_kind("valid"), stage.of_kind("experts")
    minutes = (as_number(stage.records[-1].get("seconds")) or 0) < 3 * 3600
    clock, per_clock = ("minutes", 60) if minutes else ("hours", 3600)
    axes = [("tokens", "tokens", 1), ("wall time", "seconds", per_clock)]

    large = []
    for against, field, unit in axes:
        label = "tokens" if field == "tokens" else clock
        large += _chart(f"Loss against {against}", _loss_curves(train, valid, field, unit), label, "nats per token")
    for against, field, unit in axes:
        label = "tokens" if field == "tokens" else clock
        bits = Curve("", _column(valid, field, unit), _column(valid, "bits_per_byte"), THIRD, markers=True)
        large += _chart(f"Held-out bits per byte against {against}", [bits], label, "bits per byte")
    if experts:
        large += _expert_charts(experts, train)

    small = []
    for title, field, unit, label in (
        ("Learning rate", "learning_rate", 1, ""),
        ("Gradient norm", "grad_norm", 1, ""),
        ("Throughput", "tokens_per_second", 1, "tokens per second"),
        ("Memory", "memory_bytes", 1e9, "GB"),
    ):
        curve = Curve("", _column(train, "tokens"), _column(train, field, unit))
        small += _chart(title, [curve], "tokens", label, small=True)

    events = [element("li", f"step {event['step']}: {event.get('message', '')}") for event in stage.of_kind("event")]
    return element(
        "section",
        element("h2", stage.title),
        element("div", *large, class_="charts"),
        element("div", *small, class_="charts small"),
        *([element("h3", "What happened on the way"), element("ul", *events)] if events else []),
    )


def _loss_curves(train: list[dict[str, Any]], valid: list[dict[str, Any]], field: str, unit: float) -> list[Curve]:
    x, loss, mtp = _column(train, field, unit), _column(train, "loss"), _column(train, "mtp_loss")
    curves = [Curve("", x, loss, FIRST, faint=True), Curve("training", x, smoothed(loss), FIRST)]
    if any(mtp):  # a weight of 0 leaves the MTP modules out of training
        curves.append(Curve("second-next token (MTP)", x, smoothed(mtp), MUTED))
    held_out = Curve("held out", _column(valid, field, unit), _column(valid, "loss"), SECOND, markers=True)
    return [*curves, held_out] if any(held_out.y) else curves


def _expert_charts(experts: list[dict[str, Any]], train: list[dict[str, Any]]) -> list[Html]:
    """Load of the experts at the end, and imbalance over the run: of every step, in older runs of validations."""
    load = experts[-1]["load"]
    if not load:
        return []
    heat = figure(
        "Load of the experts at the end",
        heat_map(load, "expert", "MoE layer"),
        "Share of the routed tokens against an even share.",
    )
    steps = [record for record in train if len(record.get("imbalance", ())) == len(load)] or experts
    uneven = [record.get("imbalance") or imbalances(record["load"]) for record in steps]
    x = _column(steps, "step")
    layers = [
        Curve("each MoE layer" if layer == 0 else "", x, smoothed([row[layer] for row in uneven]), FIRST, faint=True)
        for layer in range(len(load))
    ]
    worst = Curve("the most uneven layer", x, smoothed([max(row) for row in uneven]), SECOND)
    mean = Curve("mean", x, smoothed([sum(row) / len(row) for row in uneven]), FIRST)
    chart = line_chart([*layers, mean, worst], "step", "busiest expert / even share")
    number = len(load[0])
    caption = f"1 is perfect balance; the busiest of {number} experts took {max(uneven[-1]) / number:.0%} at the end."
    return [heat, figure("Imbalance over the run", chart, caption)]


def _chart(title: str, curves: Sequence[Curve], x_label: str, y_label: str, small: bool = False) -> list[Html]:
    """A figure, or nothing if there is nothing to draw."""
    drawn = [curve for curve in curves if any(value is not None for value in curve.y)]
    if not drawn:
        return []
    return [figure(title, line_chart(drawn, x_label, y_label, from_zero=small, small=small))]


def _column(records: list[dict[str, Any]], field: str, unit: float = 1) -> list[float | None]:
    values = [as_number(record.get(field)) for record in records]
    return [None if value is None else value / unit for value in values]
