"""The islands of a stage (DiLoCo) in the report: what each did between outer steps, and timelines of single rounds.

island 0 · rank 0   ▓▓▓▓ 20 steps ▓▓▓▓╱╱╱ 2 ╱╱╱█▓▓▓▓▓ 20 ▓▓▓▓▓   a row a rank: inner steps, waits hatched and marked
island 1 · rank 2   ▓▓▓▓▓▓▓▓▓ 10 steps ▓▓▓▓▓▓▓▓█▓▓▓▓▓▓ 10 ▓▓▓▓   with the rank that sent last, the outer step dark
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from motley.evaluate.curves import ReportStage
from motley.evaluate.ranks import MOST_ROWS, ROW, SEEN, chosen_timelines, rows_of, wait_box
from motley.fleet.picture import pool_colour
from motley.fleet.units import size_text
from motley.page import Html, element, figure, in_count, in_time
from motley.parallel.telemetry.step_timer import Span
from motley.plan.report.step_html import BOX
from motley.plan.report.text import seconds_text
from motley.svg import LEFT, WIDTH, Axes, fits, legend, line, rect, svg, text

CAPTION = (
    "boxes: inner steps, and how many; the timelines of steps show what is inside. Hatched: waiting for the exchange "
    "before the outer step, and for which rank, if one was later; otherwise for the link. Dark: the outer step. "
    "Blank: a checkpoint"
)


def islands_section(stage: ReportStage) -> Html:
    """The section about inner steps, tokens and waits of each island; empty without islands."""
    rounds = stage.of_kind("outer_step")
    if not rounds:
        return Html("")
    heads = ("island", "steps a round", "tokens", "computed", "waited", "sent")
    rows = [element("tr", *(element("th", head, class_="number") for head in heads))]
    for island in range(len(rounds[-1]["island_tokens"])):
        cells = (
            f"{island}",
            f"{statistics.fmean(one['inner_steps'][island] for one in rounds):,.3g}",
            in_count(sum(one["island_tokens"][island] for one in rounds)),
            in_time(sum(one["busy_seconds"][island] for one in rounds)),
            in_time(sum(one["waited_seconds"][island] for one in rounds)),
            size_text(sum(one["bytes_sent"][island] for one in rounds)),
        )
        rows.append(element("tr", *(element("td", cell, class_="number") for cell in cells)))
    many = f"{len(rounds):,} rounds" if len(rounds) > 1 else "One round"
    sentence = f"{many}, {seconds_text(statistics.median(one['round_seconds'] for one in rounds))} each (median)."
    return element(
        "section",
        element("h2", f"{stage.title}: the islands"),
        element("p", sentence),
        element("table", *rows),
        *_timelines(stage),
    )


def _timelines(stage: ReportStage) -> Iterator[Html]:
    about = next((ranks for ranks in reversed(stage.of_kind("ranks")) if "islands" in ranks), None)
    drawn = [timeline for timeline in stage.of_kind("timeline") if "round" in timeline]
    if about is None or not (chosen := chosen_timelines(drawn, len(about["islands"]), settled=2)):
        return
    figures = [
        figure(f"Timeline of round {one['round']:,}", timeline_svg(rows_of(one), about), CAPTION) for one in chosen
    ]
    yield element("div", *figures, style="display:grid;gap:16px;margin-top:20px")


def timeline_svg(rows: Sequence[Sequence[Span]], about: Mapping[str, Any]) -> str:
    """Timeline of a round: `rows` of spans, one of each rank; ordered by island."""
    islands = about["islands"]
    shown = sorted(range(len(rows)), key=lambda rank: islands[rank])[:MOST_ROWS]
    bottom = 8 + ROW * len(shown)
    axes = Axes((0, max(span.end for row in rows for span in row)), (0, 1), LEFT, WIDTH - 20, 4, bottom)
    parts = axes.frame("seconds")
    for number, rank in enumerate(shown):
        y = 8 + ROW * number
        parts.append(text(LEFT - 10, y + 13, f"island {islands[rank]} · rank {rank}", "end", size=12))
        for span in rows[rank]:
            parts += _box(span, axes, y, pool_colour(islands[rank]))
    if hidden := len(rows) - len(shown):
        parts.append(text(LEFT, bottom + 36, f"and {hidden} more ranks", colour="var(--muted)", size=12))
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
        whom = f", for rank {span.whom[0]}" if span.whom else ""
        yield from wait_box(first, width, y, f"waiting for {what}{whom}: {took}", next(iter(span.whom), None))
