"""Read files, folders and hub datasets as documents, one at a time, in bounded memory.

A source is the path of a file, of a folder (read recursively in sorted order, through links, each folder once;
files of other kinds and hidden ones are passed over), or `hf:NAME[:CONFIG]`, a dataset streamed from the Hugging
Face hub or from a folder laid out like one.

    txt md py        one document each
    jsonl            one document per line, in the field `text`; conversations in the field `messages`
    parquet          one document per row, in the columns of the same names

each plain, or compressed as .gz or .zst. An invalid input raises an InputError that names the file, and the line or
row if there is one.
"""

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as parquet

from motley.data.conversation import Message, check_conversation
from motley.errors import InputError

DataError = InputError

DEFAULT_MAX_DOCUMENT_BYTES = 64 << 20
MAX_UNPACKED_PARQUET_BYTES = 4 << 30  # a compressed parquet file is unpacked to a temporary file first
TEXT_KINDS = (".txt", ".md", ".py")
ROW_KINDS = (".jsonl", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
HUB = "hf:"
PARQUET_BATCH_ROWS = 32
KINDS_IN_WORDS = "txt, md, py, jsonl and parquet, plain or as .gz or .zst"


@dataclass(frozen=True)
class Document:
    """A text and where it came from (file, and line or row), for messages."""

    text: str
    origin: str


def iter_documents(
    paths: Sequence[str | Path], max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES
) -> Iterator[Document]:
    """All documents of the sources, in order.

    Raises:
        InputError: nothing to read; a file is binary, not UTF-8, damaged, or lacks the field `text`; a
            document (for jsonl: a line) is larger than `max_document_bytes`.
    """
    for source in _sources(paths):
        if isinstance(source, Path) and _kind(source) in TEXT_KINDS:
            yield Document(_read_text(source, max_document_bytes), str(source))
            continue
        for origin, row in _rows(source, "text", max_document_bytes):
            text = row.get("text")
            if not isinstance(text, str):
                raise InputError(f"{origin} has no text in its field `text`; {_fields(row)}")
            yield Document(_checked(text, origin, max_document_bytes), origin)


def read_conversations(
    paths: Sequence[str | Path], max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES
) -> Iterator[list[Message]]:
    """All conversations of jsonl, parquet and hub rows; in folders, files of other kinds are passed over.

    The field `messages` holds a list of objects with `role`, `content` and, for the assistant, optionally
    `reasoning_content`.

    Raises:
        InputError: as `iter_documents`; or a conversation is malformed or has no assistant message.
    """
    sources = [s for s in _sources(paths) if isinstance(s, str) or _kind(s) in ROW_KINDS]
    if not sources:
        raise InputError(f"no conversations in {_listed(paths)}: they are read from jsonl and parquet files")
    for source in sources:
        for origin, row in _rows(source, "messages", max_document_bytes):
            try:
                conversation = _conversation(row, max_document_bytes)
            except InputError as error:
                raise InputError(f"{origin}: {error}") from None
            yield conversation


def list_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files that would be read, in order; hub datasets are none.

    Raises:
        InputError: a path does not exist, is of an unknown kind, or is a folder without a readable file.
    """
    return [source for source in _sources(paths) if isinstance(source, Path)]


def fingerprint_files(paths: Sequence[str | Path]) -> str:
    """A hash over names, sizes and modification times of all files; inputs with different hashes differ.

    Of a dataset on the hub only the name is hashed: changes there are not detected.
    """
    digest = hashlib.sha256()
    for source in _sources(paths):
        if isinstance(source, Path):
            files = [source]
        else:
            digest.update(f"{source}\n".encode())
            folder = Path(source.removeprefix(HUB).partition(":")[0])
            files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
        for file in files:
            status = file.stat()
            digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _sources(paths: Sequence[str | Path]) -> list[Path | str]:
    found: list[Path | str] = []
    for path in paths:
        if any("\udc80" <= character <= "\udcff" for character in str(path)):  # Python's stand-ins for such bytes
            raise InputError(f"the name {os.fsencode(path)!r} is not UTF-8; rename the file or folder")
        if str(path).startswith(HUB):
            if not str(path).removeprefix(HUB).partition(":")[0]:
                raise InputError(f"{path} names no dataset; write hf:NAME or hf:NAME:CONFIG")
            found.append(str(path))
        elif Path(path).is_dir():
            found += _in_folder(Path(path))
        elif not Path(path).exists():
            raise InputError(f"{path} does not exist")
        elif not Path(path).is_file():
            raise InputError(f"{path} is neither a file nor a folder")
        elif _kind(Path(path)) not in TEXT_KINDS + ROW_KINDS:
            raise InputError(f"{path} is of an unknown kind; what can be read: {KINDS_IN_WORDS}")
        else:
            found.append(Path(path))
    if not found:
        raise InputError("no data was given; name files, folders or hf:NAME")
    return found


def _in_folder(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error

    found, visited = [], set(folder.resolve().parents)  # a link to one of these would lead in a circle
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := Path(parent).resolve()) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = (Path(parent, name) for name in sorted(names) if not name.startswith("."))
        found += [file for file in files if _kind(file) in TEXT_KINDS + ROW_KINDS and file.is_file()]
    if not found:
        raise InputError(f"{folder} holds no file that can be read; what can be: {KINDS_IN_WORDS}")
    return found


def _kind(file: Path) -> str:
    """The suffix beneath a compression: ".jsonl" for `a.jsonl.zst`."""
    name = file.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return Path(name).suffix


# ---------------------------------------------------------------------------------------------- files


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """The unpacked bytes of a file; every failure to read them becomes an InputError."""
    compression = COMPRESSIONS.get(file.suffix.lower())
    try:
        if compression is None:
            with file.open("rb") as stream:
                yield stream
        else:  # Arrow's stream reads several members in a row, and fails at a truncated one
            with pa.input_stream(str(file), compression=compression) as packed:
                yield io.BufferedReader(cast(Any, packed), buffer_size=1 << 20)
    except OSError as error:
        what = f"is not a whole {file.suffix[1:]} file" if compression else "cannot be read"
        raise InputError(f"{file} {what}: {error.strerror or error}") from error


def _read_text(file: Path, limit: int) -> str:
    with _opened(file) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise InputError(_too_large(str(file), limit))
    if b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise InputError(f"{file}:{line} holds a zero byte: this is a binary file or UTF-16, not UTF-8 text")
    return _decoded(content, file, first_line=1)


def _decoded(content: bytes, file: Path, first_line: int) -> str:
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise InputError(
            f"{file}:{line} is not valid UTF-8 (byte 0x{content[error.start]:02x}): "
            "convert the file, or leave it out if it is binary"
        ) from None


def _rows(source: Path | str, column: str, limit: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(origin, row) of a jsonl or parquet file or a hub dataset; of the latter two only `column` is read."""
    if isinstance(source, str):
        return _hub_rows(source, column)
    return _jsonl_rows(source, limit) if _kind(source) == ".jsonl" else _parquet_rows(source, column, limit)


def _jsonl_rows(file: Path, limit: int) -> Iterator[tuple[str, dict[str, Any]]]:
    with _opened(file) as stream:
        number = 0
        while line := stream.readline(limit + 1):
            number += 1
            origin = f"{file}:{number}"
            if len(line) > limit:
                raise InputError(_too_large(origin, limit))
            text = _decoded(line, file, first_line=number)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise InputError(f"{origin} is not valid JSON: {error.msg} (character {error.pos + 1})") from None
            except (ValueError, RecursionError) as error:
                raise InputError(f"{origin} is not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise InputError(f"{origin} is not a JSON object but a {type(row).__name__}")
            yield origin, row


def _parquet_rows(file: Path, column: str, limit: int) -> Iterator[tuple[str, dict[str, Any]]]:
    with _parquet_file(file) as table:
        if column not in table.schema_arrow.names:
            raise InputError(f"{file} has no column `{column}`; it has {', '.join(table.schema_arrow.names)}")
        number = 0
        for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[column], use_threads=False):
            if batch.nbytes > limit * PARQUET_BATCH_ROWS:
                raise InputError(_too_large(f"{file}, one of the rows from {number + 1}", limit))
            for value in batch.column(0):
                number += 1
                yield f"{file}, row {number}", {column: value.as_py()}


@contextmanager
def _parquet_file(file: Path) -> Iterator[parquet.ParquetFile]:
    with tempfile.TemporaryFile() as unpacked:
        if file.suffix.lower() in COMPRESSIONS:
            _unpack(file, unpacked)
        try:
            source = unpacked if unpacked.tell() else str(file)
            with parquet.ParquetFile(source) as table:
                yield table
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise InputError(f"{file} is not a whole parquet file: {error}") from error


def _unpack(file: Path, unpacked: IO[bytes]) -> None:
    with _opened(file) as stream:
        while chunk := stream.read(1 << 20):
            if unpacked.tell() > MAX_UNPACKED_PARQUET_BYTES:
                raise InputError(_too_large(str(file), MAX_UNPACKED_PARQUET_BYTES))
            try:
                unpacked.write(chunk)
                unpacked.flush()
            except OSError as error:
                raise InputError(f"{file} cannot be unpacked to {tempfile.gettempdir()}: {error.strerror}") from error


# ---------------------------------------------------------------------------------------------- hub


def _hub_rows(source: str, column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of the split `train`, streamed: nothing is downloaded before it is needed."""
    import datasets  # here, since it takes seconds and most data is not from the hub

    name, _, config = source.removeprefix(HUB).partition(":")
    number = 0
    try:
        rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            origin = f"{source}, row {number}"
            if column not in row:
                raise InputError(f"{origin} has no field `{column}`; {_fields(row)}")
            yield origin, {column: row[column]}
    except InputError:
        raise
    except Exception as error:  # a dozen libraries beneath it, each with errors of its own
        where = f"{source} after row {number}" if number else source
        raise InputError(f"{where} cannot be read: {error}") from error


# ---------------------------------------------------------------------------------------------- content


def _conversation(row: dict[str, Any], limit: int) -> list[Message]:
    entries = row.get("messages")
    if not isinstance(entries, list):
        raise InputError(f"there is no list in the field `messages`; {_fields(row)}")
    messages = []
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise InputError(f"message {number} is not an object with role and content")
        role, content, reasoning = entry.get("role"), entry.get("content"), entry.get("reasoning_content")
        if not isinstance(content, str):
            raise InputError(f"message {number} has no text in `content`")
        if reasoning is not None and not isinstance(reasoning, str):
            raise InputError(f"the reasoning_content of message {number} is not text")
        for text in (content, reasoning or ""):
            _checked(text, f"message {number}", limit)
        messages.append(Message(cast(Any, role), content, reasoning))
    check_conversation(messages)
    if not any(message.role == "assistant" for message in messages):
        raise InputError("the conversation has no assistant message, so there is nothing to learn from it")
    return messages


def _checked(text: str, origin: str, limit: int) -> str:
    """The text itself, if it is Unicode and not too large."""
    try:
        size = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        raise InputError(f"{origin} is not valid Unicode: half a surrogate pair at character {error.start}") from None
    if size > limit:
        raise InputError(_too_large(origin, limit))
    return text


def _fields(row: dict[str, Any]) -> str:
    return f"its fields are {', '.join(map(str, list(row)[:20])) or 'none'}"


def _too_large(origin: str, limit: int) -> str:
    return f"{origin} is larger than {limit:,} bytes; divide it, or raise max_document_bytes"


def _listed(paths: Sequence[str | Path]) -> str:
    return ", ".join(map(str, paths)) or "nothing"
