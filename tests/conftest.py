"""What the whole suite shares: where the browser is, and a loud word where it is not."""

import os
import shutil
from collections.abc import Iterator

import pytest
import torch

from motley.model import native
from motley.model.native import build

if not torch.cuda.is_available():  # read when Triton is imported: kernels for GPUs then run on the CPU, step by step
    os.environ["TRITON_INTERPRET"] = "1"

NO_BROWSER = "BROWSER TESTS DID NOT RUN: Chromium is absent"
NO_TOOLS = "KERNELS WERE NOT CHECKED"


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the machine's Chromium; a test that asks for it is skipped where there is none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip(f"{NO_BROWSER} (on Debian: apt install chromium)")
    return path


@pytest.fixture
def kernels() -> None:
    """Our own kernels for this CPU, built; a test that asks for them is skipped where they cannot be."""
    if not native.runnable():
        pytest.skip("there are no kernels for this CPU")
    if (why_not := build.build()) is not None:
        pytest.skip(f"the kernels are not built: {why_not}")
    native.forget()


@pytest.fixture(params=build.targets_of(build.machine()), ids=lambda target: target.name)
def dtype(request: pytest.FixtureRequest, kernels: None) -> Iterator[torch.dtype]:
    """The number format of one target of our kernels after the other, of those that this machine runs.

    Inside, no others are used.
    """
    target = request.param
    if target.name not in native.runnable():
        pytest.skip(f"this CPU does not run the kernels for {target.name}")
    with native.only(target.name):
        found = next(found for found, name in native.DTYPES.items() if name == target.dtype)
        assert native.chosen(found) == target.name
        yield found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.getreports("skipped")
    for title, words, packages in (
        ("browser", NO_BROWSER, "chromium"),
        ("kernels", NO_TOOLS, "g++-aarch64-linux-gnu qemu-user binutils"),
    ):
        count = sum(words in str(report.longrepr) for report in skipped)
        if count:
            terminalreporter.section(title, sep="!", red=True, bold=True)
            terminalreporter.line(f"{words} ({count} skipped; on Debian: apt-get install {packages})", red=True)
