"""Every benchmark can be asked for help, parses its settings, and promises how long --quick takes."""

import argparse
import ast
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = [
    file.stem
    for file in sorted(BENCHMARKS.glob("*.py"))
    if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(file.read_text()).body)
]
NEEDED = {
    "fit_frameworks": ["--vtrain", "rows.csv"],
    "islands": ["loss"],
    "narrow": ["moments"],
    "plan_accuracy": ["--vtrain", "rows.csv"],
}
PROMISE = re.compile(r"(within|ends within) (50 seconds|two minutes|three minutes)")


class Parsed(Exception):
    """Settings were read; what would follow takes minutes."""


def parsed(script: str, words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What a script's main makes of its command line."""
    parse = argparse.ArgumentParser.parse_args
    found: list[argparse.Namespace] = []

    def parse_only(self: argparse.ArgumentParser, *arguments: object) -> argparse.Namespace:
        found.append(parse(self, *arguments))  # pyright: ignore[reportArgumentType, reportCallIssue]
        raise Parsed

    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    with pytest.raises(Parsed):
        module.main()
    return found[0]


def test_there_are_benchmarks_to_try() -> None:
    assert {"train_throughput", "thrift", "horizon", "memory", "scaling", "faults"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_parses_its_defaults_and_a_quick_look(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = NEEDED.get(script, [])
    assert parsed(script, needed, monkeypatch).quick is False
    monkeypatch.undo()
    assert parsed(script, [*needed, "--quick"], monkeypatch).quick is True


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_says_how_long_a_quick_look_takes(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--quick" in said
    assert PROMISE.search(said), said


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_quick_look_has_a_budget_and_is_kept_to_it(script: str) -> None:
    """As long as `kept(` stands around its work, nothing that hangs outlasts the promise."""
    text = (BENCHMARKS / f"{script}.py").read_text(encoding="utf-8")
    assert re.search(r"\bkept\(", text), "no piece of a benchmark may outlast what --quick promises"
