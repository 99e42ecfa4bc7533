"""Whoever looks at a terminal, a log or the output of a cluster sees how far work is and who does it."""

import io
import sys

import pytest

from motley import progress
from motley.progress import BENEATH_SECONDS, PLAIN_SECONDS, Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that progress goes by; a test sets it."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_the_picture_beneath_comes_once_a_minute_and_at_the_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
):
    lines, drawn = 0, 0
    with Progress("training", total=100, unit="tokens") as bar:
        bar.beneath(lambda: "[cyan]who[/] does what")
        for _ in range(30):
            clock[0] += PLAIN_SECONDS / 2
            bar.advance(1)
            said = capsys.readouterr().err
            lines, drawn = lines + said.count("training:"), drawn + said.count("who does what\n")
    assert (lines, drawn) == (15, 1 + int(14 * PLAIN_SECONDS / BENEATH_SECONDS))
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("training:  30 %  30 tokens")
    assert said[1:] == ["who does what"]


def test_where_nothing_was_done_nothing_is_beneath(clock: list[float], capsys: pytest.CaptureFixture[str]):
    with Progress("training", total=100, unit="tokens", done=100) as bar:
        bar.beneath(lambda: "who does what")
    assert "who" not in capsys.readouterr().err


def test_one_of_many_workers_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]):
    with Progress("training", total=100, unit="tokens", shown=False) as bar:
        bar.beneath(lambda: "who does what")
        clock[0] += 100
        bar.advance(1)
    assert capsys.readouterr().err == ""


def test_in_a_terminal_the_picture_stays_beneath_the_bar(monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with Progress("training", total=100, unit="tokens") as bar:
        bar.beneath(lambda: "who does what")
        bar.advance(1)
    assert "who does what" in screen.getvalue()
