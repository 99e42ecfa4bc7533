"""Measure this machine: usable cores, memory, speed of matrix products and of memory.

`products` measures products and copies; this module adds what the system says and draws the conclusions.
"""

import math
import os
import platform
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import psutil
import torch

from motley.errors import InputError
from motley.fleet.capabilities import capabilities
from motley.fleet.products import (
    DTYPES,
    GIGA,
    GLANCE_SECONDS,
    SKINNY,
    flops,
    formats_of,
    fp8_product,
    glance,
    measure,
    most_seconds,
    wait_for,
)
from motley.progress import note

__all__ = [
    "GLANCE_SECONDS",
    "PROBE_SECONDS",
    "SKINNY",
    "Machine",
    "MatmulRate",
    "formats_of",
    "fp8_product",
    "glance",
    "most_seconds",
    "probe",
    "wait_for",
]

GAIN_WORTH_BF16 = 1.3  # below this, bf16's rounding costs more than its speed gives
DECIDING = 4096 * 256 * 1024  # products smaller than SKINNY do not choose the number format
EMULATED = 2.0  # times slower than fp32
PROBE_SECONDS = 3.0
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MatmulRate:
    """Measured speed of a matrix product, [rows, inner] times [inner, columns]; `groups` of them at once (experts)."""

    dtype: str
    rows: int
    inner: int
    columns: int
    gflops: float
    groups: int = 1


@dataclass(frozen=True)
class Machine:
    """One machine as measured: one entry of a fleet.

    Attributes:
        device: kind of device that will compute: "cpu", "cuda" (ROCm too), "mps".
        name: the chip's own name.
        cores: CPU cores this process may use (affinity and the container's quota counted).
        threads: CPU threads PyTorch computes with, at most `cores`.
        memory_bytes: memory of the host, or of the container if that is less.
        available_memory_bytes: free when measured.
        device_memory_bytes: memory of the accelerator; None where the device computes in host memory.
        matmul_rates: measured products, per number format and shape.
        bandwidth_gigabytes_per_second: reading plus writing while copying a large array.
        compute_dtype: number format to train in: "bf16" where it is clearly faster than fp32, "fp16" where that is
            and the chip has no bf16, else "fp32".
        device_free_bytes: memory of the accelerator that a process could use when the probe began.
        left_out: formats that are not faster than fp32, and how many times slower they are (None: they fail).
        chip: its `capabilities`; None in older files.
    """

    device: str
    name: str
    cores: int
    threads: int
    memory_bytes: int
    available_memory_bytes: int
    device_memory_bytes: int | None
    matmul_rates: tuple[MatmulRate, ...]
    bandwidth_gigabytes_per_second: float
    compute_dtype: str
    device_free_bytes: int | None = None
    left_out: tuple[tuple[str, float | None], ...] = ()
    chip: str | None = None

    def peak_gflops(self, dtype: str | None = None) -> float:
        """The fastest product measured in `dtype` (default: the compute dtype), in GFLOP/s.

        Raises:
            InputError: nothing was measured in that format.
        """
        wanted = dtype or self.compute_dtype
        rates = [rate.gflops for rate in self.matmul_rates if rate.dtype == wanted]
        if not rates:
            measured = ", ".join(sorted({rate.dtype for rate in self.matmul_rates}))
            raise InputError(f"{self.name} was not measured in {wanted}, only in {measured}; run `motley fleet probe`")
        return max(rates)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises InputError where fields are missing or unknown."""
        names = {field.name for field in fields(cls)}
        if wrong := (names ^ set(value)) - {"device_free_bytes", "left_out", "chip"}:  # older files lack them
            raise InputError(
                f"not a machine as `motley fleet probe --json` writes it: fields missing or unknown: "
                f"{', '.join(sorted(wrong))}"
            )
        rates = tuple(MatmulRate(**rate) for rate in value["matmul_rates"])
        left_out = tuple((name, slower) for name, slower in value.get("left_out", ()))
        return cls(**{**value, "matmul_rates": rates, "left_out": left_out})


def best_device() -> torch.device:
    """The accelerator PyTorch was built for and finds here, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")


