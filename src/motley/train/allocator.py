"""Stop glibc from returning freed pages to the system (mallopt): the next step asks for the same again.

glibc hands large pieces that are freed back to the system, which hands them out again page by page, each filled with
zeros: a step of `micro` (8 x 512 tokens) waited for 37,000 of them.
"""

import ctypes
import platform

import psutil
import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # numbers of mallopt's parameters, malloc.h
LARGEST_KEPT = 32 << 20  # bytes; glibc takes no higher limit


def keep_freed_memory() -> bool:
    """Tell glibc to; the process stays as large as it ever was. Returns whether this system has a glibc to tell."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(TRIM_THRESHOLD, 2**31 - 1))


def memory_bytes(device: torch.device) -> int:
    """The most that a GPU had to hold so far; of a CPU, what this process holds."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
