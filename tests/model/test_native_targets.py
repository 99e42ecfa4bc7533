"""The kernels of every target that runs here, or under an emulator, against plain programs in double precision; and
what their library is made of.

    native/check.cpp ── c++ ──▶ a program without Python: as it is, with sanitizers, for 64-bit Arm under qemu-user
"""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from motley.model import native
from motley.model.native import build
from motley.model.native.build import Target

CHECK = Path(__file__).parent / "native" / "check.cpp"
EMULATED = CHECK.with_name("emulated.h")
OPTIMISED = ("-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fopenmp")
SANITIZED = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
KERNELS_SANITIZED, CHECK_SANITIZED = ("-O0", *SANITIZED), ("-O1", *SANITIZED)
"""-O0: optimised, the kernels take three times as long to compile, and run for a few seconds only."""
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
HERE = build.targets_of(build.machine())
ARM = [target for target in build.TARGETS if target.machine == "aarch64"]

pytestmark = pytest.mark.usefixtures("kernels")


def name_of(target: Target) -> str:
    return target.name


def required(*programs: str) -> None:
    """Skip, aloud (conftest.py), where a program is missing; CI installs them (.ci/run)."""
    if lacking := [program for program in programs if shutil.which(program) is None]:
        pytest.skip(f"KERNELS WERE NOT CHECKED: there is no {' and no '.join(lacking)}")


def runs_here(target: Target) -> None:
    if target.name not in native.runnable():
        pytest.skip(f"this CPU does not run the kernels for {target.name}")


def compiler() -> str:
    return os.environ.get("CXX") or "c++"


def run(*command: str | Path, **environment: str) -> str:
    """What a program says; a failing one fails the test with it."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}:\n{done.stdout[-6000:]}"
    return done.stdout


def make_objects(cxx: str, target: Target, flags: Sequence[str], folder: Path) -> list[Path]:
    """The kernels of one target, compiled as in the library but for `flags`, which come last."""
    sources = [file for file in build.sources() if file.suffix == ".cpp"]
    objects = [folder / f"{file.stem}.o" for file in sources]
    commands = [
        (cxx, *build.flags_of(target), *flags, "-c", file, "-o", made)
        for file, made in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: run(*command), commands))
    return objects


def make_check(
    cxx: str, target: Target, parts: Sequence[Path | str], flags: Sequence[str], folder: Path, check: Path = CHECK
) -> Path:
    """The program that holds `parts`, a target's kernels, to the plain ones. `check`: its source, or that compiled."""
    made = folder / f"check-{target.name}"
    run(cxx, *OPTIMISED, *flags, f"-DTARGET={target.name}", f"-DDTYPE={target.dtype}", check, *parts, "-o", made)
    return made


@pytest.mark.parametrize("target", HERE, ids=name_of)
def test_the_librarys_kernels_equal_the_papers_equations_on_any_number_of_threads(
    target: Target, tmp_path: Path
) -> None:
    runs_here(target)
    library = build.library()
    check = make_check(compiler(), target, [library, f"-Wl,-rpath,{library.parent}"], [], tmp_path)
    said = [run(check, "1", "40", OMP_NUM_THREADS=threads) for threads in ("1", "3")]
    assert said[0] == said[1], "also the digest of all results"


@pytest.fixture(scope="session")
def sanitized_check(once: Any) -> Callable[[Target], Path]:
    """The plain programs of a number format, compiled with sanitizers, once for all targets of this name."""

    def of(target: Target) -> Path:
        name, made = f"check-{target.name}-{target.dtype}", "check.o"
        names = (f"-DTARGET={target.name}", f"-DDTYPE={target.dtype}")
        return (
            once(
                name,
                lambda folder: run(compiler(), *OPTIMISED, *CHECK_SANITIZED, *names, "-c", CHECK, "-o", folder / made),
            )
            / made
        )

    return of


@pytest.mark.parametrize("target", HERE, ids=name_of)
def test_sanitizers_find_nothing(target: Target, sanitized_check: Callable[[Target], Path], tmp_path: Path) -> None:
    runs_here(target)
    target = replace(target, name=target.name if target.name == "amx" else "here")  # amx is asked for by this name
    objects = make_objects(compiler(), target, KERNELS_SANITIZED, tmp_path)
    check = make_check(compiler(), target, objects, CHECK_SANITIZED, tmp_path, sanitized_check(target))
    run(check, "2", "16", OMP_NUM_THREADS="2")


WIDE = [target for target in build.TARGETS if "-mavx512f" in target.flags]


@pytest.mark.parametrize("target", WIDE, ids=name_of)
def test_kernels_for_avx512_and_amx_equal_the_papers_equations_with_plain_functions_for_instructions(
    target: Target, sanitized_check: Callable[[Target], Path], tmp_path: Path
) -> None:
    """Not the instructions, but all that is done with them, on any CPU with AVX2, and sanitized."""
    if "avx2" not in native.runnable():
        pytest.skip("this CPU has no AVX2")
    if target.name in native.runnable():
        pytest.skip("the other tests ran them on this CPU itself")
    defines = tuple(flag for flag in target.flags if flag.startswith("-D"))
    here = replace(target, name="here", flags=("-mavx2", "-mfma", *defines, "-include", str(EMULATED)))
    objects = make_objects(compiler(), here, KERNELS_SANITIZED, tmp_path)
    check = make_check(compiler(), here, objects, CHECK_SANITIZED, tmp_path, sanitized_check(here))
    run(check, "4", "10", OMP_NUM_THREADS="2")


