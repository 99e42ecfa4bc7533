"""A measured machine as a table for the terminal (`motley fleet probe`)."""

from rich.table import Table

from motley.fleet.probe import Machine, in_flops, in_gigabytes


def machine_table(machine: Machine) -> Table:
    """What was found and measured, one line each."""
    table = Table(title=machine.name, show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_row("device", machine.device)
    table.add_row("usable cores", f"{machine.cores} ({machine.threads} threads)")
    memory = f"{in_gigabytes(machine.memory_bytes)}, {in_gigabytes(machine.available_memory_bytes)} free"
    table.add_row("host memory", memory)
    table.add_row("device memory", in_gigabytes(machine.device_memory_bytes), end_section=True)
    for rate in machine.matmul_rates:
        shape = f"{rate.rows} x {rate.inner} x {rate.columns}"
        table.add_row(f"product, {rate.dtype}, {shape}", in_flops(rate.gflops))
    table.add_row("memory bandwidth", f"{machine.bandwidth_gigabytes_per_second:,.0f} GB/s", end_section=True)
    table.add_row("trains in", f"[bold]{machine.compute_dtype}")
    return table
