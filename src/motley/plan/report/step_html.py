"""One step as a picture: every pipeline group on one axis in seconds, and the pipeline of the biggest one in detail.

a100   ▟██████████████████▙▒▒▓░     a row of each chip of a replica: its micro-batches, blank where it idles (bubble)
v100   ▟████████████████▙▒▒▒▓░░     then gradients exchanged ▒, optimizer ▓, waiting for the slowest group ░
       0 s      5 s      10 s
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motley.page import Html
from motley.plan.cost_model.pipeline_trace import TracedWork, timeline
from motley.plan.report.text import seconds_text
from motley.svg import LEFT, WIDTH, Axes, fits, legend, line, rect, svg, text

MOST_WORKS = 20_000  # micro-batches x stages that are simulated; beyond, a step's ramps are too short to see
DETAIL_STAGES, DETAIL_MICRO_BATCHES = 16, 16
NARROWEST = 5  # pixels of a box of its own in the detailed pipeline
BOX = 17  # height of a box there
KINDS = {"F": "forward", "B": "backward", "W": "gradients of weights"}
OPACITY = {"F": 1.0, "B": 0.55, "W": 0.3}
AFTER = {"exchange": "var(--muted)", "optimizer": "var(--ink)", "waiting": "url(#hatch)"}  # no pool's colours
AFTER_NAMES = {"exchange": "gradients exchanged", "optimizer": "optimizer", "waiting": "waiting for the slowest group"}


@dataclass(frozen=True)
class StepPhases:
    """Seconds of a group's step: `pipeline` (micro-batches and bubble), then one after the other."""

    pipeline: float
    exchange: float
    optimizer: float
    waiting: float


def phases(group: Mapping[str, Any]) -> StepPhases:
    """From a group of a plan file: what its micro-batches do not take of its communication comes after them."""
    each = [stage["seconds_per_micro_batch"] for stage in group["stages"]]
    if group["schedule"] == "dualpipe":  # a chip holds two stages, and half of the micro-batches take each way
        each = [(one + other) / 2 for one, other in zip(each, reversed(each), strict=True)]
    seconds = group["seconds"]
    pipeline = group["micro_batches"] * max(each) + seconds["bubble"]
    inside = max(pipeline - seconds["compute"] - seconds["bubble"], 0.0)
    return StepPhases(pipeline, max(seconds["communication"] - inside, 0.0), seconds["optimizer"], seconds["waiting"])


