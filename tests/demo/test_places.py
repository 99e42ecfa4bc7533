"""The demo on the computers that people have: one core, half of its time, 4 GB, a user who is not root, odd folders.

One tiny demo under all limits that this machine lets us set; what it does not let us set is skipped, and said.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest

HOME = "some body 某人"
QUOTA = 0.5  # of a core
MEMORY_BYTES = 4_000_000_000
GROUPS = Path("/sys/fs/cgroup")
NOBODY = 65534


@dataclass
class Limits:
    """Control groups that the demo is put into, and what could not be limited, with the reason."""

    groups: list[Path] = field(default_factory=list)
    other_user: bool = False
    missing: dict[str, str] = field(default_factory=dict)

    def make(self, name: str, controller: str, version_1: dict[str, int], version_2: dict[str, str]) -> None:
        """A group of this controller with these limits, of whichever version is mounted."""
        old = (GROUPS / controller).is_dir()
        group = (GROUPS / controller if old else GROUPS) / f"motley-test-{os.getpid()}"
        try:
            group.mkdir(exist_ok=True)
            for file, value in (version_1 if old else version_2).items():
                (group / file).write_text(str(value))
        except OSError as error:
            self.missing[name] = f"no control group of {controller} can be made here: {error}"
            with suppress(OSError):
                group.rmdir()
            return
        if group not in self.groups:
            self.groups.append(group)

    def enter(self) -> None:
        """In the process that is limited."""
        for group in self.groups:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        if self.other_user:
            become_nobody()

    def remove(self) -> None:
        for group in self.groups:
            with suppress(OSError):
                group.rmdir()


@dataclass(frozen=True)
class Done:
    folder: Path
    said: str
    missing: dict[str, str]

    @property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.folder / "journey.json").read_text())

    def needs(self, limit: str) -> None:
        if limit in self.missing:
            pytest.skip(f"NOT TRIED, {limit}: {self.missing[limit]}")


@pytest.fixture(scope="session")
def done(once: Any) -> Done:
    top = once("places", limited_demo)
    return Done(top / HOME / "the demo", *json.loads((top / "said.json").read_text()))


def limited_demo(top: Path) -> None:
    home = top / HOME
    home.mkdir()
    text = home / "my notes 笔记.txt"
    text.write_text("".join(f"Line {number} of some text, as plain as it can be.\n" for number in range(20_000)))
    limits = Limits()
    period = 100_000
    limits.make(
        "a quota of half a core", "cpu",
        {"cpu.cfs_period_us": period, "cpu.cfs_quota_us": int(QUOTA * period)},
        {"cpu.max": f"{int(QUOTA * period)} {period}"},
    )  # fmt: skip
    limits.make(
        "4 GB of memory", "memory", {"memory.limit_in_bytes": MEMORY_BYTES}, {"memory.max": str(MEMORY_BYTES)}
    )  # fmt: skip
    if os.geteuid() == 0:  # otherwise whoever runs the tests is such a user already
        for path in (*(path for path in top.parents if Path(gettempdir()) in path.parents), top, home, text):
            path.chmod(0o777)
        if (why_not := nobody_cannot()) is None:
            limits.other_user = True
        else:
            limits.missing["a user who is not root"] = why_not
    out = home / "the demo"
    try:
        process = subprocess.run(
            [sys.executable, "-m", "motley", "demo", "--out", str(out), "--data", str(text), "--minutes", "0.2",
             "--no-serve"],
            capture_output=True, text=True, preexec_fn=limits.enter, cwd=home, timeout=900,
            env={**os.environ, "HOME": str(home)},
        )  # fmt: skip
    finally:
        limits.remove()
    assert process.returncode == 0, process.stderr
    (top / "said.json").write_text(json.dumps([process.stderr, limits.missing]))


def become_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def nobody_cannot() -> str | None:
    """Why another user cannot run this Python; None if it can."""
    try:
        tried = subprocess.run([sys.executable, "-c", "import motley, torch"], preexec_fn=become_nobody, cwd="/",
                               capture_output=True, text=True)  # fmt: skip
    except OSError as error:
        return f"others cannot run {sys.executable}: {error}"
    return None if tried.returncode == 0 else f"others cannot run it: {tried.stderr.strip().splitlines()[-1]}"


def test_one_core_is_one_thread(done: Done) -> None:
    assert done.facts["machine"]["cores"] == done.facts["machine"]["threads"] == 1


def test_half_a_core_is_too_little_and_that_is_said_before_it_starts(done: Done) -> None:
    done.needs("a quota of half a core")
    said = done.said
    assert said.index("is too short for this machine") < said.index("Data and tokenizer")
    assert "The longer run: " in said


def test_four_gigabytes_are_enough(done: Done) -> None:
    done.needs("4 GB of memory")
    assert done.facts["machine"]["memory_bytes"] <= MEMORY_BYTES
    assert "of memory are free and the demo needs" not in done.said


def test_a_user_who_is_not_root_owns_what_it_made(done: Done) -> None:
    done.needs("a user who is not root")
    assert (done.folder / "report.html").stat().st_uid == (os.geteuid() or NOBODY)


def test_a_folder_with_blanks_and_chinese_letters_holds_a_model_that_answers(done: Done) -> None:
    asked = [sys.executable, "-m", "motley", "eval", str(done.folder), "--count", "2", "--max-tokens", "8"]
    answered = subprocess.run([*asked, "--families", "chain_sum"], capture_output=True, text=True)
    assert answered.returncode == 0, answered.stderr
    assert "of 2" in answered.stdout
