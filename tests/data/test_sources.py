import gzip
import io
import json
import os
import random
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard

from motley.data.conversation import Message
from motley.data.sources import Document, fingerprint_files, iter_documents, list_files, read_conversations
from motley.errors import InputError

TEXT = "First line.\nZweite Zeile, größer: 你好 🎉\n"
OTHER = "def f(x):\n    return x\n"
QUESTION = {"role": "user", "content": "1 + 1?"}
ANSWER = {"role": "assistant", "content": "2", "reasoning_content": "one and one"}


def jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(**columns: list) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def texts(*paths: Path | str, **options: int) -> list[str]:
    return [document.text for document in iter_documents([str(path) for path in paths], **options)]


@pytest.mark.parametrize("compression", PACKED)
@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".txt", TEXT.encode()),
        (".md", b"\xef\xbb\xbf" + TEXT.encode()),  # a byte order mark is no text
        (".py", TEXT.encode()),
        (".jsonl", jsonl({"text": TEXT}) + b"\n  \n"),
        (".parquet", table(text=[TEXT], other=[1])),
    ],
)
def test_every_kind_is_read_plain_and_compressed(tmp_path, suffix: str, content: bytes, compression: str) -> None:
    file = tmp_path / f"corpus{suffix}{compression}"
    file.write_bytes(PACKED[compression](content))
    assert texts(file) == [TEXT]


def test_compressed_members_behind_each_other_are_one_file(tmp_path) -> None:
    for compression in (".gz", ".zst"):
        pack = PACKED[compression]
        (file := tmp_path / f"a.txt{compression}").write_bytes(pack(TEXT.encode()) + pack(OTHER.encode()))
        assert texts(file) == [TEXT + OTHER]


def test_folders_are_read_recursively_in_sorted_order(tmp_path) -> None:
    for name in ("b/z.txt", "b/a.md", "a.txt", "c.py", ".hidden/x.txt", "b/.x.txt", "b/picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert texts(tmp_path) == ["a.txt", "c.py", "b/a.md", "b/z.txt"]
    assert texts(tmp_path / "c.py", tmp_path / "b") == ["c.py", "b/a.md", "b/z.txt"]
    assert [file.name for file in list_files([tmp_path])] == ["a.txt", "c.py", "a.md", "z.txt"]


def test_linked_folders_are_read_once_each(tmp_path) -> None:
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for file in (corpus / "a.txt", elsewhere / "b.txt", elsewhere / "deep" / "c.txt"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)
    (corpus / "linked").symlink_to(elsewhere)
    (corpus / "linked again").symlink_to(elsewhere)
    (elsewhere / "deep" / "back").symlink_to(corpus)  # circles
    (elsewhere / "deep" / "up").symlink_to(tmp_path)
    assert texts(corpus) == ["a.txt", "b.txt", "c.txt"]
    (tmp_path / "all").symlink_to(corpus)
    assert texts(tmp_path / "all") == ["a.txt", "b.txt", "c.txt"]


def test_a_name_that_is_not_utf8_is_refused(tmp_path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.mkdir(folder)
    Path(folder, "a.txt").write_text("x")
    with pytest.raises(InputError, match=r"caf\\xe9' is not UTF-8; rename"):
        texts(folder)


@pytest.mark.parametrize("source", ["hf:", "hf::train"])
def test_a_hub_dataset_without_a_name_is_refused(source: str) -> None:
    with pytest.raises(InputError, match=f"^{source} names no dataset; write hf:NAME"):
        texts(source)


def test_another_input_has_another_fingerprint(tmp_path) -> None:
    (tmp_path / "data").mkdir()
    (file := tmp_path / "data" / "train.jsonl").write_bytes(jsonl({"text": "x"}))
    names = ["hf:some/name", "hf:other/name", f"hf:{tmp_path}", str(tmp_path)]
    before = [fingerprint_files([name]) for name in names]
    assert len({*before}) == len(names)
    assert [fingerprint_files([name]) for name in names] == before
    file.write_bytes(jsonl({"text": "longer"}))
    changed = [fingerprint_files([name]) != old for name, old in zip(names, before, strict=True)]
    assert changed == [False, False, True, True]


def test_rows_name_their_place(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "x"}) + b"\n" + jsonl({"text": "y"}))
    (tmp_path / "b.parquet").write_bytes(table(text=["z"]))
    assert list(iter_documents([str(tmp_path)])) == [
        Document("x", f"{tmp_path}/a.jsonl:1"),
        Document("y", f"{tmp_path}/a.jsonl:3"),
        Document("z", f"{tmp_path}/b.parquet, row 1"),
    ]


