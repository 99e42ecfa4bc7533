"""A strict look at a safetensors file before anything in it is believed."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from motley.errors import InputError
from motley.files import GIT_LFS

LONGEST_HEADER = 100 << 20  # bytes, the format's own limit
MOST_TENSORS = 2_000_000
BYTES_PER_VALUE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I64": 8, "I32": 4, "I16": 2,
    "I8": 1, "U8": 1, "U16": 2, "U32": 4, "U64": 8, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor as its file describes it."""

    dtype: str
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of `file`, after checking that they tile its data exactly.

    Raises InputError naming the file (and tensor): missing, a git-lfs pointer, truncated, trailing bytes, a header
    that is no JSON or too large, offsets that overlap or leave the file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            first = stream.read(8)
            if first + stream.read(len(GIT_LFS) - 8) == GIT_LFS.encode():
                raise InputError(f"{file} is a git-lfs pointer, not the weights: run `git lfs pull` in that repository")
            stream.seek(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else size + 1
            if length > LONGEST_HEADER and length <= size:
                raise InputError(
                    f"{file}: its header claims {length:,} bytes, more than the {LONGEST_HEADER:,} allowed"
                )
            if length > size - 8:
                raise InputError(f"{file} is truncated or no safetensors file: {size:,} bytes cannot hold its header")
            raw = stream.read(length)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise InputError(f"{file}: its header is not valid JSON; the file is damaged, fetch it again") from None
    if not isinstance(header, dict):
        raise InputError(f"{file}: its header is not a table of tensors; the file is damaged, fetch it again")
    header.pop("__metadata__", None)
    if len(header) > MOST_TENSORS:
        raise InputError(f"{file}: its header names {len(header):,} tensors, more than the {MOST_TENSORS:,} allowed")
    return _checked(file, header, size - 8 - length)


def _checked(file: Path, header: dict, data_bytes: int) -> dict[str, Entry]:
    spans, entries = [], {}
    for name, described in header.items():
        try:
            dtype, shape = described["dtype"], tuple(described["shape"])
            start, end = described["data_offsets"]
            sound = all(type(value) is int and value >= 0 for value in (*shape, start, end))
            expected = math.prod(shape) * BYTES_PER_VALUE[dtype] if sound else -1
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{file}: tensor {name} is described wrongly or has an unknown dtype") from None
        if expected != end - start:
            raise InputError(
                f"{file}: tensor {name} has shape {list(shape)} of {dtype} but {end - start} bytes of data"
            )
        spans.append((start, end, name))
        entries[name] = Entry(dtype, shape)
    at = 0
    for start, end, name in sorted(spans):
        if start != at:
            raise InputError(f"{file}: tensor {name} begins at byte {start} of the data where byte {at} was expected")
        at = end
    if at > data_bytes:
        raise InputError(
            f"{file} is truncated: tensor {max(spans)[2]} needs {at:,} bytes of data, "
            f"the file holds {data_bytes:,}; fetch it again"
        )
    if at < data_bytes:
        raise InputError(f"{file} has {data_bytes - at:,} trailing bytes after its last tensor; fetch it again")
    return entries
