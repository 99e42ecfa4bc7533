"""Compiles the kernels beside this file, once for each target, into one library; needs only Python and a C++ compiler.

    python src/motley/model/native/build.py      does it in place; installing motley has done it already

The library's name holds a digest of its sources and flags, so that one made otherwise is never loaded. A target whose
flags the compiler does not know is left out, and that is said.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
SHARED = ("sort.cpp",)
"""Sources that are the same for every target and compiled once."""


@dataclass(frozen=True)
class Target:
    """What kernels are compiled for: a machine, its instruction sets, and the number format that they compute in.

    dtype: "fp32" or "bf16". Exported names are `<kernel>_<dtype>_<name>`.
    """

    name: str
    machine: str
    dtype: str
    flags: tuple[str, ...]


_AVX512 = ("-mfma", *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")))
_BF16 = (*_AVX512, "-mavx512bf16", "-DMOTLEY_BF16")
TARGETS = (
    Target("avx2", "x86_64", "fp32", ("-mavx2", "-mfma")),
    Target("avx512", "x86_64", "fp32", _AVX512),
    Target("avx512bf16", "x86_64", "bf16", _BF16),
    Target("amx", "x86_64", "bf16", (*_BF16, "-mamx-tile", "-mamx-bf16", "-DMOTLEY_AMX")),
    Target("neon", "aarch64", "fp32", ("-march=armv8-a",)),
    Target("neonbf16", "aarch64", "bf16", ("-march=armv8.2-a+bf16", "-DMOTLEY_BF16")),
)
"""Of one number format the later is the better."""

# Contracted: a b + c is one instruction everywhere. Hidden and without exceptions: nothing of one target may be taken
# for another's by the linker.
COMMON = ("-O3", "-std=c++17", "-fPIC", "-ffp-contract=fast", "-fno-exceptions", "-fvisibility=hidden", "-Wno-psabi")
# Linked without an OpenMP of its own: PyTorch's is there already, and a second one would bring threads that wait in a
# busy loop beside the first one's.
if platform.system() == "Darwin":
    THREADS, LINK = ("-Xclang", "-fopenmp"), ("-shared", "-undefined", "dynamic_lookup")
else:
    THREADS, LINK = ("-fopenmp",), ("-shared",)


def machine() -> str:
    """The processor's architecture under one name each."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def targets_of(processor: str) -> list[Target]:
    return [target for target in TARGETS if target.machine == processor]


def flags_of(target: Target) -> list[str]:
    """How a source is compiled for a target."""
    return [*COMMON, *THREADS, *target.flags, f"-DMOTLEY_TARGET={target.name}"]


def sources() -> list[Path]:
    return sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")])


def library(targets: Sequence[Target] | None = None) -> Path:
    """Where the library made of the present sources and flags is, or would be."""
    digest = hashlib.sha256()
    for file in sources():
        digest.update(file.name.encode() + b"\0" + file.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    commands = [flags_of(target) for target in (targets_of(machine()) if targets is None else targets)]
    digest.update(repr((commands, LINK)).encode())
    return FOLDER / f"kernels-{digest.hexdigest()[:16]}.so"


def _run(command: list[str]) -> str | None:
    """What a failing command said."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return f"`{' '.join(command)}` failed:\n{done.stdout}" if done.returncode else None


def knows(compiler: str, target: Target) -> bool:
    """Whether a compiler knows a target's flags."""
    return _run([compiler, *flags_of(target), "-fsyntax-only", "-x", "c++", os.devnull]) is None


def build() -> str | None:
    """Make the library, unless it is there. Returns why there is none, or None when there is.

    What is left out is told on standard error.
    """
    if library().is_file():
        return None
    wanted = targets_of(machine())
    if platform.system() not in ("Linux", "Darwin") or not wanted:
        here = f"{platform.system()} on {machine()}"
        return f"there are kernels for Linux and macOS on x86_64 and 64-bit Arm, this is {here}"
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        return "there is no C++ compiler (c++) on this machine"
    known = [target for target in wanted if knows(compiler, target)]
    if left_out := [target.name for target in wanted if target not in known]:
        sys.stderr.write(f"{compiler} is too old for the kernels of {', '.join(left_out)}: left out\n")
    if not known:
        return f"{compiler} knows none of the instruction sets that there are kernels for"
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        files = [file for file in sources() if file.suffix == ".cpp"]
        units = [(file, flags_of(target), f"{file.stem}-{target.name}.o")
                 for target in known for file in files if file.name not in SHARED]  # fmt: skip
        units += [(FOLDER / name, list(COMMON), f"{name}.o") for name in SHARED]
        commands = [
            [compiler, *flags, "-c", str(file), "-o", str(Path(folder, output))] for file, flags, output in units
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            failures = [failure for failure in pool.map(_run, commands) if failure]
        made = str(Path(folder, "library"))
        objects = [str(Path(folder, output)) for *_, output in units]
        if not failures and (failure := _run([compiler, *LINK, *objects, "-o", made])):
            failures.append(failure)
        if failures:
            return failures[0]
        for old in FOLDER.glob("kernels-*.so"):
            old.unlink()
        os.replace(made, library())
    return None


if __name__ == "__main__":
    sys.exit(build())
