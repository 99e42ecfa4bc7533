"""Measure this machine: how many cores are really ours, how fast it multiplies and how fast it moves memory.

    rounds until the time is up:   every product once, every copy once, in turn
    result of each:                the median over the rounds

Taking turns means that a busy moment of the machine slows all candidates alike, so that comparing them (is
bf16 faster here?) stays fair; the median forgets the moment altogether.
"""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import psutil
import torch

from motley.errors import InputError

GAIN_WORTH_BF16 = 1.3  # below this, bf16's rounding costs more than its speed gives
SKINNY = (
    4096,
    256,
    1024,
)  # a batch of tokens through one small layer: what training a small model consists of
DECIDING = 4096 * 256 * 1024  # products smaller than SKINNY do not choose the number format
LEAST_ROUNDS = 3
BURST_SECONDS = 0.005  # a measurement shorter than this is repeated: clocks and kernel launches are not free
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
FP8_CAPABILITY = (8, 9)  # of NVIDIA's chips, from which on they multiply in fp8
CGROUPS = Path("/sys/fs/cgroup")
GIGA = 1e9


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
        available_memory_bytes: what of it was free when measured.
        device_memory_bytes: memory of the accelerator; None where the device computes in host memory.
        matmul_rates: measured products, per number format and shape.
        bandwidth_gigabytes_per_second: reading plus writing while copying a large array.
        compute_dtype: number format to train in: "bf16" where it is clearly faster than fp32, "fp16" where that is so
            and the chip has no bf16, else "fp32".
        device_free_bytes: what of the accelerator's memory a process could use when the probe began.
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
        if wrong := (names ^ set(value)) - {"device_free_bytes"}:  # younger than some files
            raise InputError(
                f"not a machine as `motley fleet probe --json` writes it: fields missing or unknown: "
                f"{', '.join(sorted(wrong))}"
            )
        rates = tuple(MatmulRate(**rate) for rate in value["matmul_rates"])
        return cls(**{**value, "matmul_rates": rates})


def best_device() -> torch.device:
    """The accelerator PyTorch was built for and finds here, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")


def probe(seconds: float = 3.0, device: torch.device | None = None, grid: bool = False) -> Machine:
    """Measure this machine for about `seconds` (very slow ones take longer: three rounds are the least).

    Args:
        seconds: time for all measurements together.
        device: what to measure; default the accelerator, or the CPU where there is none.
        grid: measure curves (small to large, skinny, grouped) instead of one large and one skinny product.
    """
    device = device or best_device()
    cores = usable_cores()
    threads_before = torch.get_num_threads()
    threads = min(threads_before, cores)  # PyTorch does not know of container quotas
    torch.set_num_threads(threads)
    free, own = device_memory(device)
    try:
        rates, bandwidth = _measure(device, seconds, grid)
    finally:
        torch.set_num_threads(threads_before)
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
        bandwidth_gigabytes_per_second=round(bandwidth, 1),
        compute_dtype=choose_dtype(rates),
        device_free_bytes=free,
    )


def describe(machine: Machine) -> str:
    """One sentence for people."""
    formats = sorted({rate.dtype for rate in machine.matmul_rates}, key=list(DTYPES).index)
    rates = ", ".join(f"{in_flops(machine.peak_gflops(dtype))} in {dtype}" for dtype in formats)
    if machine.device == "cpu":
        size = f"{machine.cores} CPU core{'s' if machine.cores != 1 else ''}"
    else:
        size = f"{machine.device}, {in_gigabytes(machine.device_memory_bytes)} of its own memory"
    return (
        f"{machine.name} ({size}, {in_gigabytes(machine.memory_bytes)} of host memory) multiplies matrices "
        f"at {rates} and moves {machine.bandwidth_gigabytes_per_second:,.0f} GB/s; "
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
    """The chip's 16 bits if they beat fp32 by more than `GAIN_WORTH_BF16` in every shape measured in both, else fp32.

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


# ---------------------------------------------------------------------------------------------- measuring


def _measure(device: torch.device, seconds: float, grid: bool) -> tuple[tuple[MatmulRate, ...], float]:
    """Rates of all products, and the copy bandwidth in GB/s."""
    on_cpu = device.type == "cpu"
    side = 2048 if on_cpu else 8192
    formats = formats_of(device)
    shapes = [(1, side, side, side), (1, *SKINNY)]
    if grid:
        shapes += [shape for shape in _grid(side) if shape not in shapes]
    keys = [(dtype, *shape) for dtype in formats for shape in shapes]
    actions = [_product(device, *key) for key in keys]
    copy_bytes = 2**28 if on_cpu else 2**30  # larger than any cache
    actions.append(_copy(device, copy_bytes))
    times = _take_turns(actions, device, seconds)
    rates = tuple(
        MatmulRate(dtype, rows, inner, columns, round(2 * groups * rows * inner * columns / taken / GIGA, 1), groups)
        for (dtype, groups, rows, inner, columns), taken in zip(keys, times, strict=False)
    )
    return rates, 2 * copy_bytes / times[-1] / GIGA


