"""Who waited for whom in a step, what each worker of a stage did over the run, how shares moved.

worker 0   ▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓█      a row a worker: passes by micro-batch, the optimizer, waits hatched and
worker 1   ▓▓▓▓▓▓▓▓▓╱╱╱╱╱ 0 ╱╱╱╱╱█      marked with the worker that was waited for
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from motley.evaluate.curves import Stage
from motley.fleet.picture import pool_colour
from motley.fleet.units import rate_text, size_text
from motley.page import Html, element, figure, in_percent
from motley.parallel.telemetry.step_stats import SETTLED
from motley.parallel.telemetry.step_timer import WAITS, WORK, Span
from motley.plan.cost_model.pipeline_trace import TracedWork, WorkKind
from motley.plan.report.step_html import BOX, work_boxes
from motley.plan.report.text import seconds_text
from motley.svg import LEFT, WIDTH, Axes, fits, legend, line, path, rect, svg, text

PASSES: Mapping[str, WorkKind] = {"forward": "F", "backward": "B", "weights": "W"}
WAITED_FOR = {
    "neighbour": "a neighbour in the pipeline",
    "experts": "tokens of experts",
    "gradients": "sums of gradients",
    "spreading": "new weights",
    "numbers": "counts, norm and losses",
    "meeting": "other islands",
}
MOST_ROWS = 32  # of a timeline
MOST_POINTS = 400  # of a curve
ROW = 22.0
HEADS = ("worker", "chip", "lane", "stage", "tokens/s alone", "share", "idle", "waits most for", "memory", "link")
SEEN = 0.6  # pixels of the shortest span that is drawn


def crew_section(stage: Stage) -> Html:
    """The section about the workers of a stage; nothing where one process worked alone."""
    comms = stage.of_kind("crew")
    if not comms or not (steps := _of_crew(stage.of_kind("workers"), comms[-1])):
        return Html("")
    about = comms[-1]
    settled = steps[_warm(about) :] or steps
    islands = about.get("islands", [0] * len(about["names"]))
    first_island = [worker for worker, island in enumerate(islands) if island == 0]
    timelines = [one for one in stage.of_kind("timeline") if "round" not in one and ("island" in one) == any(islands)]
    timelines = telling(timelines, len(first_island), SETTLED)
    figures = [_timeline_figure(drawn, about, first_island) for drawn in timelines]
    shares = figure("Shares of the rows", _shares_svg(steps, about), f"of each lane, {_each(about)} by {_each(about)}")
    return element(
        "section",
        element("h2", f"{stage.title}: the {'workers of all islands' if any(islands) else 'comm'}"),
        element("p", _step_sentence(settled, about)),
        _table(settled, about),
        element(
            "div",
            *figures,
            *([shares] if len(set(about["lanes"])) > 1 else []),
            style="display:grid;gap:16px;margin-top:20px",
        ),
    )


def _of_crew(records: Sequence[dict[str, Any]], about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those that tell of as many workers, in one crew or in islands as they are."""
    of_islands, workers = "islands" in about, len(about["names"])
    return [one for one in records if len(one["share"]) == workers and ("round" in one) == of_islands]


def telling(timelines: Sequence[Mapping[str, Any]], workers: int, settled: int) -> list[Mapping[str, Any]]:
    """Of the steps or rounds that were drawn, the first from number `settled` on, and the last."""
    drawn = [timeline for timeline in timelines if len(timeline["spans"]) == workers]
    first = [timeline for timeline in drawn if timeline.get("round", timeline["step"]) >= settled][:1]
    return [*first, *(timeline for timeline in drawn[-1:] if timeline not in first)]


