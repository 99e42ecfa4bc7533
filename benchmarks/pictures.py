"""The picture of the race: held-out loss against chip time, each run a line, each side a colour."""

import io
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "motley", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#dfdeda", "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip
ORDINARY, OURS = "#d9720b", "#2f6fd6"


def picture(found: dict[str, Any]) -> str:
    """An SVG file of what thrift.py found; the time axis is logarithmic, for ratios of times are what counts."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(8, 4.5))
        axes = figure.add_subplot()
        runs = [("ordinary recipe", ORDINARY, found["ordinary"])]
        runs += [("motley, each a whole run", OURS, found["ours"][part]) for part in found["ours"]]
        named: set[str] = set()
        for name, colour, seeds in runs:
            for run in seeds:
                seconds, _, losses = zip(*run["curve"], strict=True)
                axes.plot(
                    seconds, losses, color=colour, linewidth=1.2, alpha=0.6, label=None if name in named else name
                )
                axes.plot(seconds[-1:], losses[-1:], "o", color=colour, markersize=5)
                named.add(name)
        axes.axhline(found["loss"], color=ORDINARY, linewidth=0.8, linestyle="--")
        axes.set_xscale("log")
        for set_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            set_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("seconds of chip time")
        axes.set_ylabel("held-out loss, nats a token")
        axes.legend()
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        return file.getvalue()