def formats_of(device: torch.device) -> list[str]:
    """Number formats whose products the device computes itself; emulated ones are left out."""
    if device.type == "cpu":
        return ["fp32", "bf16"]
    if device.type != "cuda":
        return ["fp32", "bf16", "fp16"]
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    fp8 = torch.version.hip is None and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
    return ["fp32", *["bf16"] * bf16, "fp16", *["fp8"] * fp8]


def _grid(side: int) -> list[tuple[int, int, int, int]]:
    """(groups, rows, inner, columns): squares from small to large, layers of small models, stacks of experts."""
    squares = [(1, edge, edge, edge) for edge in (side // 16, side // 8, side // 4, side // 2)]
    skinny = [(1, 2 * side, inner, columns) for inner, columns in ((64, 256), (128, 512), (256, 256), (512, 2048))]
    few_rows = [(1, rows, 1024, 1024) for rows in (16, 128, 512)]
    grouped = [(8, side // 4, 192, 256), (16, side // 8, 256, 256), (16, side // 4, 512, 1024)]
    return squares + skinny + few_rows + grouped


def _take_turns(actions: list[Callable[[], object]], device: torch.device, seconds: float) -> list[float]:
    """Median seconds of one run of each action, all run in turn until `seconds` are over."""
    start = time.perf_counter()
    bursts = []
    for action in actions:
        action()  # the first run plans kernels and touches fresh memory
        bursts.append(min(100, math.ceil(BURST_SECONDS / max(_seconds_of(action, 1, device), 1e-7))))
    samples: list[list[float]] = [[] for _ in actions]
    rounds = 0
    while rounds < LEAST_ROUNDS or time.perf_counter() - start < seconds:
        for action, burst, sample in zip(actions, bursts, samples, strict=True):
            sample.append(_seconds_of(action, burst, device))
        rounds += 1
    return [statistics.median(sample) for sample in samples]


def _seconds_of(action: Callable[[], object], times: int, device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    for _ in range(times):
        action()
    wait_for(device)
    return (time.perf_counter() - start) / times


def glance(device: torch.device, dtype: str, seconds: float = 0.1) -> float:
    """GFLOP/s of one large matrix product, measured for about so long: enough to tell workers apart at a start.

    dtype: number format; where the device only emulates it, fp32 is measured.
    """
    dtype = dtype if dtype in formats_of(device) else "fp32"
    side = 512 if device.type == "cpu" else 4096
    (spent,) = _take_turns([_product(device, dtype, 1, side, side, side)], device, seconds)
    return 2e-9 * side**3 / spent


def wait_for(device: torch.device) -> None:
    """Accelerators compute behind our back: wait until the queue is empty."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _product(
    device: torch.device, dtype: str, groups: int, rows: int, inner: int, columns: int
) -> Callable[[], object]:
    if dtype == "fp8":
        return fp8_product(device, groups, rows, inner, columns)
    left = torch.randn(groups, rows, inner, device=device).to(DTYPES[dtype])
    right = torch.randn(groups, inner, columns, device=device).to(DTYPES[dtype])
    result = torch.empty(groups, rows, columns, device=device, dtype=DTYPES[dtype])
    if groups == 1:
        return lambda: torch.mm(left[0], right[0], out=result[0])
    return lambda: torch.bmm(left, right, out=result)


def fp8_product(
    device: torch.device, groups: int, rows: int, inner: int, columns: int
) -> Callable[[], list[torch.Tensor]]:
    """With one scale for each matrix and sums in fp32; the right one lies by columns, as the hardware wants it."""
    scale = torch.ones((), device=device)
    left = torch.randn(groups, rows, inner, device=device).to(DTYPES["fp8"])
    right = torch.randn(groups, columns, inner, device=device).to(DTYPES["fp8"]).transpose(1, 2)

    def multiply() -> list[torch.Tensor]:
        return [
            torch._scaled_mm(one, other, scale, scale, out_dtype=torch.bfloat16)  # type: ignore[attr-defined]
            for one, other in zip(left, right, strict=True)
        ]

    return multiply


def _copy(device: torch.device, size: int) -> Callable[[], object]:
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


# -------------------------------------------------------------------------------- what the system says


def device_name(device: torch.device) -> str:
    """The chip's own name; the CPU's architecture where the system does not tell more."""
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
    torch.empty(1, device=device)  # what every process needs is no longer free
    return torch.accelerator.get_memory_info(device)


def usable_cores(cgroups: Path = CGROUPS) -> int:
    """Cores this process may really use: its CPU affinity, cut to its container's quota (at least 1)."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(affinity, cpu_quota(cgroups))))


def cpu_quota(cgroups: Path = CGROUPS) -> float:
    """Cores' worth of time granted by the control groups (version 2 or 1) around us; inf if unlimited."""
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
    """Total and available bytes of memory, cut to the limit of the container around this process."""
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
        # Files the system merely remembers are counted as used, but make room when asked.
        reclaimable = sum(int(line.split()[1]) for line in statistics_lines if line.startswith("inactive_file "))
        total = min(total, int(limit))
        available = min(available, max(0, int(limit) - int(used) + reclaimable))
    return total, available


def _own_groups(mount: Path, controller: str) -> list[Path]:
    """Folders of the control group this process is in, and of all groups around it, as far as visible."""
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
