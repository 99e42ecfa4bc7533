"""Two processes never work in one run folder, and one that was killed leaves nothing in the way."""

import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from motley.demo.demo import DemoConfig, demo
from motley.errors import InputError
from motley.train import run_folder as run
from motley.train.config import PretrainConfig, SftConfig
from motley.train.pretrain import pretrain
from motley.train.run_folder import claimed
from motley.train.sft import sft

HOLD = """
import sys, time
from pathlib import Path
from motley.train.run_folder import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_that_another_process_works_in_is_left_alone_until_it_is_killed(tmp_path: Path) -> None:
    unfinished = tmp_path / "data.writing-12345678"
    unfinished.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for start in (
            lambda: pretrain(PretrainConfig(out=tmp_path)),
            lambda: sft(SftConfig(out=tmp_path)),
            lambda: demo(DemoConfig(out=tmp_path, serve=False)),
        ):
            with pytest.raises(InputError, match=f"another process is at work in {tmp_path};"):
                start()
        assert unfinished.is_dir()
        other.kill()
    with claimed(tmp_path):
        pass


def test_a_folder_is_let_go_after_a_failure(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match="nowhere is not a folder"):
            sft(SftConfig(out=tmp_path / "run", model=tmp_path / "nowhere"))


@pytest.mark.parametrize("missing", ["module", "on this file system"])
def test_where_files_cannot_be_locked_that_is_said(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if missing == "module":
        monkeypatch.setattr(run, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", refuse)
    with claimed(tmp_path):
        pass
    assert f"{tmp_path} cannot be locked" in capsys.readouterr().err
