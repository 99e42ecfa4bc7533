"""Charts as SVG text that goes into a page: no files, no requests, colours of the page's own theme.

matplotlib draws with stand-in colours (`#0101..`); in the finished SVG these become CSS variables, so the
same picture is readable on a light and on a dark page.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

THEME = {  # stand-in colour → CSS variable of the page
    "#010101": "var(--ink)",
    "#010102": "var(--muted)",
    "#010103": "var(--rule)",
    "#010104": "var(--first)",
    "#010105": "var(--second)",
    "#010106": "var(--third)",
    "#010107": "var(--paper)",
}
INK, MUTED, RULE, FIRST, SECOND, THIRD, PAPER = THEME
HEAT = (0.22, 0.49, 0.85)  # one hue, more or less of it: readable on any ground
MOST_POINTS = 500  # per curve: more cannot be seen, but would make the page heavy
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, in the page's font
    "svg.hashsalt": "motley",
    "text.parse_math": False,  # a `$` in a name is a dollar
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": MUTED,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Curve:
    """One line of a chart; values that are None or NaN are gaps.

    Attributes:
        label: for the legend; empty: not listed there.
        x: where.
        y: what, as many values.
        colour: one of the stand-in colours above.
        faint: drawn thin and pale, as background for a smoothed line.
        markers: mark every point (few, precious values such as validations).
    """

    label: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    colour: str = FIRST
    faint: bool = False
    markers: bool = False


def line_chart(
    curves: Sequence[Curve], x_label: str, y_label: str, from_zero: bool = False, small: bool = False
) -> str:
    """Curves over a common axis; large numbers are labelled in k, M, G."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(3.0, 2.1) if small else (5.4, 3.0))
        axes = figure.add_subplot()
        for curve in curves:
            x, y = _thinned(curve.x, curve.y)
            axes.plot(
                x,
                y,
                color=curve.colour,
                label=curve.label or None,
                linewidth=0.8 if curve.faint else None,
                alpha=0.45 if curve.faint else None,
                marker="o" if curve.markers else None,
                markersize=4,
                markeredgecolor=PAPER,
                markeredgewidth=0.8,
            )
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _short_numbers(axes, from_zero)
        if sum(bool(curve.label) for curve in curves) > 1:
            axes.legend()
        return _svg(figure)


def smoothed(values: Sequence[float | None]) -> list[float | None]:
    """Mean over about a thirtieth of the curve around each point, symmetric at its ends too; gaps stay."""
    numbers = np.array([np.nan if value is None else value for value in values], dtype=float)
    finite = np.isfinite(numbers)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, numbers, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    places = np.arange(len(numbers))
    reach = np.minimum(np.minimum(places, places[::-1]), len(numbers) // 60)
    low, high = places - reach, places + reach + 1
    means = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return [float(mean) if there else None for mean, there in zip(means, finite, strict=True)]


def heat_map(load: Sequence[Sequence[float | None]], x_label: str, y_label: str) -> str:
    """Rows of shares as a map; full colour is twice the fair share or more, half colour is fair."""
    shares = np.array([[value or 0.0 for value in row] for row in load])
    relative = shares * shares.shape[1] / np.maximum(shares.sum(axis=1, keepdims=True), 1e-12)
    with matplotlib.rc_context({**SETTINGS, "axes.grid": False}):
        figure = Figure(figsize=(5.4, 3.0), dpi=150)
        axes = figure.add_subplot()
        axes.imshow(_tinted(relative), aspect="auto", interpolation="nearest")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        scale = axes.inset_axes((1.03, 0.0, 0.03, 1.0))
        scale.imshow(_tinted(np.linspace(2, 0, 64)[:, None]), aspect="auto", extent=(0, 1, 0, 2))
        scale.set_xticks([])
        scale.set_yticks([0, 1, 2], ["idle", "fair", "2x fair\nor more"])
        scale.yaxis.tick_right()
        return _svg(figure)


def interval_chart(
    names: Sequence[str], values: Sequence[float], intervals: Sequence[tuple[float, float]], x_label: str
) -> str:
    """Horizontal bars of shares with their 95 % intervals, first name on top."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(10.4, 0.6 + 0.36 * len(names)))
        axes = figure.add_subplot()
        places = range(len(names))
        axes.barh(places, [100 * value for value in values], color=FIRST, height=0.58)
        below = [100 * (value - low) for value, (low, _) in zip(values, intervals, strict=True)]
        above = [100 * (high - value) for value, (_, high) in zip(values, intervals, strict=True)]
        axes.errorbar(
            [100 * value for value in values],
            places,
            xerr=np.maximum([below, above], 0),
            fmt="none",
            ecolor=INK,
            elinewidth=1.2,
            capsize=3,
        )
        for place, value in zip(places, values, strict=True):
            axes.text(1.015, place, f"{100 * value:.0f} %", transform=axes.get_yaxis_transform(), va="center")
        axes.set_yticks(places, names)
        axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=9)
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel(x_label)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        return _svg(figure)


def _tinted(relative: np.ndarray) -> np.ndarray:
    """[rows, columns] of multiples of the fair share → RGBA: one colour, opacity by the multiple."""
    colours = np.empty((*relative.shape, 4))
    colours[..., :3] = HEAT
    colours[..., 3] = np.clip(relative / 2, 0, 1)
    return colours


def _thinned(x: Sequence[float | None], y: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """At most `MOST_POINTS` points: means of neighbours, but a single gap never hides its neighbours."""
    xs, ys = (np.array([np.nan if value is None else value for value in side], dtype=float) for side in (x, y))
    if len(xs) <= MOST_POINTS:
        return xs, ys
    edges = np.linspace(0, len(xs), MOST_POINTS + 1).astype(int)

    def means(values: np.ndarray) -> np.ndarray:
        finite = np.isfinite(values)
        sums = np.add.reduceat(np.where(finite, values, 0), edges[:-1])
        counts = np.add.reduceat(finite.astype(int), edges[:-1])
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)

    return means(xs), means(ys)


def _short_numbers(axes: Axes, from_zero: bool) -> None:
    engineering = EngFormatter(sep="")
    short = FuncFormatter(lambda value, _: engineering(value) if abs(value) >= 1000 else f"{value:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(short)
        axis.set_major_locator(MaxNLocator(nbins=5))
    if from_zero:
        axes.set_ylim(bottom=0)


def _svg(figure: Figure) -> str:
    """The drawing as an `<svg>` element in the page's colours and font."""
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    drop = [
        r"<metadata>.*?</metadata>",
        r"<style.*?</style>",  # would apply to the whole page
        r"font-family: [^;]*;",
        r'(?<=<g) id="[^"]*"',  # the same in every chart, and nothing refers to them
    ]
    text = re.sub("|".join(drop), "", text, flags=re.DOTALL)
    text = re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", text)
    text = re.sub(r'^<svg([^>]*?) height="[^"]*"', r"<svg\1", text)
    for stand_in, variable in THEME.items():
        text = text.replace(stand_in, variable)
    return text