def probe(
    seconds: float = PROBE_SECONDS, device: torch.device | None = None, grid: bool = False, shown: bool = True
) -> Machine:
    """Measure this machine for about `seconds`, never for twice as long; slow machines with fewer and smaller sizes.

    Args:
        seconds: time for all measurements together.
        device: what to measure; default the accelerator, or the CPU where there is none.
        grid: measure curves (small to large, skinny, grouped) instead of squares and one skinny product.
        shown: report progress (on one rank of many).
    """
    started = time.perf_counter()
    device = device or best_device()
    formats = formats_of(device)
    if shown:
        others = f", and tries {' and '.join(formats[1:])}" if formats[1:] else ""
        note(
            f"measuring {device_name(device)}: multiplies matrices in fp32{others}, copies memory; "
            f"about {seconds:g} s, at most {most_seconds(seconds):g} s"
        )
    cores = usable_cores()
    threads_before = torch.get_num_threads()
    threads = min(threads_before, cores)  # PyTorch does not know of container quotas
    torch.set_num_threads(threads)
    try:
        free, own = device_memory(device)
        measured = measure(device, formats, seconds, grid, started)
    finally:
        torch.set_num_threads(threads_before)
    left_out = tuple(
        (name, round(slower, 1) if math.isfinite(slower) else None) for name, slower in measured.left_out.items()
    )
    if shown:
        for one in left_out:
            note(why_left_out(*one))
    rates = tuple(
        MatmulRate(name, rows, inner, columns, _four_digits(flops(shape) / spent / GIGA), groups)
        for name in formats
        for (other, shape), spent in measured.seconds().items()
        for groups, rows, inner, columns in [shape]
        if other == name
    )
    ((copied, spent),) = [(shape[3], spent) for (name, shape), spent in measured.seconds().items() if name == "copy"]
    total, available = host_memory()
    return Machine(
        device=device.type,
        name=device_name(device),
        cores=cores,
        threads=threads,
        memory_bytes=total,
        available_memory_bytes=available,
        device_memory_bytes=own,
        matmul_rates=rates,
        bandwidth_gigabytes_per_second=_four_digits(2 * copied / spent / GIGA),
        compute_dtype=choose_dtype(rates),
        device_free_bytes=free,
        left_out=left_out,
        chip=capabilities(device),
    )


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")


def why_left_out(name: str, slower: float | None) -> str:
    """`"bf16", 49.2` → `bf16 is emulated here (at least 49 times slower than fp32) and left out`."""
    if slower is None:
        return f"{name} cannot be multiplied here and is left out"
    if slower < EMULATED:
        return f"{name} is no faster than fp32 here and left out"
    return f"{name} is emulated here (at least {slower:,.0f} times slower than fp32) and left out"


def describe(machine: Machine) -> str:
    """The machine in one sentence, for people."""
    formats = sorted({rate.dtype for rate in machine.matmul_rates}, key=list(DTYPES).index)
    rates = ", ".join(f"{in_flops(machine.peak_gflops(dtype))} in {dtype}" for dtype in formats)
    if machine.device == "cpu":
        size = f"{machine.cores} CPU core{'s' if machine.cores != 1 else ''}"
    else:
        size = f"{machine.device}, {in_gigabytes(machine.device_memory_bytes)} of its own memory"
    without = "".join(f"{why_left_out(*one)}; " for one in machine.left_out)
    return (
        f"{machine.name} ({size}, {in_gigabytes(machine.memory_bytes)} of host memory) multiplies matrices "
        f"at {rates} and moves {machine.bandwidth_gigabytes_per_second:,.0f} GB/s; {without}"
        f"it computes in {machine.compute_dtype}."
    )


def in_flops(gflops: float) -> str:
    """`849.6` → `850 GFLOP/s`; thousands become TFLOP/s, millions PFLOP/s."""
    if gflops >= 1e6:
        return f"{gflops / 1e6:,.4g} PFLOP/s"
    return f"{gflops / 1000:,.1f} TFLOP/s" if gflops >= 1000 else f"{gflops:,.0f} GFLOP/s"


