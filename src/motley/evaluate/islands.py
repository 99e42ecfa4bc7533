"""What the islands of a stage did between their meetings, and who waited for whom at them.

island 0 · worker 0   ▓▓▓▓ 20 steps ▓▓▓▓╱╱╱ 2 ╱╱╱█▓▓▓▓▓ 20 ▓▓▓▓▓   a row a worker: inner steps, waits hatched and marked
island 1 · worker 2   ▓▓▓▓▓▓▓▓▓ 10 steps ▓▓▓▓▓▓▓▓█▓▓▓▓▓▓ 10 ▓▓▓▓   with the worker that sent last, the outer step dark
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from motley.evaluate.curves import Stage
from motley.evaluate.ranks import MOST_ROWS, ROW, SEEN, rows_of, telling, wait_box
from motley.fleet.picture import pool_colour
from motley.fleet.units import size_text
from motley.page import Html, element, figure, in_count, in_time
from motley.parallel.telemetry.step_timer import Span
from motley.plan.report.step_html import BOX
from motley.plan.report.text import seconds_text
from motley.svg import LEFT, WIDTH, Axes, fits, legend, line, rect, svg, text

CAPTION = (
    "boxes: inner steps, and how many; what a worker did within them is told above. Hatched: waiting at a meeting, and "
    "for which worker, if one was later; otherwise for the link. Dark: the outer step. Blank: a checkpoint"
)


def islands_section(stage: Stage) -> Html:
    """What each island did between meetings; nothing where there was one crew."""
    rounds = stage.of_kind("islands")
    if not rounds:
        return Html("")
    heads = ("island", "steps a round", "tokens", "computed", "waited", "sent")
    rows = [element("tr", *(element("th", head, class_="number") for head in heads))]
    for island in range(len(rounds[-1]["island_tokens"])):
        cells = (
            f"{island}",
            f"{statistics.fmean(meeting['inner_steps'][island] for meeting in rounds):,.3g}",
            in_count(sum(meeting["island_tokens"][island] for meeting in rounds)),
            in_time(sum(meeting["busy_seconds"][island] for meeting in rounds)),
            in_time(sum(meeting["waited_seconds"][island] for meeting in rounds)),
            size_text(sum(meeting["bytes_sent"][island] for meeting in rounds)),
        )
        rows.append(element("tr", *(element("td", cell, class_="number") for cell in cells)))
    many = f"{len(rounds):,} rounds" if len(rounds) > 1 else "One round"
    sentence = (
        f"{many}, {seconds_text(statistics.median(meeting['round_seconds'] for meeting in rounds))} each (median)."
    )
    return element(
        "section",
        element("h2", f"{stage.title}: the islands"),
        element("p", sentence),
        element("table", *rows),
        *_timelines(stage),
    )


def _timelines(stage: Stage) -> Iterator[Html]:
    about = next((crew for crew in reversed(stage.of_kind("crew")) if "islands" in crew), None)
    drawn = [timeline for timeline in stage.of_kind("timeline") if "round" in timeline]
    if about is None or not (told := telling(drawn, len(about["islands"]), settled=2)):
        return
    figures = [
        figure(f"Who waited for whom: round {one['round']:,}", timeline_svg(rows_of(one), about), CAPTION)
        for one in told
    ]
    yield element("div", *figures, style="display:grid;gap:16px;margin-top:20px")


def timeline_svg(rows: Sequence[Sequence[Span]], about: Mapping[str, Any]) -> str:
    """What every worker did in a round: `rows` of spans, a worker each; island by island."""
    islands = about["islands"]
    shown = sorted(range(len(rows)), key=lambda worker: islands[worker])[:MOST_ROWS]
    bottom = 8 + ROW * len(shown)
    axes = Axes((0, max(span.end for row in rows for span in row)), (0, 1), LEFT, WIDTH - 20, 4, bottom)
    parts = axes.frame("seconds")
    for number, worker in enumerate(shown):
        y = 8 + ROW * number
        parts.append(text(LEFT - 10, y + 13, f"island {islands[worker]} · worker {worker}", "end", size=12))
        for span in rows[worker]:
            parts += _box(span, axes, y, pool_colour(islands[worker]))
    if hidden := len(rows) - len(shown):
        parts.append(text(LEFT, bottom + 36, f"and {hidden} workers more", colour="var(--muted)", size=12))
    parts.append(line(LEFT, bottom, WIDTH - 20, bottom))
    return svg(bottom + 62, [*parts, *legend({"outer step": "var(--ink)", "waiting": "url(#hatch)"}, bottom + 46)])


def _box(span: Span, axes: Axes, y: float, colour: str) -> Iterator[Html]:
    first, width = axes.across(span.start), axes.across(span.end) - axes.across(span.start)
    took = seconds_text(span.end - span.start)
    if width < SEEN:
        return
    if span.kind == "steps":
        steps = f"{span.micro_batch} step" + "s" * (span.micro_batch > 1)
        yield rect(first, y, width, BOX, colour, f"{steps}: {took}")
        if label := next((words for words in (steps, f"{span.micro_batch}") if fits(words, width - 6, 10)), ""):
            yield text(first + width / 2, y + 12, label, "middle", "#fff", 10)
    elif span.kind == "outer":
        yield rect(first, y, width, BOX, "var(--ink)", f"outer step of fragment {span.micro_batch}: {took}")
    else:
        what = "the end of the round" if span.micro_batch < 0 else f"fragment {span.micro_batch}"
        whom = f", for worker {span.whom[0]}" if span.whom else ""
        yield from wait_box(first, width, y, f"waiting for {what}{whom}: {took}", next(iter(span.whom), None))
