"""A replay as a page: when the run will be done, one run drawn day by day, how often to write a checkpoint."""

from collections.abc import Mapping
from typing import Any

from motley.page import Html, element, facts_table, figure, whole_page
from motley.progress import in_words
from motley.svg import Axes, histogram, legend, line, line_plot, path, svg, text, tile, tiles


def simulation_page(result: Mapping[str, Any]) -> str:
    """HTML of a replay."""
    days = [run["days"] for run in result["runs"]]
    cards = [
        tile("median", f"{result['days_p50']:,.1f} days", f"{result['days_without_failures']:,.1f} without failures"),
        tile("goodput", f"{result['goodput']:.1%}", "useful time over all time"),
        tile("failures", f"{result['failures_mean']:,.3g}", f"one every {_hours(result['hours_between_failures'])}"),
        tile("checkpoint every", in_words(min(result["suggested_interval_seconds"], 1e6)), "loses least"),
    ]
    lost = [(name, f"{share:.2%}") for name, share in result["lost_share"].items()]
    body = [
        element(
            "header",
            element("p", "motley plan simulate", class_="brand"),
            element("h1", f"{result['model']} on {result['fleet']}"),
            element(
                "p", f"{result['chips']:,} chips, {len(days)} replays with failures and stragglers", class_="muted"
            ),
        ),
        tiles(cards),
        element(
            "section",
            element("h2", "When will it be done?"),
            figure(
                "Length of the run",
                histogram(days, "days until it is done", "replays"),
                f"nine replays of ten take {result['days_p5']:,.1f} to {result['days_p95']:,.1f} days",
            ),
        ),
        element(
            "section",
            element("h2", "One of them, day by day"),
            figure(
                "Work done and chips at work",
                _days_svg(result["timeline"]),
                "the replay of median length; between line and area lie checkpoints, restarts and work that was lost "
                "and done again",
            ),
        ),
        *([_interval_section(result)] if result["intervals"] else []),
        element("section", element("h2", "What the time went to besides"), facts_table(lost)),
    ]
    return whole_page(f"{result['model']} on {result['fleet']}: replay", body)


def _interval_section(result: Mapping[str, Any]) -> Html:
    unit, size = ("hours", 3600) if result["suggested_interval_seconds"] > 7200 else ("minutes", 60)
    points = [(seconds / size, 100 * goodput) for seconds, goodput in result["intervals"]]
    best = f"best: {in_words(result['suggested_interval_seconds'])}"
    curve = line_plot(points, f"{unit} between two checkpoints", "expected goodput, %", ".4g", best)
    return element(
        "section", element("h2", "How often to write a checkpoint"), figure("Goodput against the interval", curve)
    )


def _days_svg(days: Mapping[str, Any]) -> str:
    """Useful work as an area, the speed of the chips that are there as a line, each failure a tick below."""
    edges = days["edges"]
    lowest = min(0.9, *days["work"], *days["speed"])
    low = max(int(lowest * 10 - 1e-9) / 10, 0.0)
    axes = Axes((0, edges[-1]), (low, 1.0), bottom=210)
    corners = [(at, min(max(value, low), 1.0)) for at, value in _stairs(edges, days["work"])]
    area = [(edges[0], low), *corners, (edges[-1], low)]
    parts = axes.frame("days", "share of full speed", ".0%")
    parts.append(path([(axes.across(x), axes.up(y)) for x, y in area], "var(--first)", 1.2, "var(--first)"))
    speed = [(axes.across(x), axes.up(y)) for x, y in _stairs(edges, days["speed"])]
    parts.append(path(speed, "var(--third)", 1.6))
    y = axes.bottom + 50
    for day in days["failures"]:
        parts.append(line(axes.across(day), y, axes.across(day), y + 12, "var(--bad)", 1.2))
    parts.append(text(4, y + 11, "failures", colour="var(--muted)", size=12))
    if not days["failures"]:
        parts.append(text(axes.left, y + 11, "none in this replay", colour="var(--muted)", size=12))
    names = {"useful work": "var(--first)", "chips at work": "var(--third)"}
    return svg(y + 46, [*parts, *legend(names, y + 26, axes.left)])


def _stairs(edges: list[float], values: list[float]) -> list[tuple[float, float]]:
    """Corners of a line that is constant between two edges."""
    return [(at, value) for start, end, value in zip(edges, edges[1:], values, strict=False) for at in (start, end)]


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours < 48 else f"{hours / 24:,.0f} days"
