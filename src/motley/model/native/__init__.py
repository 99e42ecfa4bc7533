"""Our own kernels for CPUs with AVX-512 and bf16, in C++: what is here, whether it was built, whether it fits.

    norm.cpp  attention.cpp  experts.cpp  loss.cpp  muon.cpp      on top of products.h
        └────────── hatch_build.py → build.py, c++ ──────────▶ kernels-….so, loaded by ctypes

A kernel takes pointers and sizes, knows nothing of PyTorch, and shares PyTorch's threads. Beside each stands the plain
path, which runs wherever a kernel does not fit; tests hold the two equal. Results do not depend on the number of
threads.
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from motley.model.native import build
from motley.model.native.build import library

_switched_off = False


@cache
def _loaded() -> ctypes.CDLL | None:
    return ctypes.CDLL(str(library())) if cpu_has_what_it_takes() and library().is_file() else None


def cpu_has_what_it_takes() -> bool:
    """AVX-512 with products of bf16."""
    return platform.machine() in ("x86_64", "AMD64") and torch.cpu._is_avx512_bf16_supported()


def missing() -> str | None:
    """What to tell people whose CPU could run the kernels but has none; None: nothing is amiss."""
    if not cpu_has_what_it_takes() or _loaded() is not None:
        return None
    return (
        "motley's own kernels for this CPU are not built, so steps in bf16 take about a third longer: see that "
        f"there is a C++ compiler (c++), then run `python {build.__file__}`"
    )


@contextmanager
def switched_off() -> Iterator[None]:
    """While inside, everything takes the plain paths: for comparisons."""
    global _switched_off
    before, _switched_off = _switched_off, True
    try:
        yield
    finally:
        _switched_off = before


def fits(x: Tensor, *sizes: int) -> bool:
    """Whether kernels compute from `x`: bf16 on this CPU, and sizes in whole vectors of 16."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and runs(*sizes)


def runs(*sizes: int) -> bool:
    """Whether there are kernels, and `sizes` are whole vectors of 16."""
    return not (_switched_off or any(size % 16 for size in sizes)) and _loaded() is not None


def call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Run a kernel: tensors go as pointers (None as a null pointer), integers as long, floats as float."""
    kernels = _loaded()
    assert kernels is not None
    getattr(kernels, name)(*map(_c, arguments))


def _c(argument: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_long | ctypes.c_float:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p(None)
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_long(argument)
