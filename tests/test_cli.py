"""The command line: every command says what it does, refuses in one sentence, and reports as JSON where it reports."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from motley import __version__
from motley.cli import COMMANDS, find, main

SCRIPT = Path(sys.executable).with_name("motley")


Ran = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def motley(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ran:
    """motley(*words): the command in this process, in a folder of its own: what it said, and its exit status."""
    monkeypatch.chdir(tmp_path)

    def ran(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = [str(argument) for argument in arguments]
        try:
            status = main(words)
        except SystemExit as left:
            status = int(left.code or 0)
        said = capfd.readouterr()
        return subprocess.CompletedProcess(words, status, said.out, said.err)

    return ran


def test_python_m_motley_is_motley(motley: Ran) -> None:
    one = subprocess.run([sys.executable, "-m", "motley"], capture_output=True, text=True)
    other = subprocess.run([str(SCRIPT)], capture_output=True, text=True)
    assert (one.stdout, one.stderr, one.returncode) == (other.stdout, other.stderr, other.returncode)
    assert all(name in one.stdout for name in COMMANDS)
    assert one.returncode == 2
    assert motley("--help").returncode == 0
    assert motley("--version").stdout.strip() == __version__


def test_an_unknown_command_is_named_with_those_there_are(motley: Ran) -> None:
    done = motley("fly")
    assert done.returncode == 2
    assert "no command 'fly'" in done.stderr
    assert "pretrain" in done.stderr


def test_a_group_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status in ((["fleet"], 2), (["fleet", "--help"], 0), (["fleet", "-h"], 0)):
        assert main(arguments) == status
        said = capsys.readouterr()
        assert [name for name in COMMANDS if f"  {name} " in said.out] == ["fleet probe", "fleet show", "fleet chips"]
        assert said.err == ""
    assert main(["fleet", "fly"]) == 2
    assert "choose one of fleet probe, fleet show, fleet chips" in capsys.readouterr().err


def test_a_command_that_is_a_group_too_names_the_commands_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["plan", "--help"])
    assert left.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "motley plan describe, motley plan evaluate, motley plan simulate" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists_and_explains_itself(name: str, motley: Ran) -> None:
    command = COMMANDS[name]
    for path in (command.function, command.config, command.report):
        assert path is None or callable(find(path))
    done = motley(*name.split(), "--help")
    assert done.returncode == 0
    assert ("--json" in done.stdout) == (command.report is not None)


def test_a_wrong_option_is_status_2(motley: Ran) -> None:
    done = motley("data", "--no-such-option", "3")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "nowhere"], "nowhere is not a folder"),
        (["eval", ".", "--count", "0"], "--count is 0"),
        (["tasks", "--count", "0"], "--count is 0"),
        (["export", "nowhere", "out"], "nowhere is not a folder"),
        (["report", "nowhere"], "nowhere"),
        (["data", "--data", "nowhere.txt"], "nowhere.txt does not exist"),
        (["tasks", "--families", "chess"], "no family of problems is called chess"),
        (["pretrain", "--steps", "0"], "--steps is 0"),
        (["sft", "--model", "nowhere"], "nowhere is not a folder"),
        (["demo", "--minutes", "-1"], "--minutes is -1"),
        (["demo", "--data", "nowhere.txt"], "nowhere.txt does not exist"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_2(arguments: list[str], said: str, motley: Ran) -> None:
    done = motley(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr
    assert done.stderr.startswith(f"motley {arguments[0]}: ")
    assert done.stdout == ""


def test_reports_are_one_json_object(motley: Ran, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a few words again and again " * 200)
    tasks = motley("tasks", "--count", 20, "--out", "tasks.jsonl", "--json")
    assert json.loads(tasks.stdout)["written"] == len((tmp_path / "tasks.jsonl").read_text().splitlines())
    data = motley("data", "--data", "text.txt", "--vocab-size", 300, "--out", "data", "--json")
    assert json.loads(data.stdout)["folder"] == "data"
    again = motley("data", "--data", "text.txt", "--vocab-size", 300, "--out", "data")
    assert "tokens" in again.stdout
    fleet = motley("fleet", "probe", "--seconds", "0.1", "--json")
    assert json.loads(fleet.stdout)["machines"][0]["device"]


def test_the_demo_says_its_result_before_it_serves_and_with_json_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = {"report": "runs/demo/report.html", "model": "runs/demo/export"}
    monkeypatch.setattr("motley.demo.demo.demo", lambda _: result)
    monkeypatch.setattr("motley.serve.app.serve", lambda config, other_ports: print(f"talk to {config.model}"))
    assert main(["demo", "--out", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert main(["demo", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [f"talk to {tmp_path}/export"]
    assert main(["demo", "--out", str(tmp_path), "--no-serve"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_failure_of_the_system_is_one_line_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").mkdir()  # where a run keeps a file
    (tmp_path / "text.txt").write_text("\n".join(f"line {n} of the text" for n in range(3000)))
    assert main(["pretrain", "--data", str(tmp_path / "text.txt"), "--steps", "1", "--out", str(tmp_path)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("motley pretrain: ")
    assert "config.json" in last


def test_a_reader_that_goes_away_is_no_error_message() -> None:
    command = f"{sys.executable} -m motley --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


def test_every_command_that_the_documents_name_exists() -> None:
    root = Path(__file__).parents[1]
    named = 0
    for file in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        text = file.read_text(encoding="utf-8")
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        lines = [line for block in blocks for line in block.splitlines() if line.startswith("motley ")]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        lines += re.findall(r"`(motley [a-z][^`]*)`", prose)
        for line in lines:
            words = line.split()
            assert words[1] in COMMANDS or " ".join(words[1:3]) in COMMANDS or words[1].startswith("-"), (
                f"{file.name} names a command that does not exist: {line}"
            )
            named += 1
    assert named > 20
