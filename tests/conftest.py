"""What the whole suite shares: little data, runs and tokenizers, made once; where the browser is, and a loud word where
it is not.
"""

import fcntl
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commands import TINY_FILE, WORDS, command
from conversations import CONVERSATIONS
from spawned_ranks import run
from tiny_models import FEW

from motley.data.pack import DataConfig, prepare
from motley.data.tokenizer import Tokenizer, train_tokenizer
from motley.model import SIZES, experts, native
from motley.model.native import build

if not torch.cuda.is_available():  # read when Triton is imported: kernels for GPUs then run on the CPU, step by step
    os.environ["TRITON_INTERPRET"] = "1"

Once = Callable[[str, Callable[[Path], None]], Path]
NO_BROWSER = "BROWSER TESTS DID NOT RUN: Chromium is absent"
NO_TOOLS = "KERNELS WERE NOT CHECKED"


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """once(name, make): the folder of that name, which `make` filled, once for all processes of this test run."""
    base = tmp_path_factory.getbasetemp()
    top = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    top.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], None]) -> Path:
        with (top / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            folder, done = top / name, top / f"{name}.done"
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
            return folder

    return made


@pytest.fixture(scope="session")
def data(once: Once) -> Path:
    """Eight thousand words, prepared with a vocabulary of 300. Tests that change it copy it."""

    def make(folder: Path) -> None:
        words = random.Random(0).choices(WORDS, k=8000)
        lines = [" ".join(words[start : start + 40]) for start in range(0, len(words), 40)]
        text = folder / "text.jsonl"
        text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        prepare(DataConfig(data=(str(text),), vocab_size=300), folder / "prepared")

    return once("data", make) / "prepared"


@pytest.fixture(scope="session")
def shape() -> Path:
    """The file of a network of a few thousand parameters."""
    return TINY_FILE


@pytest.fixture(scope="session")
def alone(once: Once, data: Path, shape: Path) -> Path:
    """A run in fp32 of a single process that nobody disturbed. Not to be changed."""

    def make(folder: Path) -> None:
        done = run(command(folder / "run", data, shape, precision="fp32"))
        assert done.returncode == 0, done.stderr

    return once("alone", make) / "run"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([message.content for conversation in CONVERSATIONS for message in conversation], 300)


@pytest.fixture
def tiny_nano(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--model nano` is a model of a few thousand parameters here."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2}
    monkeypatch.setitem(SIZES, "nano", type(SIZES["nano"]).from_hf(SIZES["nano"].to_hf() | small))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every new number of an expert's rows costs a kernel's compilation."""
    monkeypatch.setattr(experts, "PAD", FEW)


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
