"""A chip by its capabilities: what decides how fast it computes in each number format, and how it rounds.

    CPU     architecture, vendor, instruction sets that matter, those that PyTorch uses, its build, what overrides them
    CUDA    compute capability (or GPU architecture), multiprocessors, PyTorch's build and its libraries
    others  the chip's own name, the system's and PyTorch's version

The product name does not decide: "AMD EPYC" has AVX2 only, or AVX-512 and bf16. Two chips of the same description gave
the same bits in all tests; nothing guarantees it, so copies of weights are compared too (`parallel/consistency.py`).
"""

import hashlib
import os
import platform
from functools import cache
from pathlib import Path

import torch

CPU_INFORMATION = Path("/proc/cpuinfo")
VENDOR = ("vendor_id", "CPU implementer")  # of x86-64 and of ARM; math libraries choose their paths by it
INSTRUCTIONS = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16",
    "asimd", "asimdhp", "asimdfhm", "asimddp", "bf16", "i8mm", "sve", "sve2", "svebf16", "sme",
)  # fmt: skip
OVERRIDES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS")


def capabilities(device: torch.device, kernels: str = "") -> str:
    """The description of a device, to compare with that of another.

    kernels: for people, our own kernels that are loaded.
    """
    facts = _cpu(CPU_INFORMATION) if device.type == "cpu" else _accelerator(device)
    return ", ".join([*facts, f"PyTorch {torch.__version__} ({_build()})", *[kernels] * bool(kernels)])


@cache
def _cpu(information: Path) -> tuple[str, ...]:
    entries = _entries(information)
    vendor = next((entries[name] for name in VENDOR if name in entries), platform.processor())
    instructions = instruction_sets(information) or []
    known = [name for name in INSTRUCTIONS if name in instructions]
    overrides = [f"{name}={os.environ[name]}" for name in OVERRIDES if os.environ.get(name)]
    used = f"PyTorch uses {torch.backends.cpu.get_cpu_capability()}"
    return (f"{platform.machine()} {vendor}".strip(), " ".join(known), used, *overrides)


def instruction_sets(information: Path = CPU_INFORMATION) -> list[str] | None:
    """All that the system lists for the CPU; None where it lists none."""
    entries = _entries(information)
    said = entries.get("flags", entries.get("Features"))
    return None if said is None else said.split()


def _entries(information: Path) -> dict[str, str]:
    """What the system lists for the first core."""
    entries: dict[str, str] = {}
    if information.exists():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            entries.setdefault(name.strip(), value.strip())
    return entries


def _accelerator(device: torch.device) -> tuple[str, ...]:
    if device.type != "cuda":
        return device.type, platform.processor() or platform.machine(), platform.release()
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        kind = properties.gcnArchName
    else:
        kind = f"compute capability {properties.major}.{properties.minor}"
    return device.type, kind, f"{properties.multi_processor_count} multiprocessors"


@cache
def _build() -> str:
    """A digest of how PyTorch was built, with which libraries."""
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    shown = [line for line in torch.__config__.show().splitlines() if "CPU capability" not in line]  # of the machine
    return hashlib.sha256(f"{shown} {cudnn}".encode()).hexdigest()[:8]
