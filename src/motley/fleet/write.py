"""A measured machine, or a job's machines, as a fleet file that people read and edit."""

import re
from collections.abc import Sequence
from datetime import date

from motley.fleet.chips import Chip, chip_sheet
from motley.fleet.inventory import MeasuredChip, beyond_the_sheet
from motley.fleet.links import Links
from motley.fleet.probe import Machine, why_left_out
from motley.fleet.units import rate_text, size_text

RESERVED = 0.06  # share of an accelerator's memory for its context and fragmentation, where free memory is unknown


def fleet_text(machines: Sequence[Machine], links: Links | None = None) -> str:
    """The fleet file: one pool for each kind of machine; each rank is one chip."""
    hosts = links.hosts if links else ("this machine",) * len(machines)
    kinds: dict[tuple[str | None, ...], list[int]] = {}
    for rank, machine in enumerate(machines):
        kinds.setdefault((machine.device, machine.name, machine.chip), []).append(rank)
    lines = [
        f"# Written by `motley fleet probe` on {date.today().isoformat()}; edit it freely.",
        "# A chip is what one process trains on: an accelerator, or all CPU cores the process may use.",
        f"name: {'job of ' + str(len(machines)) if len(machines) > 1 else 'this machine'}",
        "pools:",
    ]
    for number, ranks in enumerate(kinds.values()):
        machine = machines[ranks[0]]
        chip = nearest_chip(machine)
        nodes = len({hosts[rank] for rank in ranks})
        lines += [
            f"  - name: {'cpu' if machine.device == 'cpu' else 'gpu'}{number or ''}",
            f"    chip: {chip.name}  # nearest on the sheet to: {machine.name}",
            f"    nodes: {nodes}",
            f"    chips_per_node: {max(1, len(ranks) // nodes)}",
        ]
        if links and (inside := links.slowest(ranks, same_host=True)) is not None:
            lines.append(f"    link_inside: {rate_text(inside[0])}")
        if links and (outside := links.slowest(range(len(machines)), same_host=False)) is not None:
            lines.append(f"    link_outside: {rate_text(outside[0])}")
            lines.append(f"    latency_outside: {outside[1] * 1e6:.0f} us")
        if machine.device == "cpu":
            lines.append("    price_per_hour: 0.05  # an estimate: put yours")
        usable = usable_bytes(machine) or machine.available_memory_bytes / max(1, len(ranks) // nodes)
        lines += [
            "    measured:",
            f"      device: {_quoted(machine.name)}",
            f"      memory: {usable / 2**30:.2f} GiB",
            f"      memory_bandwidth: {machine.bandwidth_gigabytes_per_second:g} GB/s",
            "      matmul:  # [groups, rows, inner, columns, GFLOP/s]",
        ]
        for dtype in dict.fromkeys(rate.dtype for rate in machine.matmul_rates):
            lines.append(f"        {dtype}:")
            for rate in machine.matmul_rates:
                if rate.dtype == dtype:
                    point = f"{rate.groups}, {rate.rows}, {rate.inner}, {rate.columns}, {rate.gflops:g}"
                    lines.append(f"          - [{point}]")
        lines += [f"        # {why_left_out(name, slower)}" for name, slower in machine.left_out]
    if links:
        lines.append("# collectives over all ranks, as measured:")
        for collective in links.collectives:
            lines.append(
                f"#   {collective.name:<14} {size_text(collective.message_bytes):>9} per rank: "
                f"{1e3 * collective.seconds:.3g} ms"
            )
    return "\n".join(lines) + "\n"


def nearest_chip(machine: Machine) -> Chip:
    """The sheet's chip whose name shares most words with the device's own; memory decides between equals.

    Chips that cannot reach the measured values are excluded, unless none is left.
    """
    kind = "cpu" if machine.device == "cpu" else "gpu"
    words = set(re.findall(r"[a-z0-9]+", machine.name.lower()))
    memory = (machine.device_memory_bytes or 0) / 2**30

    def likeness(chip: Chip) -> tuple[int, float]:
        names = " ".join((chip.name, *chip.aliases, chip.vendor)).lower()
        return len(words & set(re.findall(r"[a-z0-9]+", names))), -abs(chip.memory_bytes / 2**30 - memory)

    candidates = [chip for chip in chip_sheet().values() if chip.kind == kind]
    able = [chip for chip in candidates if kind == "cpu" or not any(beyond_the_sheet(measured_by(machine), chip))]
    best = max(able or candidates, key=likeness)
    if kind == "cpu" and likeness(best)[0] == 0:
        return next(chip for chip in candidates if chip.vendor == "any")
    return best


def usable_bytes(machine: Machine) -> float | None:
    """Usable bytes of an accelerator's own memory; None where the device computes in host memory."""
    if machine.device_free_bytes is not None:
        return machine.device_free_bytes
    return None if machine.device_memory_bytes is None else machine.device_memory_bytes * (1 - RESERVED)


def measured_by(machine: Machine) -> MeasuredChip:
    """The measurements of a probe as in a fleet file; memory is that of an accelerator."""
    matmul: dict[str, list[tuple[int, int, int, int, float]]] = {}
    for rate in machine.matmul_rates:
        point = (rate.groups, rate.rows, rate.inner, rate.columns, rate.gflops)
        matmul.setdefault(rate.dtype, []).append(point)
    return MeasuredChip.model_construct(
        memory=usable_bytes(machine),
        memory_bandwidth=machine.bandwidth_gigabytes_per_second * 1e9,
        matmul=matmul,
    )


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
