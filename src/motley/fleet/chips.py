"""The chip sheet as values: figures of data sheets for each chip, every cell with its source (`chips.yaml`)."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

from motley.errors import InputError

Precision = Literal["bf16", "fp16", "fp8", "fp32"]
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp16", "fp8", "fp32")
ESTIMATE = "E"
TERA, GIGA, GIB = 1e12, 1e9, 2**30
COMMON_WORDS = {  # in vendors' names; they distinguish no chips
    *("nvidia", "tesla", "geforce", "amd", "instinct", "intel", "huawei", "iluvatar", "google"),
    *("gpu", "oam", "hgx", "dgx", "nvlink", "hbm2", "hbm2e", "hbm3", "hbm3e"),
}
_NUMBERS = (*PRECISIONS, "sustained", "memory", "bandwidth", "link", "pair", "network", "node", "power", "price")


@dataclass(frozen=True)
class Chip:
    """One chip, in SI units.

    Attributes:
        flops: dense FLOP/s per number format with fp32 accumulation; formats without units are absent.
        sustained: share of `flops` that the largest matrix products reach.
        memory_bytes: its own memory.
        memory_bandwidth: bytes/s.
        link_bandwidth: bytes/s per direction to the chips of its node.
        pair_bandwidth: bytes/s between two bridged neighbours, where only pairs are bridged.
        node_network: bytes/s per direction and node to other nodes, as usually built.
        chips_per_node: as usually sold.
        peer_to_peer: whether chips of a node exchange directly (else through host memory, at half the rate).
        power_watts, price_per_hour: typical.
        cells: field → (text of the cell, key of its source).
    """

    name: str
    vendor: str
    kind: Literal["gpu", "cpu"]
    flops: Mapping[str, float]
    sustained: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float
    pair_bandwidth: float | None
    node_network: float
    chips_per_node: int
    peer_to_peer: bool
    power_watts: float
    price_per_hour: float
    note: str = ""
    aliases: tuple[str, ...] = ()
    cells: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def best_precision(self) -> str:
        """To train in: bf16 where the chip has it, else fp16, else fp32 (fp8 only on request)."""
        return next(name for name in ("bf16", "fp16", "fp32") if name in self.flops)

    def estimated(self) -> list[str]:
        return [name for name, (_, source) in self.cells.items() if source == ESTIMATE]


@cache
def _sheet() -> tuple[dict[str, Chip], dict[str, str]]:
    values = yaml.safe_load(files("motley.fleet").joinpath("chips.yaml").read_text("utf-8"))
    return {name: _chip(name, row) for name, row in values["chips"].items()}, values["sources"]


def chip_sheet() -> dict[str, Chip]:
    """Every chip of the sheet by name."""
    return _sheet()[0]


def chip_sources() -> dict[str, str]:
    """Key of a cell's source → what it means."""
    return _sheet()[1]


@cache
def find_chip(name: str) -> Chip:
    """The chip called `name`, as the sheet, drivers or people write it: `A100`, `NVIDIA A100-SXM4-80GB`, `h800 sxm`.

    Memory and form (SXM, PCIe) may be left out: then the usual one is meant, else the first of the sheet. Raises
    InputError offering the nearest names.
    """
    sheet, words = chip_sheet(), _words(name)
    known = {_words(alias): chip for chip in sheet.values() for alias in (chip.name, *chip.aliases)}
    if words in known:
        return known[words]
    usual = known.get(frozenset(word for word in words if not _is_form(word)))  # V100 means the one with 32 GB
    for chip in (*([usual] if usual else []), *sheet.values()):
        unsaid, unknown = _words(chip.name) - words, words - _words(chip.name)
        if all(map(_is_form, unsaid)) and all(_is_memory_of(chip, word) for word in unknown) and words - unknown:
            return chip
    plain = {alias.lower(): chip for chip in sheet.values() for alias in (chip.name, *chip.aliases)}
    near = difflib.get_close_matches(name.lower(), plain, n=4, cutoff=0.4)
    nearest = list(dict.fromkeys(plain[key].name for key in near)) or list(sheet)[:4]
    raise InputError(
        f"there is no chip {name!r} on the sheet; nearest: {', '.join(nearest)} (all: `motley fleet chips`)"
    )


def _words(name: str) -> frozenset[str]:
    """`NVIDIA A100-SXM4-80GB` → {a100, sxm, 80gb}: the words that distinguish chips."""
    text = re.sub(r"(\d+)[\s_-]*(?:gib|gb|g)\b", r" \1gb ", name.lower())
    text = re.sub(r"(\d)[\s_-]*ti\b", r"\1ti", text)
    text = re.sub(r"\bsxm\d", "sxm", text)
    return frozenset(re.findall(r"[a-z0-9]+", text)) - COMMON_WORDS


def _is_form(word: str) -> bool:
    return word in ("sxm", "pcie") or re.fullmatch(r"\d+gb", word) is not None


def _is_memory_of(chip: Chip, word: str) -> bool:
    """Whether `word` is the chip's memory as another counts it (192GB where the sheet has 180)."""
    found = re.fullmatch(r"(\d+)gb", word)
    return found is not None and abs(int(found[1]) * GIB / chip.memory_bytes - 1) < 0.1


def _chip(name: str, row: dict[str, Any]) -> Chip:
    cells = {key: _cell(name, key, row[key]) for key in _NUMBERS if key in row}
    number = {key: float(text) for key, (text, _) in cells.items() if text != "none"}
    return Chip(
        name=name,
        vendor=row["vendor"],
        kind=row.get("kind", "gpu"),
        flops={key: number[key] * TERA for key in PRECISIONS if key in number},
        sustained=number["sustained"],
        memory_bytes=number["memory"] * GIB,
        memory_bandwidth=number["bandwidth"] * GIGA,
        link_bandwidth=number["link"] * GIGA,
        pair_bandwidth=number["pair"] * GIGA if "pair" in number else None,
        node_network=number["network"] * GIGA,
        chips_per_node=int(number["node"]),
        peer_to_peer=row.get("p2p", True),
        power_watts=number["power"],
        price_per_hour=number["price"],
        note=row.get("note", ""),
        aliases=tuple(row["aka"]),
        cells=cells,
    )


def _cell(name: str, key: str, text: str) -> tuple[str, str]:
    value, _, source = str(text).partition(" ")
    if not source:
        raise ValueError(f"chips.yaml: {name}.{key} is {text!r}; every cell needs its source")
    return value, source
