import random
from pathlib import Path

import pytest

from motley.data.corpus import clean, standard_library_documents, standard_library_files
from motley.errors import InputError

LICENCE = "#!/usr/bin/env python3\n# Copyright 1999 by somebody.\n# Licensed under something.\n\n"


def filler(name: str, lines: int = 12_000) -> str:
    rng = random.Random(name)
    return "".join(f"{name}_{'abcdefghij'[rng.randrange(10)]} = call(something)\n" for _ in range(lines))


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small stand-in for the library's folder, with one file of each kind."""
    files = {
        "zebra.py": LICENCE + filler("zebra"),
        "asyncio/base.py": "# An explanation.\n" + filler("base"),
        "test/test_a.py": filler("test"),
        "unittest/test/test_b.py": filler("check"),
        "pydoc_data/topics.py": "topics = {'with': 'The with statement\\n', 'for': 'The for statement\\n'}\n",
        "encodings/cp1252.py": filler("table", 10),
        "encodings/idna.py": filler("idna", 10),
        "numbers_table.py": "table = [" + "12345, " * 1000 + "]\n",
        "site-packages/other.py": filler("other", 10),
        "lib2to3/old.py": "print 'old'\n",
        "test/badsyntax.py": "def (:\n",
        "test/data/input.py": "x\n",
        "_sysconfigdata__linux.py": "build = {}\n",
        ".hidden/x.py": "x\n",
        "__pycache__/x.py": "x\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nname = '\xe9'\n")
    return tmp_path


def test_modules_come_first_then_topics_and_tests_last(library: Path) -> None:
    assert [document.origin for document in standard_library_documents(library)] == [
        "asyncio/base.py",
        "encodings/idna.py",
        "pydoc_data/topics.py:with",
        "pydoc_data/topics.py:for",
        "zebra.py",
        "test/test_a.py",
        "unittest/test/test_b.py",
    ]


def test_licences_go_and_explanations_stay(library: Path) -> None:
    found = {document.origin: document.text for document in standard_library_documents(library)}
    assert found["zebra.py"].startswith("zebra_")
    assert found["asyncio/base.py"].startswith("# An explanation.\n")
    assert found["pydoc_data/topics.py:with"] == "The with statement\n"


def test_white_space_is_made_regular() -> None:
    assert clean("\n\na\t= 1  \r\n\n\n\n\n\nb\n\n") == "a       = 1\n\n\nb\n"


def test_a_stripped_library_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "only.py").write_text("x = 1\n")
    with pytest.raises(InputError, match=r"holds only 6 bytes of Python source.*--data"):
        standard_library_files(tmp_path)


def test_the_library_of_this_machine_is_a_corpus_of_many_megabytes() -> None:
    documents = list(standard_library_documents())
    assert sum(len(document.text) for document in documents) > 5_000_000
    assert len({document.origin for document in documents}) == len(documents)
    assert any(document.origin == "heapq.py" for document in documents)
    assert not any("\t" in document.text or " \n" in document.text for document in documents)