def step_svg(plan: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """All groups, one below the other."""
    parts: list[Html] = []
    top, each = 8.0, 5.0 if len(plan["groups"]) > 2 else 10.0
    axes = Axes((0, plan["step_seconds"]), (0, 1), left=LEFT, right=WIDTH - 20, top=top)
    for group in plan["groups"]:
        rows = _traced(group, group["micro_batches"])
        height = min(max(each * len(rows), 22.0), 12.8 * each)
        parts += [
            text(LEFT - 10, top + height / 2, " → ".join(group["pools"]), "end"),
            text(LEFT - 10, top + height / 2 + 15, f"{group['share']:.1%} of the batch", "end", "var(--muted)", 11),
            *_group_parts(group, rows, colours, axes, top, height),
        ]
        top += max(height, 30) + 12
    frame = Axes(axes.x, axes.y, axes.left, axes.right, 4, top).frame("seconds")
    names = {AFTER_NAMES[name]: colour for name, colour in AFTER.items()}
    drawn = [*frame, *parts, *legend({"idle in the pipeline": "var(--rule)", **names}, top + 46)]
    return svg(top + 64, drawn)


def _group_parts(
    group: Mapping[str, Any],
    rows: Sequence[Sequence[TracedWork]],
    colours: Mapping[str, str],
    axes: Axes,
    top: float,
    height: float,
) -> Iterator[Html]:
    own = phases(group)
    stretch = own.pipeline / max(work.end for row in rows for work in row)  # the plan's seconds, the schedule's order
    each = height / len(rows)
    name = " → ".join(group["pools"])
    tip = f"{name}: {group['micro_batches']} micro-batches and the bubble, {seconds_text(own.pipeline)}"
    start, end = axes.across(0), axes.across(own.pipeline)
    yield rect(start, top, end - start, height, "var(--rule)", tip, 0.55, edge=False)
    for number, row in enumerate(rows):
        for first, last, stage in _busy(row, axes, stretch):
            colour = colours[group["stages"][stage]["pool"]]
            yield rect(first, top + number * each, last - first, max(each - 0.7, 0.7), colour, tip, edge=False)
    for what, colour in AFTER.items():
        seconds = getattr(own, what)
        start, end = end, end + axes.across(seconds) - axes.across(0)
        if end - start > 0.5:
            tip = f"{name}: {AFTER_NAMES[what]}, {seconds_text(seconds)}"
            yield rect(start, top, end - start, height, colour, tip, edge=False)


def _traced(group: Mapping[str, Any], micro_batches: int) -> list[list[TracedWork]]:
    """The schedule simulated; of a stage's time a third each is F, B and W."""
    thirds = [(stage["seconds_per_micro_batch"] / 3,) * 3 for stage in group["stages"]]
    return timeline(thirds, min(micro_batches, max(2 * group["pp"], MOST_WORKS // group["pp"])), group["schedule"])


def _busy(row: Sequence[TracedWork], axes: Axes, stretch: float) -> Iterator[tuple[float, float, int]]:
    """(first pixel, last pixel, a stage) of each time without a visible pause."""
    first, last, stage = 0.0, -1.0, 0
    for work in row:
        start, end = axes.across(work.start * stretch), axes.across(work.end * stretch)
        if last < 0:
            first, stage = start, work.stage
        elif start - last > 0.5:
            yield first, last, stage
            first, stage = start, work.stage
        last = end
    yield first, last, stage


def _boxes(row: Sequence[TracedWork], axes: Axes) -> Iterator[tuple[float, float, list[TracedWork]]]:
    """(first pixel, last pixel, works) of each box; works too short to be seen share one with those they touch."""
    together: list[TracedWork] = []
    for work in row:
        short_one = axes.across(work.end) - axes.across(work.start) < NARROWEST
        touches = together and axes.across(work.start) - axes.across(together[-1].end) < 0.5
        if together and not (short_one and touches):
            yield axes.across(together[0].start), axes.across(together[-1].end), together
            together = []
        if short_one:
            together.append(work)
        else:
            yield axes.across(work.start), axes.across(work.end), [work]
    if together:
        yield axes.across(together[0].start), axes.across(together[-1].end), together


def work_boxes(row: Sequence[TracedWork], axes: Axes, y: float, colours: Sequence[str]) -> Iterator[Html]:
    """What one chip does, box by box from `y` on; `colours` of the stages."""
    for first, last, works in _boxes(row, axes):
        kind, micro, stage = works[0].kind, works[0].micro_batch + 1, works[0].stage + 1
        more = f" and {len(works) - 1} more, each too short to show" if len(works) > 1 else ""
        tip = f"{KINDS[kind]} of micro-batch {micro}, stage {stage}{more}"
        yield rect(first, y, last - first, BOX, colours[stage - 1], tip, OPACITY[kind])
        if kind == "F" and len(works) == 1 and fits(str(micro), last - first - 3, 9):
            yield text((first + last) / 2, y + 12, str(micro), "middle", "#fff", 9)


def detail_count(group: Mapping[str, Any]) -> int:
    """Micro-batches that the detailed pipeline shows."""
    return min(group["micro_batches"], max(DETAIL_MICRO_BATCHES, 2 * group["pp"]))


def detail_caption(group: Mapping[str, Any]) -> str:
    shown, whole = detail_count(group), group["micro_batches"]
    cut = f"; shortened to the first {shown} of {whole} micro-batches" if shown < whole else ""
    kinds = "dark: forward, lighter: backward" + (", palest: gradients of weights" * (group["schedule"] != "1f1b"))
    return f"schedule {group['schedule']}{cut}; {kinds}; numbers: micro-batches"


def detail_svg(group: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """What every chip of one replica does, box by box."""
    rows = _traced(group, detail_count(group))
    shown = rows[:DETAIL_STAGES]
    bottom = 8.0 + 22 * len(shown)
    axes = Axes((0, max(work.end for row in rows for work in row)), (0, 1), LEFT, WIDTH - 20, 4, bottom)
    parts = axes.frame("seconds")
    for number, row in enumerate(shown):
        y = 8 + 22.0 * number
        twin = group["pp"] - 1 - number
        stages = f"{number + 1} and {twin + 1}" if group["schedule"] == "dualpipe" and twin != number else number + 1
        label = f"{group['stages'][number]['pool']} · stage{'s' * (stages != number + 1)} {stages}"
        parts.append(text(LEFT - 10, y + 13, label, "end", size=12))
        parts += work_boxes(row, axes, y, [colours[stage["pool"]] for stage in group["stages"]])
    if hidden := len(rows) - len(shown):
        parts.append(text(LEFT, bottom + 36, f"and {hidden} stages more", colour="var(--muted)", size=12))
    parts.append(line(LEFT, bottom, WIDTH - 20, bottom))
    return svg(bottom + 42, parts)
