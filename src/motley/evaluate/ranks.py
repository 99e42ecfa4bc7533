"""The ranks of a stage in the report: timelines of single steps, a table over the run, load balancing over the run.

rank 0   ▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓█      a row a rank: passes by micro-batch, the optimizer, waits hatched and
rank 1   ▓▓▓▓▓▓▓▓▓╱╱╱╱╱ 0 ╱╱╱╱╱█      marked with the rank that was waited for
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from motley.evaluate.curves import ReportStage
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
    "neighbour": "a neighbouring pipeline stage",
    "experts": "all-to-all of tokens to experts",
    "gradients": "reduction of gradients",
    "spreading": "all-gather of weights",
    "numbers": "all-reduce of counts, norm and losses",
    "meeting": "other islands",
}
MOST_ROWS = 32  # of a timeline
MOST_POINTS = 400  # of a curve
ROW = 22.0
HEADS = ("rank", "chip", "replica", "stage", "own tokens/s", "share", "idle", "waits most for", "memory", "link")
SEEN = 0.6  # pixels of the shortest span that is drawn


def ranks_section(stage: ReportStage) -> Html:
    """The section about the ranks of a stage; empty for a single process."""
    starts = stage.of_kind("ranks")
    if not starts or not (steps := _of_these_ranks(stage.of_kind("step_stats"), starts[-1])):
        return Html("")
    about = starts[-1]
    settled = steps[_warm(about) :] or steps
    islands = about.get("islands", [0] * len(about["names"]))
    first_island = [rank for rank, island in enumerate(islands) if island == 0]
    timelines = [one for one in stage.of_kind("timeline") if "round" not in one and ("island" in one) == any(islands)]
    timelines = chosen_timelines(timelines, len(first_island), SETTLED)
    figures = [_timeline_figure(drawn, about, first_island) for drawn in timelines]
    shares = figure(
        "Load balancing", _shares_svg(steps, about), f"share of the rows of each replica, by {_each(about)}"
    )
    return element(
        "section",
        element("h2", f"{stage.title}: the ranks{' of all islands' if any(islands) else ''}"),
        element("p", _step_sentence(settled, about)),
        _table(settled, about),
        element(
            "div",
            *figures,
            *([shares] if len(set(about["replicas"])) > 1 else []),
            style="display:grid;gap:16px;margin-top:20px",
        ),
    )


def _of_these_ranks(records: Sequence[dict[str, Any]], about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of as many ranks, of steps or of rounds as `about` says."""
    of_islands, ranks = "islands" in about, len(about["names"])
    return [one for one in records if len(one["share"]) == ranks and ("round" in one) == of_islands]


def chosen_timelines(timelines: Sequence[Mapping[str, Any]], ranks: int, settled: int) -> list[Mapping[str, Any]]:
    """The first from step or round number `settled` on, and the last."""
    drawn = [timeline for timeline in timelines if len(timeline["spans"]) == ranks]
    first = [timeline for timeline in drawn if timeline.get("round", timeline["step"]) >= settled][:1]
    return [*first, *(timeline for timeline in drawn[-1:] if timeline not in first)]


