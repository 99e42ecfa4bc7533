"""The Python standard library as a corpus: real code and docstrings, on every machine, under a free licence.

What is taken, in this order (each part sorted by path, so that only the Python version decides):

1. The library's modules. Their source is code, docstrings and comments by many careful hands.
2. The topics of Python's built-in help (`pydoc_data/topics.py`): the language reference as prose, one
   document each.
3. The library's own tests, which are most of the bytes: plain code, less explained, so they come last and a
   byte limit (`DataConfig.max_bytes`) cuts there.

What is left out, and why:

- `site-packages`, `dist-packages`: not the standard library; their licences differ and every machine has
  others.
- `encodings/*` but a few hand-written modules, and any file in which more than 15 % of the characters are
  digits or backslashes: generated tables that teach nothing.
- `lib2to3` and test data (folders named `data`, files named `bad*`): Python 2 or deliberately broken code.
- `_sysconfigdata*`: paths and flags of one machine, not of Python.
- Files that are not UTF-8, and hidden ones.

What is cleaned: the leading comment block if it is a licence, copyright or machine line (the same few texts
over and over), tabs to spaces, white space at line ends, more than two empty lines in a row.
"""

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from motley.data.sources import Document
from motley.errors import InputError

LEAST_BYTES = 1_000_000  # fewer are no corpus: the library is zipped, stripped or not installed
MOST_FILE_BYTES = 4_000_000
TABLE_SHARE = 0.15
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib2to3",
    "data",
    "lib-dynload",
    "turtledemo",
}
TESTS = {"test", "tests", "idle_test"}
HAND_WRITTEN_ENCODINGS = {"__init__.py", "idna.py", "punycode.py", "utf_8_sig.py", "uu_codec.py"}
TOPICS = Path("pydoc_data/topics.py")
BOILERPLATE = re.compile(r"copyright|licen[cs]e|^#!|coding[:=]", re.IGNORECASE | re.MULTILINE)


def standard_library_files(root: Path | None = None) -> list[Path]:
    """The files that are read: modules first, tests last; `root` defaults to this Python's library folder.

    Raises:
        InputError: the folder holds less than a megabyte of usable source.
    """
    root = Path(root or sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if path.is_file() and _wanted(path.relative_to(root))]
    files.sort(key=lambda path: (bool(TESTS & set(path.relative_to(root).parts)), path.relative_to(root).as_posix()))
    size = sum(path.stat().st_size for path in files)
    if size < LEAST_BYTES:
        raise InputError(
            f"{root} holds only {size:,} bytes of Python source, too little to learn from; "
            "give your own text with --data PATH"
        )
    return files


def standard_library_documents(root: Path | None = None) -> Iterator[Document]:
    """The cleaned documents; see the module's text for what is chosen and why.

    Raises:
        InputError: see `standard_library_files`; or a file cannot be read.
    """
    root = Path(root or sysconfig.get_paths()["stdlib"])
    for path in standard_library_files(root):
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue  # a handful of tests are deliberately written in other encodings
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        name = path.relative_to(root)
        if name == TOPICS:
            for topic, prose in _topics(text).items():
                yield Document(clean(prose), f"{name}:{topic}")
        elif not _is_table(text):
            yield Document(clean(_without_boilerplate(text)), name.as_posix())


def _wanted(name: Path) -> bool:
    if SKIPPED_FOLDERS & set(name.parts[:-1]) or any(part.startswith(".") for part in name.parts):
        return False
    if name.parts[0] == "encodings":
        return name.name in HAND_WRITTEN_ENCODINGS
    return not name.name.startswith(("_sysconfigdata", "bad"))


def _is_table(text: str) -> bool:
    if len(text) > MOST_FILE_BYTES:
        return True
    return sum(map(text.count, "0123456789\\")) > TABLE_SHARE * len(text)


def _topics(source: str) -> dict[str, str]:
    """The texts in `topics = {"name": "text", …}`."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    return {}


def _without_boilerplate(text: str) -> str:
    """Drop the comment block at the top if it speaks of copyright, licence, interpreter or encoding."""
    lines = text.split("\n")
    first = next((n for n, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    return "\n".join(lines[first:]) if BOILERPLATE.search("\n".join(lines[:first])) else text


def clean(text: str) -> str:
    """Spaces for tabs, no white space at line ends, at most two empty lines in a row, one at the end."""
    lines = (line.expandtabs().rstrip() for line in text.splitlines())
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip("\n") + "\n"
