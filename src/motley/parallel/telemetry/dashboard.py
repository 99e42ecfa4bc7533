"""A small table of the ranks under the progress bar while they train: one line a rank, or the most telling of many.

rank     chip              tokens/s   share    idle   memory       link
0        NVIDIA A100        412,000    61 %     3 %    31 GB   1.2 GB/s
1        NVIDIA V100        140,000    21 %     2 %    14 GB   0.6 GB/s

Of islands it shows the last round and has two columns more: the island, and how much of the time went to outer steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from motley.fleet.units import rate_text, size_text
from motley.parallel.telemetry.step_stats import StepStats

MOST_LINES = 16
NAME_LETTERS = 28


def shown_ranks(timing: StepStats) -> list[int]:
    """All ranks; of more than MOST_LINES, the slowest and the most idle, half of the lines each."""
    everyone = range(len(timing.share))
    if len(everyone) <= MOST_LINES:
        return list(everyone)
    speed, idle = timing.tokens_per_second, timing.idle_share
    half = (MOST_LINES - 2) // 2
    slowest = sorted(everyone, key=lambda rank: speed[rank])[:half]
    most_idle = sorted(set(everyone) - set(slowest), key=lambda rank: -idle[rank])[:half]
    return sorted([*slowest, *most_idle])


def ranks_table(about: Mapping[str, Any], timing: StepStats) -> RenderableType:
    """What the ranks did in the last step or round; `about` them as `step_stats.introduction` says."""
    names, islands = about["names"], about.get("islands")
    if islands and not timing.share:
        return "the ranks of all islands are shown after the first round"
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    left, right = ("rank", *(["island"] if islands else []), "chip"), ("tokens/s", "share", "idle", "memory", "link")
    for head in left:
        table.add_column(head, no_wrap=True)
    for head in (*right[:3], *(["outer step"] if islands else []), *right[3:]):
        table.add_column(head, justify="right", no_wrap=True)
    ranks = shown_ranks(timing)  # none before the first step has ended
    for rank in ranks:
        island = [f"{islands[rank]}"] if islands else []
        table.add_row(f"{rank}", *island, _short(names[rank]), *_numbers(timing, [rank], bool(islands)))
    if rest := sorted(set(range(len(timing.share))) - set(ranks)):
        island = [""] if islands else []
        table.add_row(f"{len(rest)} more", *island, "on average", *_numbers(timing, rest, bool(islands)))
    return table


def _short(name: str) -> str:
    return escape(name if len(name) <= NAME_LETTERS else name[: NAME_LETTERS - 1] + "…")


def _numbers(timing: StepStats, ranks: Sequence[int], of_islands: bool) -> list[str]:
    """The means of `ranks`."""
    speed, share, idle, met, memory, link = (
        sum(values[rank] for rank in ranks) / len(ranks)
        for values in (
            timing.tokens_per_second, timing.share, timing.idle_share, timing.meeting_share, timing.memory,
            timing.link_bytes_per_second,
        )
    )  # fmt: skip
    met_share = [f"{met:.0%}"] if of_islands else []
    return [f"[cyan]{speed:,.0f}[/]", f"{share:.0%}", f"{idle:.0%}", *met_share, size_text(memory), rate_text(link)]
