"""Compiles the kernels beside this file into one library; needs nothing but Python and a C++ compiler.

    python src/motley/model/native/build.py      does it in place; installing motley has done it already

The library's name holds a digest of its sources, so that one made from other sources is never loaded.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
    "-mfma",
    *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "bf16")),
)


def sources() -> list[Path]:
    return sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")])


def library() -> Path:
    """Where the library made of the present sources is, or would be."""
    digest = hashlib.sha256()
    for file in sources():
        digest.update(file.name.encode() + b"\0" + file.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return FOLDER / f"kernels-{digest.hexdigest()[:16]}.so"


def build() -> str | None:
    """Make the library, unless it is there. Returns why there is none, or None when there is."""
    if library().is_file():
        return None
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return f"there are kernels for Linux on x86_64 only, this is {platform.system()} on {platform.machine()}"
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        return "there is no C++ compiler (c++) on this machine"
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        objects = [str(Path(folder, file.stem + ".o")) for file in sources() if file.suffix == ".cpp"]
        made = str(Path(folder, "library"))
        units = zip([file for file in sources() if file.suffix == ".cpp"], objects, strict=True)
        commands = [[compiler, *FLAGS, "-c", str(file), "-o", unit] for file, unit in units]
        # Linked without an OpenMP of its own: PyTorch's is there already, and a second one would bring threads that
        # wait in a busy loop beside the first one's.
        commands.append([compiler, "-shared", *objects, "-o", made])
        for command in commands:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                return f"`{' '.join(command)}` failed:\n{done.stdout}"
        for old in FOLDER.glob("kernels-*.so"):
            old.unlink()
        os.replace(made, library())
    return None


if __name__ == "__main__":
    sys.exit(build())