def in_gigabytes(memory_bytes: int | None) -> str:
    """Bytes → `23.5 GB` (decimal); `shared` where the device has no memory of its own."""
    return "shared" if memory_bytes is None else f"{memory_bytes / GIGA:,.1f} GB"


def choose_dtype(rates: tuple[MatmulRate, ...]) -> str:
    """The chip's 16-bit format if it beats fp32 by `GAIN_WORTH_BF16` in every shape measured in both, else fp32.

    fp16 only where bf16 was not measured: its narrow range needs a loss scale.
    """
    half = "bf16" if any(rate.dtype == "bf16" for rate in rates) else "fp16"
    large = [rate for rate in rates if rate.groups == 1 and rate.rows * rate.inner * rate.columns >= DECIDING]
    speed = {(rate.dtype, rate.rows, rate.inner, rate.columns): rate.gflops for rate in large or rates}
    gains = [
        gflops / speed["fp32", rows, inner, columns]
        for (dtype, rows, inner, columns), gflops in speed.items()
        if dtype == half and ("fp32", rows, inner, columns) in speed
    ]
    return half if gains and min(gains) > GAIN_WORTH_BF16 else "fp32"


# -------------------------------------------------------------------------------- what the system says


def device_name(device: torch.device) -> str:
    """The chip's own name; the CPU's architecture where the system lists no name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_memory(device: torch.device) -> tuple[int | None, int | None]:
    """(free, total) bytes of the accelerator's memory; None for devices that compute in host memory."""
    if device.type in ("cpu", "mps"):
        return None, None
    torch.empty(1, device=device)  # the context that every process needs is no longer free
    return torch.accelerator.get_memory_info(device)


def usable_cores(cgroups: Path = CGROUPS) -> int:
    """Cores this process may use: its CPU affinity, limited by its container's quota (at least 1)."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(affinity, cpu_quota(cgroups))))


def cpu_quota(cgroups: Path = CGROUPS) -> float:
    """CPU quota, in cores, of the control groups (version 2 or 1) of this process; inf if unlimited."""
    quotas = [math.inf]
    for group in _own_groups(cgroups, ""):
        if (limit := _read(group / "cpu.max")) is not None:  # "150000 100000" or "max 100000"
            quota, period = limit.split()
            if quota != "max":
                quotas.append(int(quota) / int(period))
    for group in _own_groups(cgroups / "cpu", "cpu"):
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
        if quota is not None and period is not None and int(quota) > 0:  # -1: no limit
            quotas.append(int(quota) / int(period))
    return min(quotas)


def host_memory(cgroups: Path = CGROUPS) -> tuple[int, int]:
    """Total and available bytes of memory, limited by the container of this process."""
    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    groups = [(group, "memory.max", "memory.current") for group in _own_groups(cgroups, "")]
    groups += [
        (group, "memory.limit_in_bytes", "memory.usage_in_bytes") for group in _own_groups(cgroups / "memory", "memory")
    ]
    for group, limit_name, used_name in groups:
        limit, used = _read(group / limit_name), _read(group / used_name)
        if limit is None or used is None or limit == "max":
            continue
        statistics_lines = (_read(group / "memory.stat") or "").splitlines()
        # Cached files count as used, but the system drops them when memory is needed.
        reclaimable = sum(int(line.split()[1]) for line in statistics_lines if line.startswith("inactive_file "))
        total = min(total, int(limit))
        available = min(available, max(0, int(limit) - int(used) + reclaimable))
    return total, available


def _own_groups(mount: Path, controller: str) -> list[Path]:
    """Folders of the control group of this process and of all its parents, as far as visible."""
    own = Path("/")
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = Path(path)
    return [mount / str(folder).lstrip("/") for folder in [own, *own.parents]]


def _read(path: Path) -> str | None:
    """Content of a small system file; None where this system has no such file."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None