@pytest.mark.parametrize("target", ARM, ids=name_of)
def test_arms_kernels_equal_the_papers_equations_under_an_emulator(target: Target, tmp_path: Path) -> None:
    if platform.machine() in ("aarch64", "arm64"):
        pytest.skip("the other tests ran them on this CPU itself")
    required(CROSS_COMPILER, EMULATOR)
    objects = make_objects(CROSS_COMPILER, target, ["-O2"], tmp_path)
    check = make_check(CROSS_COMPILER, target, objects, ["-static"], tmp_path)
    assert run(EMULATOR, "-cpu", "max", check, "3", "12", OMP_NUM_THREADS="2").endswith("passed\n")
    for made in objects:
        assert shared_symbols(run("aarch64-linux-gnu-nm", "--defined-only", made)) == set()


def shared_symbols(listing: str) -> set[str]:
    """Names in nm's output that a linker may take for those of another object: weak ones, unique ones, and C++ names
    outside of an anonymous namespace, whatever became of them after linking.
    """
    shared = set()
    for line in listing.splitlines():
        *_, kind, name = line.split()
        anonymous = "_GLOBAL__N_" in name or name.startswith("_ZL") or name.startswith("_ZZL")
        if kind in "uVvWw" or (name.startswith("_Z") and not anonymous):
            shared.add(name)
    return shared


def test_no_code_of_one_target_can_be_run_in_anothers_place() -> None:
    """What is compiled for AVX-512 must not serve a machine without it because a linker merged two templates of std."""
    required("nm")
    made = build.library()
    assert shared_symbols(run("nm", "--defined-only", made)) == set()
    exported = {line.split()[-1] for line in run("nm", "-D", "--defined-only", made).splitlines()}
    kernels = {
        kernel for file in build.sources() for kernel in re.findall(r"^KERNEL\((\w+)\)", file.read_text(), re.MULTILINE)
    }
    ending = re.compile("|".join(f"_{target.dtype}_{target.name}$" for target in HERE))
    assert {ending.sub("", name) for name in exported} == kernels | {"experts_sort"}
    assert all(ending.search(name) for name in exported - {"experts_sort"})


def test_a_template_of_std_would_be_found(tmp_path: Path) -> None:
    required("nm")
    source = tmp_path / "trap.cpp"
    source.write_text("#include <vector>\nint f(std::vector<int>& v) { v.push_back(1); return v[0]; }\n")
    run(compiler(), "-O2", "-c", source, "-o", tmp_path / "trap.o")
    assert any("vector" in name for name in shared_symbols(run("nm", "--defined-only", tmp_path / "trap.o")))


def test_a_library_of_other_flags_has_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [build.library()]
    for target in HERE:
        other = [replace(one, flags=(*one.flags, "-ffast-math")) if one is target else one for one in HERE]
        names.append(build.library(other))
    names.append(build.library(HERE[1:]))
    for setting in ("COMMON", "THREADS", "LINK"):
        with monkeypatch.context() as patch:
            patch.setattr(build, setting, (*getattr(build, setting), "-funroll-loops"))
            names.append(build.library())
    assert len(set(names)) == len(names)
    assert build.library() == names[0]


@pytest.fixture
def small_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose one kernel is compiled in no time."""
    folder = tmp_path / "sources"
    folder.mkdir()
    shutil.copy(build.FOLDER / "sort.cpp", folder)
    shutil.copy(build.FOLDER / "simd.h", folder)
    (folder / "norm.cpp").write_text('#include "simd.h"\nKERNEL(norm_forward)(float* x) { *x = sum_of(splat(*x)); }\n')
    monkeypatch.setattr(build, "FOLDER", folder)
    return folder


def exported(library: Path) -> str:
    return run("nm", "-D", "--defined-only", library)


def test_a_compiler_that_lacks_an_instruction_set_leaves_its_kernels_out_and_says_so(
    small_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    required("nm")
    newest, others = HERE[-1], HERE[:-1]
    flag = next(flag for flag in newest.flags if not any(flag in other.flags for other in others))
    old = tmp_path / "old compiler"
    old.write_text(
        f'#!/bin/sh\ncase " $* " in *" {flag} "*) echo "unrecognized option {flag}" >&2; exit 1;; esac\n'
        f'exec {shutil.which(compiler())} "$@"\n'
    )
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    assert build.build() is None
    names = exported(build.library())
    assert all(f"norm_forward_{target.dtype}_{target.name}" in names for target in others)
    assert f"_{newest.name}\n" not in names
    assert re.search(rf"{re.escape(str(old))} is too old for the kernels of {newest.name}\b", capfd.readouterr().err)


def test_a_compiler_that_knows_nothing_and_none_at_all_leave_the_plain_path_and_a_sentence(
    small_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no such compiler"))
    assert build.build() == "there is no C++ compiler (c++) on this machine"
    monkeypatch.setenv("CXX", shutil.which("false") or "false")
    assert "knows none of the instruction sets" in (build.build() or "")
    assert not list(small_sources.glob("kernels-*"))
    native.forget()
    try:
        assert not any(native.chosen(dtype) for dtype in native.DTYPES)
        assert "not built" in (native.missing() or "")
    finally:
        native.forget()
