"""Files that are complete or absent: write to a temporary name, fsync, rename."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from motley.errors import InputError

TEMPORARY_MARK = ".writing-"  # in the name of everything that is not whole yet
GIT_LFS = "version https://git-lfs"  # so begins what git leaves in place of a large file


def temporary_name(path: Path) -> Path:
    """A name beside `path` (so that renaming never crosses a file system) that no reader looks at."""
    return path.with_name(f"{path.name}{TEMPORARY_MARK}{uuid.uuid4().hex[:8]}")


def fsync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; `path` holds the whole content afterwards, or is untouched."""
    temporary = temporary_name(path)
    with _failure_to_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            fsync(temporary)
            os.replace(temporary, path)
            fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; afterwards it is `path` (an older `path` is replaced), or nothing is."""
    temporary = temporary_name(path)
    with _failure_to_write(path):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    fsync(Path(folder, name))
                fsync(Path(folder))
            if path.exists():
                old = temporary_name(path)
                os.replace(path, old)
                os.replace(temporary, path)
                shutil.rmtree(old)
            else:
                os.replace(temporary, path)
            fsync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _failure_to_write(path: Path) -> Iterator[None]:
    """Says what a user can do about it."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"could not write {path}: {error.strerror or error}; free some space or choose another place"
        ) from error


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed writer left behind in `folder`."""
    for leftover in folder.glob(f"*{TEMPORARY_MARK}*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises InputError naming the file (and line) if it is missing, a git-lfs pointer or not JSON."""
    try:
        text = path.read_text(encoding="utf-8")
        values = None if text.startswith(GIT_LFS) else json.loads(text)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if text.startswith(GIT_LFS):
        raise InputError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in that repository")
    return values
