"""One step as a picture: every team against one axis in seconds, and the pipeline of the biggest team in detail.

a100   ▟██████████████████▙▒▒▓░     a row of each chip of a copy: its micro-batches, blank where it idles (bubble)
v100   ▟████████████████▙▒▒▒▓░░     then gradients exchanged ▒, optimizer ▓, waiting for the slowest team ░
       0 s      5 s      10 s
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motley.page import Html
from motley.plan.cost_model.pipeline_trace import Work, timeline
from motley.plan.report.text import seconds_text
from motley.svg import LEFT, WIDTH, Axes, fits, legend, line, rect, svg, text

MOST_WORKS = 20_000  # micro-batches x stages that are played through; beyond, a step's ramps are too short to see
DETAIL_STAGES, DETAIL_MICRO_BATCHES = 16, 16
NARROWEST = 5  # pixels of a box of its own in the detailed pipeline
BOX = 17  # height of a box there
KINDS = {"F": "forward", "B": "backward", "W": "gradients of weights"}
OPACITY = {"F": 1.0, "B": 0.55, "W": 0.3}
AFTER = {"exchange": "var(--muted)", "optimizer": "var(--ink)", "waiting": "url(#hatch)"}  # no pool's colours
AFTER_NAMES = {"exchange": "gradients exchanged", "optimizer": "optimizer", "waiting": "waiting for the slowest team"}


@dataclass(frozen=True)
class Phases:
    """Seconds of a team's step: `pipeline` (micro-batches and bubble), then one after the other."""

    pipeline: float
    exchange: float
    optimizer: float
    waiting: float


def phases(team: Mapping[str, Any]) -> Phases:
    """From a team of a plan file: what its micro-batches do not take of its communication comes after them."""
    each = [stage["seconds_per_micro_batch"] for stage in team["stages"]]
    if team["schedule"] == "dualpipe":  # a chip holds two stages, and half of the micro-batches take each way
        each = [(one + other) / 2 for one, other in zip(each, reversed(each), strict=True)]
    seconds = team["seconds"]
    pipeline = team["micro_batches"] * max(each) + seconds["bubble"]
    inside = max(pipeline - seconds["compute"] - seconds["bubble"], 0.0)
    return Phases(pipeline, max(seconds["communication"] - inside, 0.0), seconds["optimizer"], seconds["waiting"])