GOOD = gzip.compress(random.Random(1).randbytes(5000).hex().encode())
GOOD_ZST = zstandard.compress(random.Random(1).randbytes(5000).hex().encode())


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", b"text\n\x89PNG\x00\x01", ":2 holds a zero byte"),
        ("a.txt", "text".encode("utf-16-le"), ":1 holds a zero byte"),
        ("a.txt", b"one\ntwo\nthree \xff\n", ":3 is not valid UTF-8 (byte 0xff)"),
        ("a.md.gz", GOOD[:-1000], " is not a whole gz file"),
        ("a.md.gz", GOOD[:2000] + b"\0\0\0" + GOOD[2003:], " is not a whole gz file"),
        ("a.md.gz", b"no gzip at all", " is not a whole gz file"),
        ("a.md.zst", GOOD_ZST[:-1], " is not a whole zst file"),
        ("a.md.zst", b"no zst at all", " is not a whole zst file"),
        ("a.jsonl", jsonl({"text": "x"}) + b"{broken\n", ":2 is not valid JSON"),
        ("a.jsonl", b"[" * 100_000, ":1 is not valid JSON"),
        ("a.jsonl", b'{"text": ' + b"1" * 10_000 + b"}", ":1 is not valid JSON"),
        ("a.jsonl", jsonl({"text": "x"}, ["y"]), ":2 is not a JSON object but a list"),
        ("a.jsonl", jsonl({"body": "x"}), ":1 has no text in its field `text`; its fields are body"),
        ("a.jsonl", jsonl({"text": 1}), ":1 has no text in its field `text`"),
        ("a.jsonl", b'{"text": "\\ud800"}', ":1 is not valid Unicode"),
        ("a.jsonl", jsonl({"text": "x"}) + b'\n{"text": "\xe9"}', ":3 is not valid UTF-8"),
        ("a.jsonl.gz", GOOD[:-1000], " is not a whole gz file"),
        ("a.parquet", b"PAR1 nothing", " is not a whole parquet file"),
        ("a.parquet", b"", " is not a whole parquet file"),
        ("a.parquet", table(text=["x" * 1000])[:-20], " is not a whole parquet file"),
        ("a.parquet.gz", gzip.compress(table(text=["x"]))[:-30], " is not a whole gz file"),
        ("a.parquet", table(body=["x"]), " has no column `text`; it has body"),
        ("a.parquet", table(text=["x", None]), ", row 2 has no text in its field `text`"),
        ("a.docx", b"", " is of an unknown kind"),
    ],
)
def test_bad_input_names_the_file_and_the_line(tmp_path, name: str, content: bytes, problem: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        texts(file)
    assert str(caught.value).startswith(f"{file}{problem}")
    assert "\n" not in str(caught.value)


def test_a_damaged_page_within_a_parquet_file_is_noticed(tmp_path) -> None:
    content = bytearray(table(text=[random.Random(n).randbytes(50).hex() for n in range(1000)]))
    content[200:2000] = bytes(1800)
    (file := tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(InputError, match=f"{file}"):
        texts(file)


def test_missing_and_empty_places_are_named(tmp_path) -> None:
    (tmp_path / "empty" / "below").mkdir(parents=True)
    with pytest.raises(InputError, match="empty holds no file that can be read"):
        texts(tmp_path / "empty")
    with pytest.raises(InputError, match=r"gone\.txt does not exist"):
        texts(tmp_path / "gone.txt")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        texts("/dev/null")
    with pytest.raises(InputError, match="no data was given"):
        texts()


@pytest.mark.parametrize("compression", PACKED)
def test_a_document_larger_than_the_limit_is_refused(tmp_path, compression: str) -> None:
    for name, content in {
        "a.txt": b"x" * 101,
        "a.jsonl": jsonl({"text": "x" * 101}),
        "a.parquet": table(text=["small", "x" * 101]),
    }.items():
        (file := tmp_path / f"{name}{compression}").write_bytes(PACKED[compression](content))
        with pytest.raises(InputError, match="larger than 100 bytes") as caught:
            texts(file, max_document_bytes=100)
        assert str(file) in str(caught.value)
    (file := tmp_path / f"b.txt{compression}").write_bytes(PACKED[compression](b"x" * 100))
    assert texts(file, max_document_bytes=100) == ["x" * 100]


def test_bombs_do_not_exhaust_the_memory(tmp_path) -> None:
    zeros = b" " * (1 << 20)
    packer = zstandard.ZstdCompressor().compressobj()
    zst = b"".join([*(packer.compress(zeros) for _ in range(1024)), packer.flush()])
    (tmp_path / "a.txt.zst").write_bytes(zst)
    (tmp_path / "a.jsonl.zst").write_bytes(zst)
    with gzip.GzipFile(tmp_path / "a.txt.gz", "wb", compresslevel=1) as bomb:
        for _ in range(1024):
            bomb.write(zeros)
    program = textwrap.dedent("""
        import resource, sys
        from motley.data.sources import iter_documents
        from motley.errors import InputError
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            list(iter_documents([sys.argv[1]], 32 << 20))
        except InputError as error:
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
    """)
    for name in ("a.txt.gz", "a.txt.zst", "a.jsonl.zst"):
        result = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / name)], capture_output=True, text=True, check=True
        )
        kibibytes, _, message = result.stdout.partition(" ")
        assert "larger than" in message
        assert int(kibibytes) < 200 << 10