def _step_sentence(steps: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """How long a step or round took, and how long the plan thought it would."""
    measured = statistics.median(step["step_seconds"] for step in steps)
    workers = len(about["names"])
    sentence = f"{workers} workers; a {_each(about)} takes {seconds_text(measured)} (median of {len(steps):,})"
    if predicted := about.get("predicted_step_seconds"):
        alone = " of computing" if "islands" in about else ""
        sentence += f"; the plan foresaw {seconds_text(predicted)}{alone} ({100 * (measured / predicted - 1):+.0f} %)"
    return f"{sentence}."


def _warm(about: Mapping[str, Any]) -> int:
    """How many records of all workers are of a warm-up."""
    return 1 if "islands" in about else SETTLED - 1


def _each(about: Mapping[str, Any]) -> str:
    """What a record of all workers is of."""
    return "round" if "islands" in about else "step"


# ---------------------------------------------------------------------------------------- over the run


def _table(steps: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> Html:
    islands = about.get("islands")
    heads = (HEADS[0], *(["island"] if islands else []), *HEADS[1:])
    rows = [_cells("th", heads, heads)]
    for worker, name in enumerate(about["names"]):
        cells = (
            f"{worker}",
            *([f"{islands[worker]}"] if islands else []),
            name,
            f"{about['lanes'][worker]}",
            f"{about['stages'][worker]}",
            f"{statistics.median(step['tokens_per_second'][worker] for step in steps):,.0f}",
            in_percent(statistics.fmean(step["share"][worker] for step in steps)),
            in_percent(statistics.fmean(step["idle_share"][worker] for step in steps)),
            _longest_wait(steps, worker),
            size_text(max(step["memory_bytes"][worker] for step in steps)),
            rate_text(statistics.fmean(step["link_bytes_per_second"][worker] for step in steps)),
        )
        rows.append(_cells("td", cells, heads))
    return element("table", *rows)


def _cells(tag: str, cells: Sequence[str], heads: Sequence[str]) -> Html:
    words = ("chip", "waits most for")  # the other columns are numbers
    kinds = ("" if head in words else "number" for head in heads)
    return element("tr", *(element(tag, cell, class_=kind) for cell, kind in zip(cells, kinds, strict=True)))


def _longest_wait(steps: Sequence[Mapping[str, Any]], worker: int) -> str:
    kinds = [kind for kind in WAITS if kind in steps[0]["wait_seconds"]]  # older runs knew fewer
    spent = {kind: sum(step["wait_seconds"][kind][worker] for step in steps) for kind in kinds}
    kind = max(spent, key=lambda kind: spent[kind])
    return WAITED_FOR[kind] if spent[kind] > 0 else ""


def _shares_svg(steps: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """A line a lane; one that falls behind is a straggler."""
    members = _members(about)
    every = -(-len(steps) // MOST_POINTS)
    shown = [*steps[::every], *([steps[-1]] if (len(steps) - 1) % every else [])]
    shares = [[step["share"][workers[0]] for step in shown] for workers in members]
    most = max(max(values) for values in shares)
    axes = Axes((shown[0]["step"], shown[-1]["step"]), (0, most), right=WIDTH - 130)
    parts = axes.frame("step", "share of the rows", ".0%")
    labels: list[float] = []
    for lane, values in sorted(enumerate(shares), key=lambda pair: -pair[1][-1]):
        points = [(axes.across(step["step"]), axes.up(value)) for step, value in zip(shown, values, strict=True)]
        parts.append(path(points, pool_colour(lane), 1.8))
        y = max(points[-1][1] + 4, labels[-1] + 13 if labels else 0)
        if y < axes.bottom + 30:
            labels.append(y)
            workers = members[lane]
            name = f"worker {workers[0]}" if len(workers) == 1 else f"workers {workers[0]}–{workers[-1]}"
            parts.append(text(axes.right + 8, y, name, colour=pool_colour(lane), size=12))
    return svg(axes.bottom + 44, parts)


def _members(about: Mapping[str, Any]) -> list[list[int]]:
    """Workers of each lane."""
    lanes = about["lanes"]
    return [[worker for worker, lane in enumerate(lanes) if lane == number] for number in range(max(lanes) + 1)]


# ------------------------------------------------------------------------------------------- one step


def rows_of(timeline: Mapping[str, Any]) -> list[list[Span]]:
    """The spans of each worker."""
    return [[Span(kind, micro, tuple(whom), *ends) for kind, micro, whom, *ends in row] for row in timeline["spans"]]


def _timeline_figure(timeline: Mapping[str, Any], about: Mapping[str, Any], workers: Sequence[int]) -> Html:
    caption = (
        "dark: forward, lighter: backward, palest: gradients of weights; numbers in them: micro-batches. "
        "Hatched: waiting, and for which worker; of several, for the one that worked last. Blank: bookkeeping"
    )
    whose = " of island 0" if "island" in timeline else ""
    title = f"Who waited for whom: step {timeline['step']:,}{whose}"
    return figure(title, timeline_svg(rows_of(timeline), about, workers), caption)


def timeline_svg(rows: Sequence[Sequence[Span]], about: Mapping[str, Any], workers: Sequence[int]) -> str:
    """What every worker of a crew did in a step: `rows` of spans, one for each of `workers`."""
    shown = rows[:MOST_ROWS]
    bottom = 8 + ROW * len(shown)
    axes = Axes((0, max(span.end for row in rows for span in row)), (0, 1), LEFT, WIDTH - 20, 4, bottom)
    parts = axes.frame("seconds")
    for number, worker in enumerate(workers[:MOST_ROWS]):
        y = 8 + ROW * number
        stages = max(about["stages"]) > 0
        place = f"lane {about['lanes'][worker]}, stage {about['stages'][worker]}" if stages else ""
        parts.append(text(LEFT - 10, y + 13, f"worker {worker}" + (f" · {place}" if place else ""), "end", size=12))
        colour, stage = pool_colour(about["lanes"][worker]), about["stages"][worker]
        parts += _row(number, rows, workers, axes, y, colour, stage)
    if hidden := len(rows) - len(shown):
        parts.append(text(LEFT, bottom + 36, f"and {hidden} workers more", colour="var(--muted)", size=12))
    parts.append(line(LEFT, bottom, WIDTH - 20, bottom))
    return svg(bottom + 62, [*parts, *legend({"optimizer": "var(--ink)", "waiting": "url(#hatch)"}, bottom + 46)])


def _row(
    number: int,
    rows: Sequence[Sequence[Span]],
    workers: Sequence[int],
    axes: Axes,
    y: float,
    colour: str,
    stage: int,
) -> Iterator[Html]:
    row = rows[number]
    works = [TracedWork(PASSES[s.kind], stage, s.micro_batch, s.start, s.end) for s in row if s.kind in PASSES]
    yield from work_boxes(works, axes, y, [colour] * (stage + 1))
    for span in row:
        first, width = axes.across(span.start), axes.across(span.end) - axes.across(span.start)
        if width < SEEN or span.kind in PASSES:
            continue
        if span.kind == "optimizer":
            yield rect(first, y, width, BOX, "var(--ink)", f"optimizer: {seconds_text(span.end - span.start)}")
        elif span.kind in WAITS:
            found = waited_for(span, number, rows)
            culprit = None if found is None else workers[found]
            whose = f" of worker {culprit}" if culprit is not None else ""
            tip = f"waiting for {WAITED_FOR[span.kind]}{whose}: {seconds_text(span.end - span.start)}"
            yield from wait_box(first, width, y, tip, culprit)


def wait_box(first: float, width: float, y: float, tip: str, culprit: int | None) -> Iterator[Html]:
    """A hatched box with the worker that was waited for, where it has room for one."""
    yield rect(first, y, width, BOX, "url(#hatch)", tip, edge=False)
    if culprit is not None and fits(f"{culprit}", width - 10, 10):
        middle, half = first + width / 2, 4 + 3 * len(f"{culprit}")
        yield rect(middle - half, y + 2, 2 * half, BOX - 4, "var(--card)", tip, edge=False)
        yield text(middle, y + 12, f"{culprit}", "middle", size=10, weight=600)


def waited_for(wait: Span, worker: int, rows: Sequence[Sequence[Span]]) -> int | None:
    """The worker that a wait was for: of those that had to come, the one that was at work last before it ended."""
    whom = [other for other in (wait.whom or range(len(rows))) if other != worker]
    if len(whom) == 1:
        return whom[0]
    last = {other: _last_work(rows[other], wait.end) for other in whom}
    return max(whom, key=lambda other: last[other]) if any(last.values()) else None


def _last_work(row: Sequence[Span], until: float) -> float:
    return max((min(span.end, until) for span in row if span.kind in WORK and span.start < until), default=0.0)
