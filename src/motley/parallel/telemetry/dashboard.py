"""The crew while it trains, as a small table under the progress bar: one line a worker, or the most telling of many.

worker   chip              tokens/s   share    idle   memory       link
0        NVIDIA A100        412,000    61 %     3 %    31 GB   1.2 GB/s
1        NVIDIA V100        140,000    21 %     2 %    14 GB   0.6 GB/s

Of islands it shows the last round and has two columns more: the island, and how much of the idle time went to meetings.
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
    """All workers; of more than MOST_LINES, the slowest and the most idle, half of the lines each."""
    everyone = range(len(timing.share))
    if len(everyone) <= MOST_LINES:
        return list(everyone)
    speed, idle = timing.tokens_per_second, timing.idle_share
    half = (MOST_LINES - 2) // 2
    slowest = sorted(everyone, key=lambda worker: speed[worker])[:half]
    most_idle = sorted(set(everyone) - set(slowest), key=lambda worker: -idle[worker])[:half]
    return sorted([*slowest, *most_idle])


def ranks_table(about: Mapping[str, Any], timing: StepStats) -> RenderableType:
    """What the workers did in the last step or round; `about` them as `timing.introduction` says."""
    names, islands = about["names"], about.get("islands")
    if islands and not timing.share:
        return "the workers of all islands are shown from their first meeting on"
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    left, right = ("worker", *(["island"] if islands else []), "chip"), ("tokens/s", "share", "idle", "memory", "link")
    for head in left:
        table.add_column(head, no_wrap=True)
    for head in (*right[:3], *(["meetings"] if islands else []), *right[3:]):
        table.add_column(head, justify="right", no_wrap=True)
    workers = shown_ranks(timing)  # nobody before the first step has ended
    for worker in workers:
        island = [f"{islands[worker]}"] if islands else []
        table.add_row(f"{worker}", *island, _short(names[worker]), *_numbers(timing, [worker], bool(islands)))
    if rest := sorted(set(range(len(timing.share))) - set(workers)):
        island = [""] if islands else []
        table.add_row(f"{len(rest)} more", *island, "on average", *_numbers(timing, rest, bool(islands)))
    return table


def _short(name: str) -> str:
    return escape(name if len(name) <= NAME_LETTERS else name[: NAME_LETTERS - 1] + "…")


def _numbers(timing: StepStats, workers: Sequence[int], meetings: bool) -> list[str]:
    """The means of `workers`."""
    speed, share, idle, met, memory, link = (
        sum(values[worker] for worker in workers) / len(workers)
        for values in (
            timing.tokens_per_second, timing.share, timing.idle_share, timing.meeting_share, timing.memory,
            timing.link_bytes_per_second,
        )
    )  # fmt: skip
    met_share = [f"{met:.0%}"] if meetings else []
    return [f"[cyan]{speed:,.0f}[/]", f"{share:.0%}", f"{idle:.0%}", *met_share, size_text(memory), rate_text(link)]
