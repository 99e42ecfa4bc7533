"""A replay as a page: when the run will be done, one run drawn, how often to write a checkpoint."""

from collections.abc import Mapping
from typing import Any

from motley.page import element, facts_table, figure, whole_page
from motley.progress import in_words
from motley.svg import histogram, line_plot, tile


def simulation_page(result: Mapping[str, Any]) -> str:
    """HTML of a replay."""
    tiles = [
        tile("median", f"{result['days_p50']:,.1f} days", f"{result['days_without_failures']:,.1f} without failures"),
        tile("goodput", f"{result['goodput']:.1%}", "useful time over all time"),
        tile("failures", f"{result['failures_mean']:,.0f}", f"one every {result['hours_between_failures']:,.1f} hours"),
        tile("checkpoint every", in_words(min(result["suggested_interval_seconds"], 1e6)), "is best"),
    ]
    lost = [(name, f"{share:.2%}") for name, share in result["lost_share"].items()]
    days = [run["days"] for run in result["runs"]]
    body = [
        element(
            "header",
            element("p", "motley plan simulate", class_="brand"),
            element("h1", f"{result['model']} on {result['fleet']}"),
        ),
        element("div", *tiles, class_="tiles"),
        element(
            "section",
            element("h2", "When will it be done?"),
            figure(f"Days, {len(days)} replays", histogram(days)),
        ),
        element(
            "section",
            element("h2", "One of them"),
            figure(
                "Share of the work done against days",
                line_plot(result["timeline"], "days", "done"),
                "each step down is a failure: work since the last checkpoint is lost",
            ),
        ),
        element(
            "section",
            element("h2", "How often to write a checkpoint"),
            figure(
                "Expected goodput against the interval",
                line_plot([(s / 60, g) for s, g in result["intervals"]], "minutes", "goodput"),
            ),
        ),
        element("section", element("h2", "What the time went to besides"), facts_table(lost)),
    ]
    return whole_page("replay", body)