def _step_sentence(steps: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """Measured and predicted time of a step or round."""
    measured = statistics.median(step["step_seconds"] for step in steps)
    ranks = len(about["names"])
    sentence = f"{ranks} ranks; a {_each(about)} takes {seconds_text(measured)} (median of {len(steps):,})"
    if predicted := about.get("predicted_step_seconds"):
        computing = " of computing" if "islands" in about else ""
        sentence += (
            f"; predicted by the plan: {seconds_text(predicted)}{computing} ({100 * (measured / predicted - 1):+.0f} %)"
        )
    return f"{sentence}."


def _warm(about: Mapping[str, Any]) -> int:
    """Number of records of the warm-up."""
    return 1 if "islands" in about else SETTLED - 1


def _each(about: Mapping[str, Any]) -> str:
    """The unit of one record."""
    return "round" if "islands" in about else "step"


# ---------------------------------------------------------------------------------------- over the run


def _table(steps: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> Html:
    islands = about.get("islands")
    heads = (HEADS[0], *(["island"] if islands else []), *HEADS[1:])
    rows = [_cells("th", heads, heads)]
    for rank, name in enumerate(about["names"]):
        cells = (
            f"{rank}",
            *([f"{islands[rank]}"] if islands else []),
            name,
            f"{about['replicas'][rank]}",
            f"{about['stages'][rank]}",
            f"{statistics.median(step['tokens_per_second'][rank] for step in steps):,.0f}",
            in_percent(statistics.fmean(step["share"][rank] for step in steps)),
            in_percent(statistics.fmean(step["idle_share"][rank] for step in steps)),
            _longest_wait(steps, rank),
            size_text(max(step["memory_bytes"][rank] for step in steps)),
            rate_text(statistics.fmean(step["link_bytes_per_second"][rank] for step in steps)),
        )
        rows.append(_cells("td", cells, heads))
    return element("table", *rows)


def _cells(tag: str, cells: Sequence[str], heads: Sequence[str]) -> Html:
    words = ("chip", "waits most for")  # the other columns are numbers
    kinds = ("" if head in words else "number" for head in heads)
    return element("tr", *(element(tag, cell, class_=kind) for cell, kind in zip(cells, kinds, strict=True)))


def _longest_wait(steps: Sequence[Mapping[str, Any]], rank: int) -> str:
    kinds = [kind for kind in WAITS if kind in steps[0]["wait_seconds"]]  # older runs recorded fewer
    spent = {kind: sum(step["wait_seconds"][kind][rank] for step in steps) for kind in kinds}
    kind = max(spent, key=lambda kind: spent[kind])
    return WAITED_FOR[kind] if spent[kind] > 0 else ""


def _shares_svg(steps: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """A line a replica; the share of a straggler falls."""
    members = _members(about)
    every = -(-len(steps) // MOST_POINTS)
    shown = [*steps[::every], *([steps[-1]] if (len(steps) - 1) % every else [])]
    shares = [[step["share"][ranks[0]] for step in shown] for ranks in members]
    most = max(max(values) for values in shares)
    axes = Axes((shown[0]["step"], shown[-1]["step"]), (0, most), right=WIDTH - 130)
    parts = axes.frame("step", "share of the rows", ".0%")
    labels: list[float] = []
    for replica, values in sorted(enumerate(shares), key=lambda pair: -pair[1][-1]):
        points = [(axes.across(step["step"]), axes.up(value)) for step, value in zip(shown, values, strict=True)]
        parts.append(path(points, pool_colour(replica), 1.8))
        y = max(points[-1][1] + 4, labels[-1] + 13 if labels else 0)
        if y < axes.bottom + 30:
            labels.append(y)
            ranks = members[replica]
            name = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}–{ranks[-1]}"
            parts.append(text(axes.right + 8, y, name, colour=pool_colour(replica), size=12))
    return svg(axes.bottom + 44, parts)


def _members(about: Mapping[str, Any]) -> list[list[int]]:
    """Ranks of each replica."""
    replicas = about["replicas"]
    return [[rank for rank, replica in enumerate(replicas) if replica == number] for number in range(max(replicas) + 1)]


# ------------------------------------------------------------------------------------------- one step


def rows_of(timeline: Mapping[str, Any]) -> list[list[Span]]:
    """The spans of each rank."""
    return [[Span(kind, micro, tuple(whom), *ends) for kind, micro, whom, *ends in row] for row in timeline["spans"]]


def _timeline_figure(timeline: Mapping[str, Any], about: Mapping[str, Any], ranks: Sequence[int]) -> Html:
    caption = (
        "dark: forward, lighter: backward, palest: gradients of weights; numbers in them: micro-batches. "
        "Hatched: waiting, and for which rank; of several, the one that computed last. Blank: bookkeeping"
    )
    whose = " of island 0" if "island" in timeline else ""
    title = f"Timeline of step {timeline['step']:,}{whose}"
    return figure(title, timeline_svg(rows_of(timeline), about, ranks), caption)


def timeline_svg(rows: Sequence[Sequence[Span]], about: Mapping[str, Any], ranks: Sequence[int]) -> str:
    """Timeline of a step: `rows` of spans, one for each of `ranks`."""
    shown = rows[:MOST_ROWS]
    bottom = 8 + ROW * len(shown)
    axes = Axes((0, max(span.end for row in rows for span in row)), (0, 1), LEFT, WIDTH - 20, 4, bottom)
    parts = axes.frame("seconds")
    for number, rank in enumerate(ranks[:MOST_ROWS]):
        y = 8 + ROW * number
        stages = max(about["stages"]) > 0
        place = f"replica {about['replicas'][rank]}, stage {about['stages'][rank]}" if stages else ""
        parts.append(text(LEFT - 10, y + 13, f"rank {rank}" + (f" · {place}" if place else ""), "end", size=12))
        colour, stage = pool_colour(about["replicas"][rank]), about["stages"][rank]
        parts += _row(number, rows, ranks, axes, y, colour, stage)
    if hidden := len(rows) - len(shown):
        parts.append(text(LEFT, bottom + 36, f"and {hidden} more ranks", colour="var(--muted)", size=12))
    parts.append(line(LEFT, bottom, WIDTH - 20, bottom))
    return svg(bottom + 62, [*parts, *legend({"optimizer": "var(--ink)", "waiting": "url(#hatch)"}, bottom + 46)])


def _row(
    number: int,
    rows: Sequence[Sequence[Span]],
    ranks: Sequence[int],
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
            culprit = None if found is None else ranks[found]
            whose = f", rank {culprit}" if culprit is not None else ""
            tip = f"waiting for {WAITED_FOR[span.kind]}{whose}: {seconds_text(span.end - span.start)}"
            yield from wait_box(first, width, y, tip, culprit)


def wait_box(first: float, width: float, y: float, tip: str, culprit: int | None) -> Iterator[Html]:
    """A hatched box with the rank that was waited for, if there is room for its number."""
    yield rect(first, y, width, BOX, "url(#hatch)", tip, edge=False)
    if culprit is not None and fits(f"{culprit}", width - 10, 10):
        middle, half = first + width / 2, 4 + 3 * len(f"{culprit}")
        yield rect(middle - half, y + 2, 2 * half, BOX - 4, "var(--card)", tip, edge=False)
        yield text(middle, y + 12, f"{culprit}", "middle", size=10, weight=600)


def waited_for(wait: Span, rank: int, rows: Sequence[Sequence[Span]]) -> int | None:
    """The rank that a wait was for: of those that took part, the one that computed last before the wait ended."""
    whom = [other for other in (wait.whom or range(len(rows))) if other != rank]
    if len(whom) == 1:
        return whom[0]
    last = {other: _last_work(rows[other], wait.end) for other in whom}
    return max(whom, key=lambda other: last[other]) if any(last.values()) else None


def _last_work(row: Sequence[Span], until: float) -> float:
    return max((min(span.end, until) for span in row if span.kind in WORK and span.start < until), default=0.0)