def step_svg(plan: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """All teams, one below the other."""
    parts: list[Html] = []
    top, each = 8.0, 5.0 if len(plan["teams"]) > 2 else 10.0
    axes = Axes((0, plan["step_seconds"]), (0, 1), left=LEFT, right=WIDTH - 20, top=top)
    for team in plan["teams"]:
        rows = _played(team, team["micro_batches"])
        height = min(max(each * len(rows), 22.0), 12.8 * each)
        parts += [
            text(LEFT - 10, top + height / 2, " → ".join(team["pools"]), "end"),
            text(LEFT - 10, top + height / 2 + 15, f"{team['share']:.1%} of the batch", "end", "var(--muted)", 11),
            *_team_parts(team, rows, colours, axes, top, height),
        ]
        top += max(height, 30) + 12
    frame = Axes(axes.x, axes.y, axes.left, axes.right, 4, top).frame("seconds")
    names = {AFTER_NAMES[name]: colour for name, colour in AFTER.items()}
    drawn = [*frame, *parts, *legend({"idle in the pipeline": "var(--rule)", **names}, top + 46)]
    return svg(top + 64, drawn)


def _team_parts(
    team: Mapping[str, Any],
    rows: Sequence[Sequence[Work]],
    colours: Mapping[str, str],
    axes: Axes,
    top: float,
    height: float,
) -> Iterator[Html]:
    own = phases(team)
    stretch = own.pipeline / max(work.end for row in rows for work in row)  # the plan's seconds, the schedule's order
    each = height / len(rows)
    name = " → ".join(team["pools"])
    tip = f"{name}: {team['micro_batches']} micro-batches and the bubble, {seconds_text(own.pipeline)}"
    start, end = axes.across(0), axes.across(own.pipeline)
    yield rect(start, top, end - start, height, "var(--rule)", tip, 0.55, edge=False)
    for number, row in enumerate(rows):
        for first, last, stage in _busy(row, axes, stretch):
            colour = colours[team["stages"][stage]["pool"]]
            yield rect(first, top + number * each, last - first, max(each - 0.7, 0.7), colour, tip, edge=False)
    for what, colour in AFTER.items():
        seconds = getattr(own, what)
        start, end = end, end + axes.across(seconds) - axes.across(0)
        if end - start > 0.5:
            tip = f"{name}: {AFTER_NAMES[what]}, {seconds_text(seconds)}"
            yield rect(start, top, end - start, height, colour, tip, edge=False)


def _played(team: Mapping[str, Any], micro_batches: int) -> list[list[Work]]:
    """The schedule played through; of a stage's time a third each is F, B and W."""
    thirds = [(stage["seconds_per_micro_batch"] / 3,) * 3 for stage in team["stages"]]
    return timeline(thirds, min(micro_batches, max(2 * team["pp"], MOST_WORKS // team["pp"])), team["schedule"])


def _busy(row: Sequence[Work], axes: Axes, stretch: float) -> Iterator[tuple[float, float, int]]:
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


def _boxes(row: Sequence[Work], axes: Axes) -> Iterator[tuple[float, float, list[Work]]]:
    """(first pixel, last pixel, works) of each box; works too short to be seen share one with those they touch."""
    together: list[Work] = []
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


def work_boxes(row: Sequence[Work], axes: Axes, y: float, colours: Sequence[str]) -> Iterator[Html]:
    """What one chip does, box by box from `y` on; `colours` of the stages."""
    for first, last, works in _boxes(row, axes):
        kind, micro, stage = works[0].kind, works[0].micro_batch + 1, works[0].stage + 1
        more = f" and {len(works) - 1} more, each too short to show" if len(works) > 1 else ""
        tip = f"{KINDS[kind]} of micro-batch {micro}, stage {stage}{more}"
        yield rect(first, y, last - first, BOX, colours[stage - 1], tip, OPACITY[kind])
        if kind == "F" and len(works) == 1 and fits(str(micro), last - first - 3, 9):
            yield text((first + last) / 2, y + 12, str(micro), "middle", "#fff", 9)


def detail_count(team: Mapping[str, Any]) -> int:
    """Micro-batches that the detailed pipeline shows."""
    return min(team["micro_batches"], max(DETAIL_MICRO_BATCHES, 2 * team["pp"]))


def detail_caption(team: Mapping[str, Any]) -> str:
    shown, whole = detail_count(team), team["micro_batches"]
    cut = f"; shortened to the first {shown} of {whole} micro-batches" if shown < whole else ""
    kinds = "dark: forward, lighter: backward" + (", palest: gradients of weights" * (team["schedule"] != "1f1b"))
    return f"schedule {team['schedule']}{cut}; {kinds}; numbers: micro-batches"


def detail_svg(team: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """What every chip of one copy does, box by box."""
    rows = _played(team, detail_count(team))
    shown = rows[:DETAIL_STAGES]
    bottom = 8.0 + 22 * len(shown)
    axes = Axes((0, max(work.end for row in rows for work in row)), (0, 1), LEFT, WIDTH - 20, 4, bottom)
    parts = axes.frame("seconds")
    for number, row in enumerate(shown):
        y = 8 + 22.0 * number
        twin = team["pp"] - 1 - number
        stages = f"{number + 1} and {twin + 1}" if team["schedule"] == "dualpipe" and twin != number else number + 1
        label = f"{team['stages'][number]['pool']} · stage{'s' * (stages != number + 1)} {stages}"
        parts.append(text(LEFT - 10, y + 13, label, "end", size=12))
        parts += work_boxes(row, axes, y, [colours[stage["pool"]] for stage in team["stages"]])
    if hidden := len(rows) - len(shown):
        parts.append(text(LEFT, bottom + 36, f"and {hidden} stages more", colour="var(--muted)", size=12))
    parts.append(line(LEFT, bottom, WIDTH - 20, bottom))
    return svg(bottom + 42, parts)
