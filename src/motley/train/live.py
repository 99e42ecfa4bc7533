"""The crew while it trains, as a small table under the progress bar: one line a worker, or the most telling of many.

worker   chip              tokens/s   share    idle   memory       link
0        NVIDIA A100        412,000    61 %     3 %    31 GB   1.2 GB/s
1        NVIDIA V100        140,000    21 %     2 %    14 GB   0.6 GB/s
"""

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from motley.fleet.units import rate_text, size_text
from motley.train.timing import Timing

MOST_LINES = 16
NAME_LETTERS = 28


def shown_workers(timing: Timing) -> list[int]:
    """All workers; of more than MOST_LINES, the slowest and the most idle, half of the lines each."""
    everyone = range(len(timing.share))
    if len(everyone) <= MOST_LINES:
        return list(everyone)
    speed, idle = timing.tokens_per_second, timing.idle_share
    half = (MOST_LINES - 2) // 2
    slowest = sorted(everyone, key=lambda worker: speed[worker])[:half]
    most_idle = sorted(set(everyone) - set(slowest), key=lambda worker: -idle[worker])[:half]
    return sorted([*slowest, *most_idle])


def crew_table(names: Sequence[str], timing: Timing) -> Table:
    """What the workers `names` did in the last step."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for head in ("worker", "chip", "tokens/s", "share", "idle", "memory", "link"):
        table.add_column(head, justify="left" if head in ("worker", "chip") else "right", no_wrap=True)
    workers = shown_workers(timing)  # nobody before the first step has ended
    for worker in workers:
        _line(table, f"{worker}", names[worker], timing, [worker])
    if rest := sorted(set(range(len(timing.share))) - set(workers)):
        _line(table, f"{len(rest)} more", "on average", timing, rest)
    return table


def _line(table: Table, label: str, name: str, timing: Timing, workers: Sequence[int]) -> None:
    """One line: the means of `workers`."""
    speed, share, idle, memory, link = (
        sum(values[worker] for worker in workers) / len(workers)
        for values in (
            timing.tokens_per_second, timing.share, timing.idle_share, timing.memory, timing.link_bytes_per_second,
        )
    )  # fmt: skip
    short = name if len(name) <= NAME_LETTERS else name[: NAME_LETTERS - 1] + "…"
    table.add_row(
        label,
        escape(short),
        f"[cyan]{speed:,.0f}[/]",
        f"{share:.0%}",
        f"{idle:.0%}",
        size_text(memory),
        rate_text(link),
    )
