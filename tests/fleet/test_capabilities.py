"""What a chip is does not hang on the name that it is sold under."""

from pathlib import Path

import pytest
import torch

from motley.fleet import capabilities as room
from motley.fleet.capabilities import capabilities

CPU = torch.device("cpu")
X86 = "vendor_id\t: AuthenticAMD\nmodel name\t: {name}\nflags\t\t: fpu sse4_2 avx f16c fma avx2 {more}\n\n"
ARM = "BogoMIPS\t: 50.00\nFeatures\t: fp asimd {more}\nCPU implementer\t: 0x41\n"


@pytest.fixture
def cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is said of a CPU of which the system says this."""

    def said(text: str) -> str:
        file = tmp_path / str(len(list(tmp_path.iterdir())))
        file.write_text(text)
        monkeypatch.setattr(room, "CPU_INFORMATION", file)
        return capabilities(CPU)

    return said


def test_two_cpus_of_one_name_and_different_instructions_are_of_different_kinds(cpu):
    old = cpu(X86.format(name="AMD EPYC", more=""))
    new = cpu(X86.format(name="AMD EPYC", more="avx512f avx512_bf16"))
    assert old != new
    assert "avx512_bf16" in new


def test_two_cpus_of_different_names_and_equal_instructions_are_of_one_kind(cpu):
    assert cpu(X86.format(name="AMD EPYC 7R13", more="")) == cpu(X86.format(name="AMD Ryzen 5 5600", more="clzero"))


def test_the_vendor_counts_because_math_libraries_go_by_it(cpu):
    amd = X86.format(name="a", more="")
    assert cpu(amd) != cpu(amd.replace("AuthenticAMD", "GenuineIntel"))


def test_arms_are_told_apart(cpu):
    assert cpu(ARM.format(more="asimddp")) != cpu(ARM.format(more="asimddp bf16 i8mm sve"))


def test_what_overrides_the_instructions_counts(cpu, monkeypatch: pytest.MonkeyPatch):
    before = cpu(X86.format(name="a", more=""))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert cpu(X86.format(name="a", more="")) != before


def test_a_system_that_says_nothing_still_has_a_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(room, "CPU_INFORMATION", tmp_path / "nothing")
    assert torch.__version__ in capabilities(CPU)


def test_kernels_and_builds_count():
    assert capabilities(CPU, "kernels one") != capabilities(CPU, "kernels two") != capabilities(CPU)
