"""What a benchmark says of the machine it ran on, and which number format it takes there."""

import platform
from pathlib import Path

import torch

from motley.fleet.capabilities import CPU_INFORMATION, instruction_sets
from motley.fleet.device import Format, choose_device, number_format
from motley.fleet.probe import probe

FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "i8mm", "sve")
"""Of /proc/cpuinfo: those that decide how fast a step is (x86-64, then Arm)."""
PROBE_SECONDS = 2.0


def cpu_flags(information: Path = CPU_INFORMATION) -> list[str]:
    """Those of FLAGS that the CPU has; only its architecture where the system does not tell."""
    own = instruction_sets(information)
    return [platform.machine()] if own is None else [flag for flag in FLAGS if flag in own]


def best_format(device: torch.device | None = None) -> Format:
    """What `motley pretrain` would compute in here, by the probe."""
    device = device or choose_device("auto")
    return number_format("auto", lambda: probe(PROBE_SECONDS, device))
