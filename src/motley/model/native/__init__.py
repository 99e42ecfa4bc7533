"""Our own kernels for CPUs, in C++: what is here, whether it was built, which of it this machine runs.

    norm.cpp  attention.cpp  experts.cpp  loss.cpp  muon.cpp  sort.cpp      on top of products.h, simd.h
        └────────── hatch_build.py → build.py, c++ ──────────▶ kernels-….so, loaded by ctypes

    number format    best first
    fp32             avx512, avx2               neon
    bf16             amx, avx512bf16            neonbf16

The library holds the kernels of every target of its architecture (`build.TARGETS`); the best that this machine has is
chosen when it starts. A kernel takes pointers and sizes, knows nothing of PyTorch, and shares PyTorch's threads. Beside
each stands the plain path, which runs wherever a kernel does not fit; tests hold the two equal. Results do not depend
on the number of threads.
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from motley.model.native import build
from motley.model.native.build import library

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

_allowed: tuple[str, ...] | None = None  # None: all


@cache
def _loaded() -> ctypes.CDLL | None:
    return ctypes.CDLL(str(library())) if runnable() and library().is_file() else None


@cache
def runnable() -> tuple[str, ...]:
    """Names of the targets whose instructions this machine has, the best of a number format last.

    A limit set for PyTorch (ATEN_CPU_CAPABILITY) holds for them as well.
    """
    level = torch.backends.cpu.get_cpu_capability()
    if build.machine() == "x86_64":
        wide = level.startswith("AVX512")
        narrow = wide and torch.cpu._is_avx512_bf16_supported()
        tiles = narrow and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()
        has = {"avx2": wide or level == "AVX2", "avx512": wide, "avx512bf16": narrow, "amx": tiles}
    else:
        arm = build.machine() == "aarch64"
        has = {"neon": arm, "neonbf16": arm and _arm_has_bf16()}
    return tuple(target.name for target in build.TARGETS if has.get(target.name))


@cache
def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16."""
    if build.machine() == "x86_64":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return build.machine() == "aarch64" and _arm_has_bf16()


@cache
def _arm_has_bf16() -> bool:
    if platform.system() == "Darwin":
        value, size = ctypes.c_int(0), ctypes.c_size_t(4)
        asked = ctypes.CDLL(None).sysctlbyname(
            b"hw.optional.arm.FEAT_BF16", ctypes.byref(value), ctypes.byref(size), None, 0
        )
        return asked == 0 and value.value == 1
    information = Path("/proc/cpuinfo")
    lines = information.read_text(errors="replace").splitlines() if information.is_file() else []
    return any("bf16" in line.split() for line in lines if line.startswith("Features"))


@cache
def _built() -> tuple[str, ...]:
    """Those of the runnable targets that the library has: an old compiler may have left some out."""
    kernels = _loaded()
    if kernels is None:
        return ()
    able = [target for target in build.TARGETS if target.name in runnable()]
    return tuple(one.name for one in able if hasattr(kernels, f"norm_forward_{one.dtype}_{one.name}"))


def chosen(dtype: torch.dtype) -> str | None:
    """The target whose kernels compute in `dtype` here; None: the plain path does."""
    return _best(dtype, _allowed)


@cache
def _best(dtype: torch.dtype, allowed: tuple[str, ...] | None) -> str | None:
    """Asked by every layer at every call, so it is looked for once."""
    names = [name for name in _built() if allowed is None or name in allowed]
    fitting = [target.name for target in build.TARGETS if target.name in names and target.dtype == DTYPES.get(dtype)]
    return fitting[-1] if fitting else None


def forget() -> None:
    """Look again at what is built: for those who have just built."""
    for kept in (_loaded, runnable, _built, _best):
        kept.cache_clear()


def describe() -> str:
    """What computes here, in words."""
    named = {name: chosen(dtype) for dtype, name in DTYPES.items()}
    in_use = ", ".join(f"{target} in {name}" for name, target in named.items() if target)
    return f"own kernels: {in_use}" if in_use else "own kernels: none"


def missing() -> str | None:
    """What to tell people whose CPU could run kernels but has none; None: nothing is amiss."""
    best_of_each_format = {target.dtype: target.name for target in build.TARGETS if target.name in runnable()}
    lacking = [name for name in best_of_each_format.values() if name not in _built()]
    if not lacking:
        return None
    return (
        f"motley's own kernels for this CPU ({', '.join(lacking)}) are not built, so steps take about a third longer: "
        f"see that there is a C++ compiler (c++) that knows them, then run `python {build.__file__}`"
    )


@contextmanager
def only(*targets: str) -> Iterator[None]:
    """While inside, no other targets' kernels are used: for comparisons."""
    global _allowed
    before, _allowed = _allowed, targets
    try:
        yield
    finally:
        _allowed = before


def switched_off() -> AbstractContextManager[None]:
    """While inside, everything takes the plain paths."""
    return only()


def fits(x: Tensor, *sizes: int) -> bool:
    """Whether kernels compute from `x`: on this CPU, in its number format, and sizes in whole vectors of 16."""
    return x.device.type == "cpu" and runs(x.dtype, *sizes)


def runs(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether there are kernels for a number format, and `sizes` are whole vectors of 16."""
    return not any(size % 16 for size in sizes) and chosen(dtype) is not None


def call(name: str, dtype: torch.dtype | None, *arguments: Tensor | int | float | None) -> None:
    """Run a kernel for a number format (None: one that is the same for all).

    Tensors go as pointers (None as a null pointer), integers as long, floats as float.
    """
    kernels = _loaded()
    assert kernels is not None
    full = name if dtype is None else f"{name}_{DTYPES[dtype]}_{chosen(dtype)}"
    getattr(kernels, full)(*map(_c, arguments))


def _c(argument: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_long | ctypes.c_float:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p(None)
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_long(argument)