def test_conversations_are_read_with_their_thinking(tmp_path) -> None:
    rows = [
        {"messages": [QUESTION, ANSWER]},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                QUESTION,
                {**ANSWER, "reasoning_content": None},
            ]
        },
    ]
    expected = [
        [Message("user", "1 + 1?"), Message("assistant", "2", "one and one")],
        [Message("system", "Be brief."), Message("user", "1 + 1?"), Message("assistant", "2")],
    ]
    (tmp_path / "a.jsonl").write_bytes(jsonl(*rows))
    assert list(read_conversations([tmp_path / "a.jsonl"])) == expected
    (tmp_path / "b.parquet").write_bytes(table(messages=[row["messages"] for row in rows]))
    (tmp_path / "readme.md").write_text("passed over")
    assert list(read_conversations([tmp_path])) == expected * 2


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "x"}, "no list in the field `messages`; its fields are text"),
        ({"messages": "x"}, "no list in the field `messages`"),
        ({"messages": ["x"]}, "message 1 is not an object"),
        ({"messages": [QUESTION, {"role": "assistant"}]}, "message 2 has no text in `content`"),
        ({"messages": [{"role": ["a"], "content": "x"}]}, "message 1 has the role"),
        ({"messages": [QUESTION, {**ANSWER, "reasoning_content": 1}]}, "the reasoning_content of message 2"),
        ({"messages": [QUESTION]}, "no assistant message"),
        ({"messages": []}, "no messages"),
    ],
)
def test_a_bad_conversation_names_its_line(tmp_path, row: dict, problem: str) -> None:
    (file := tmp_path / "a.jsonl").write_bytes(jsonl({"messages": [QUESTION, ANSWER]}, row))
    with pytest.raises(InputError, match=problem) as caught:
        list(read_conversations([file]))
    assert str(caught.value).startswith(f"{file}:2: ")


def test_text_alone_holds_no_conversations(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="no conversations"):
        list(read_conversations([tmp_path]))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out like a dataset of the hub: a card with two configs of parquet files."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "README.md").write_text(
        textwrap.dedent("""
            ---
            configs:
            - config_name: prose
              default: true
              data_files:
              - split: train
                path: prose/train-*.parquet
              - split: test
                path: prose/test.parquet
            - config_name: talk
              data_files:
              - split: train
                path: talk.parquet
            ---
            # A dataset
        """).lstrip()
    )
    (folder / "prose").mkdir()
    (folder / "prose" / "train-0.parquet").write_bytes(table(text=["one", "two"], id=[1, 2]))
    (folder / "prose" / "train-1.parquet").write_bytes(table(text=["three"], id=[3]))
    (folder / "prose" / "test.parquet").write_bytes(table(text=["not for training"], id=[4]))
    (folder / "talk.parquet").write_bytes(table(messages=[[QUESTION, ANSWER]]))
    return folder


def from_hub(code: str, *arguments: str) -> str:
    """Run in a process of its own without the network: the libraries ask for that when they are imported."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    return result.stdout.strip()


READ = """
import sys
from motley.data.sources import iter_documents, read_conversations
from motley.errors import InputError
for path in sys.argv[1:]:
    try:
        if path.endswith(":talk"):
            print([message.reasoning_content for one in read_conversations([path]) for message in one])
        else:
            found = iter_documents([path])
            print([(document.text, document.origin.rpartition(", ")[2]) for document in found])
    except InputError as error:
        print("InputError", str(error).replace("\\n", " "))
"""


def test_hub_datasets_are_streamed(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()  # without a card: files are found by their names
    (tmp_path / "data" / "train.jsonl.gz").write_bytes(gzip.compress(jsonl({"text": "four"}, {"text": "five"})))
    output = from_hub(READ, f"hf:{hub}", f"hf:{hub}:prose", f"hf:{hub}:talk", f"hf:{tmp_path}")
    rows = "[('one', 'row 1'), ('two', 'row 2'), ('three', 'row 3')]"
    assert output.splitlines() == [
        rows,
        rows,
        "[None, 'one and one']",
        "[('four', 'row 1'), ('five', 'row 2')]",
    ]


def test_a_hub_dataset_that_cannot_be_read_is_named(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl({"body": "x"}))
    output = from_hub(READ, f"hf:{hub}:nonsense", f"hf:{tmp_path}/gone", f"hf:{tmp_path}")
    configuration, folder, field = output.splitlines()
    assert configuration.startswith(f"InputError hf:{hub}:nonsense cannot be read")
    assert folder.startswith(f"InputError hf:{tmp_path}/gone cannot be read")
    assert "has no field `text`; its fields are body" in field


def test_what_reads_the_hub_is_installed_with_motley() -> None:
    """`make demo` installs no extra, and `motley demo --data hf:NAME` works after it."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert any(requirement.startswith("datasets") for requirement in project["dependencies"])
