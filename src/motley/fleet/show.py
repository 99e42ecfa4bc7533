"""Machines, fleets and the chip sheet as tables for the terminal."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from motley.fleet.chips import ESTIMATE, PRECISIONS, Chip
from motley.fleet.inventory import Fleet
from motley.fleet.probe import Machine, in_flops, in_gigabytes, why_left_out
from motley.fleet.units import rate_text, size_text


def machine_table(machine: Machine) -> Table:
    """Facts and measurements, one line each."""
    table = Table(title=machine.name, show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_row("device", machine.device)
    table.add_row("usable cores", f"{machine.cores} ({machine.threads} threads)")
    memory = f"{in_gigabytes(machine.memory_bytes)}, {in_gigabytes(machine.available_memory_bytes)} free"
    table.add_row("host memory", memory)
    own = in_gigabytes(machine.device_memory_bytes)
    if machine.device_free_bytes is not None:
        own += f", {in_gigabytes(machine.device_free_bytes)} free"
    table.add_row("device memory", own, end_section=True)
    for rate in machine.matmul_rates:
        shape = (f"{rate.groups} x " if rate.groups > 1 else "") + f"{rate.rows} x {rate.inner} x {rate.columns}"
        table.add_row(f"product, {rate.dtype}, {shape}", in_flops(rate.gflops))
    for name, slower in machine.left_out:
        table.add_row(f"left out, {name}", why_left_out(name, slower))
    table.add_row("memory bandwidth", f"{machine.bandwidth_gigabytes_per_second:,.0f} GB/s", end_section=True)
    table.add_row("trains in", Text(machine.compute_dtype, style="bold"))
    return table


def fleet_table(fleet: Fleet) -> Table:
    """A line for each pool, with a bar for its share of the fleet's peak."""
    table = Table(title=f"{fleet.name}: {fleet.chips:,} chips", title_justify="left", title_style="bold")
    for name in ("pool", "chip", "site", "chips", "trains in", "peak each", "memory", "inside", "per node", "$/h each"):
        table.add_column(name, justify="left" if name in ("pool", "chip", "site", "trains in") else "right")
    table.add_column("part of the peak")
    peaks = [pool.chips * pool.flops(pool.best_precision) for pool in fleet.pools]
    for pool, peak in zip(fleet.pools, peaks, strict=True):
        chip = pool.sheet
        share = peak / sum(peaks)
        table.add_row(
            pool.name,
            chip.name,
            fleet.site_of(pool),
            f"{pool.chips:,}",
            pool.best_precision,
            in_flops(pool.flops(pool.best_precision) / 1e9),
            size_text(pool.memory_known or chip.memory_bytes),
            rate_text(pool.link_inside or chip.link_bandwidth),
            rate_text(pool.network_known or chip.node_network),
            f"{pool.price:.2f}",
            f"{'█' * round(20 * share) or '▏'} {share:.0%}",
        )
    for link in fleet.links:
        table.caption = (table.caption or "") + (  # type: ignore[operator]
            f"{link.sites[0]} ↔ {link.sites[1]}: {rate_text(link.bandwidth)}, {1e3 * link.latency:g} ms\n"
        )
    return table


def chip_table(chips: Sequence[Chip]) -> Table:
    """The sheet; `~` marks estimates, `-` formats that a chip lacks."""
    table = Table(title="dense TFLOP/s with fp32 accumulation; ~ marks estimates", title_justify="left")
    table.add_column("chip")
    for name in (*PRECISIONS, "GiB", "GB/s", "link", "network", "W", "$/h"):
        table.add_column(name, justify="right")
    for chip in chips:
        keys = (*PRECISIONS, "memory", "bandwidth", "link", "network", "power", "price")
        cells = []
        for key in keys:
            text, source = chip.cells[key]
            cells.append("-" if text == "none" else ("~" if source == ESTIMATE else "") + text)
        table.add_row(chip.name, *cells)
    return table
