"""Pictures of benchmarks, as SVG files: the race, and the laws of the loss."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from motley.files import write_text
from motley.plan.scaling_law import DENSE, SPARSE, LossLaw

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "motley", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#dfdeda", "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip
ORDINARY, OURS, COUNTS, HORIZON = "#d9720b", "#2f6fd6", "#6b6a66", "#a3360a"


@contextmanager
def drawn(file: Path, across: str) -> Iterator[Axes]:
    """Axes of held-out loss over `across`, which is logarithmic, for ratios are what counts; written to `file`."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(8, 4.5))
        axes = figure.add_subplot()
        axes.set_xscale("log")
        yield axes
        axes.set_xlabel(across)
        axes.set_ylabel("held-out loss, nats a token")
        axes.legend()
        image = io.StringIO()
        figure.savefig(image, format="svg", metadata={"Date": None, "Creator": None})
        write_text(file, image.getvalue())


def draw_race(found: dict[str, Any], file: Path) -> None:
    """What thrift.py found: each run a line, each side a colour; the counts alone, which take seconds, dotted."""
    runs = [("ordinary recipe", ORDINARY, found["ordinary"])]
    runs += [("motley, each a whole run", OURS, found["ours"][part]) for part in found["ours"]]
    if "horizon" in found:
        runs.append(("ordinary recipe, its horizon", HORIZON, [found["horizon"]]))
    counts = found["counts"]
    named: set[str] = set()
    with drawn(file, "seconds of chip time") as axes:
        for name, colour, seeds in runs:
            for run in seeds:
                seconds, _, losses = zip(*run["curve"], strict=True)
                label = None if name in named else name
                axes.plot(seconds, losses, color=colour, linewidth=1.2, alpha=0.6, label=label)
                axes.plot(seconds[-1:], losses[-1:], "o", color=colour, markersize=5)
                named.add(name)
        axes.axhline(found["loss"], color=ORDINARY, linewidth=0.8, linestyle="--")
        alone = f"counts alone, {counts['seconds']:.1f} s"
        axes.axhline(counts["loss"], color=COUNTS, linewidth=1.2, linestyle=":", label=alone)
        axes.plot([counts["seconds"]], [counts["loss"]], "o", color=COUNTS, markersize=5)
        for set_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            set_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def draw_laws(found: dict[str, Any], file: Path) -> None:
    """What scaling_law.py found: each run a dot, each size a line by its law, the best split of a budget dashed."""
    with drawn(file, "compute, 6 x parameters that multiply x tokens, FLOPs") as axes:
        for kind, colour in ((DENSE, ORDINARY), (SPARSE, OURS)):
            if kind not in found:  # no time for it
                continue
            law, runs = LossLaw(**found[kind]["law"]), found[kind]["runs"]
            for size in sorted({run["parameters"] for run in runs}):
                own = sorted(run["tokens"] for run in runs if run["parameters"] == size)
                lengths = [own[0] * (own[-1] / own[0]) ** (step / 40) for step in range(41)]
                flops = [6 * size * length for length in lengths]
                axes.plot(flops, [law.loss(size, n) for n in lengths], color=colour, linewidth=0.8, alpha=0.6)
            flops = [6 * run["parameters"] * run["tokens"] for run in runs]
            axes.plot(flops, [run["loss"] for run in runs], "o", color=colour, markersize=4, label=kind)
            budgets = [min(flops) * (30 * max(flops) / min(flops)) ** (step / 40) for step in range(41)]
            least = [law.loss(*law.best_split(budget)) for budget in budgets]
            axes.plot(budgets, least, color=colour, linewidth=1.2, linestyle="--", label=f"{kind}, best split")
