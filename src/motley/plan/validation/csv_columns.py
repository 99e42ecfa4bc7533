"""A CSV file of measurements, as anyone may have written it: which column means what, and what its cells say.

"# GPUs" = num_gpus = "world size"          words are compared, not letters: no capitals, _ or noise words
"iteration time (ms)" = iter_time_ms        the unit is taken from brackets or from the words
tokens/s/GPU                                a rate is a measurement too
"" = - = N/A = nan = OOM                    nothing was given
"""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from motley.errors import InputError

HEADERS = {  # field → what its column may be called, in `_words` of it; "num" stands for any word of counting
    "gpus": "num gpu, gpus, chips, num chip, devices, accelerators, world, ranks, total gpus",
    "nodes": "nodes, servers, hosts, num node",
    "chips_per_node": "chips per node, gpus per node, devices per node, gpu per node",
    "global_batch": "global batch, batch, gbs, global bs, total batch, train batch, bs",
    "batch_tokens": "global batch tokens, batch tokens, tokens per batch, tokens per step, tokens per global batch",
    "micro_batch": "micro batch, mbs, microbatch, micro bs, local batch, lbs, per device batch, per gpu batch",
    "micro_batches": "micro batches, microbatches, gradient accumulation, gradient accumulation steps, "
    "accumulation steps, grad accumulation, grad accumulation steps, gas",
    "hidden_size": "hidden, d model, dmodel, model dimension, hidden dimension, hidden dim, embedding dimension",
    "heads": "attention heads, heads, num head, num attention head",
    "layers": "layers, num layer, hidden layers, transformer layers",
    "seq_len": "sequence length, sequence len, sequence, seq length, seq len, seqlen, seq, context length, context",
    "tp": "tensor parallel, tp, tensor, tensor model parallel, model parallel, tmp, mp",
    "dp": "data parallel, dp",
    "pp": "pipeline parallel, pp, pipeline, pipeline model parallel, pipeline stages, stages",
    "ep": "expert parallel, ep, expert model parallel",
    "cp": "context parallel, cp",
    "chunks": "virtual stages, vpp, vp, model chunks, virtual pipeline, virtual pipeline stages, "
    "virtual pipeline parallel, virtual pipeline model parallel",
    "chip": "chip, gpu, gpu type, chip type, gpu model, gpu name, chip name, device, device type, accelerator",
    "model": "model, model name",
    "family": "family, model family",
    "vocabulary": "vocabulary, vocab, padded vocab",
    "intermediate_size": "intermediate, ffn, ffn hidden, ffn dimension, feed forward, mlp, d ff, dff",
    "kv_heads": "key value heads, kv heads, query groups, num query group, num key value head, num kv head",
    "experts": "experts, routed experts, num expert, local experts",
    "chosen": "experts per token, experts per tok, top k, topk, active experts, moe router topk",
    "expert_size": "expert, moe intermediate, expert intermediate, expert ffn, moe ffn, moe ffn hidden",
    "recompute": "recompute, recomputation, activation recomputation, activation recompute, activation checkpointing, "
    "checkpointing, gradient checkpointing, recompute granularity",
    "precision": "precision, dtype, data type, number format",
    "framework": "framework, engine, training system",
    "schedule": "schedule, pipeline schedule, pp schedule",
    "zero": "zero, zero stage, distributed optimizer",
    "network": "network, network bandwidth, node network, network per node, network gbps, network gb per s",
    "note": "note",
    "use": "use",
}
NAMES = {name: field for field, names in HEADERS.items() for name in names.split(", ")}
COUNTING = {"#", "num", "number", "no", "n", "nr", "count"}
NOISE = {"of", "the", "size", "sizes", "degree", "in", "parallelization"}
GIVEN_NOTHING = {"", "-", "--", "–", "—", "?", "n/a", "na", "nan", "null", "inf", "oom", "out of memory", "failed"}

NEEDED = {  # field → what it can be worked out from
    "gpus": ("dp", "nodes"),
    "global_batch": ("batch_tokens", "micro_batches"),
    "micro_batch": ("micro_batches",),
}
SECONDS_IN = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1.0),
    **dict.fromkeys(("ms", "msec", "msecs", "millisecond", "milliseconds"), 1e-3),
    **dict.fromkeys(("us", "microseconds"), 1e-6),
    **dict.fromkeys(("min", "minutes"), 60.0),
}
OF_A_TIME = {"time", "times", "measured", "measurement", "latency", "duration", "elapsed", "wallclock"}
AROUND_A_TIME = {
    *OF_A_TIME,
    *("iteration", "iter", "step", "batch", "training", "train", "per", "total", "wall", "clock"),
    *("actual", "real", "observed", "mean", "average", "avg", "median"),
}
OF_A_STEP = {"iteration", "iter", "step", "batch"}
OF_A_RATE = {"token", "tokens", "tok", "toks"}, {"sample", "samples", "sequence", "sequences"}
OF_A_CHIP = {"gpu", "chip", "device", "accelerator"}


@dataclass(frozen=True)
class MeasuredColumn:
    """What a measured column holds.

    Attributes:
        per: "step" (a time), "token" or "sequence" (a rate).
        seconds: of a time's unit; None: the header names none.
        of_a_chip: the rate is of one chip, not of all.
    """

    per: str
    seconds: float | None = None
    of_a_chip: bool = False


@dataclass(frozen=True)
class CaseTable:
    """Cells by field.

    Attributes:
        rows: (line number, field → text; what was not given is absent, or what is wrong with the row).
        units: field → unit in the header, where there is one.
        measured: of the column `measured`, if there is one.
        ignored: headers of columns that are not used.
        decimal_comma: numbers are written 0,2.
    """

    rows: tuple[tuple[int, dict[str, str] | InputError], ...]
    units: dict[str, str]
    measured: MeasuredColumn | None
    ignored: tuple[str, ...]
    decimal_comma: bool


def read_table(path: Path) -> CaseTable:
    """Raises InputError where the file as a whole is no table of cases."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from None
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(",;\t|", key=first.count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    try:
        lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: no CSV: {error}") from None
    if len(lines) < 2:
        raise InputError(f"{path} holds no cases: it needs a line of column names and a line for each layout")
    header = lines[0][1]
    fields, units, measured, ignored = _columns(path, header)
    rows = [(number, _row(path, number, fields, row)) for number, row in lines[1:]]
    return CaseTable(tuple(rows), units, measured, tuple(ignored), decimal_comma=delimiter == ";")


def number_in(text: str, decimal_comma: bool = False) -> tuple[float, str] | None:
    """(number, what stands behind it in small letters): `51,200`, `50k`, `371.4 ms`; None for what is no number."""
    text = text.strip()
    if decimal_comma:
        text = re.sub(r"^([+-]?\d+),(\d+)", r"\1.\2", text)
    elif re.match(r"^[+-]?\d{1,3}(,\d{3})+(?!\d)", text):
        text = text.replace(",", "")
    found = re.fullmatch(r"([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([a-zA-Z]*)", text)
    return (float(found[1]), found[2].lower()) if found else None


# --------------------------------------------------------------------------------------------- headers


def _columns(path: Path, header: Sequence[str]) -> tuple[list[str], dict[str, str], MeasuredColumn | None, list[str]]:
    """(field of each column, "" for those not used; units; what `measured` holds; headers not used)."""
    fields: list[str] = []
    units: dict[str, str] = {}
    ignored: list[str] = []
    measured: MeasuredColumn | None = None
    for cell in header:
        field, unit = field_of(cell)
        if field == "measured":
            found = measured_of(cell)
            if measured is None:
                measured = found
            elif measured.per == "step" or found is None or found.per != "step":
                field = ""  # the first time given counts
            else:  # a time goes before rates
                fields[fields.index("measured")] = ""
                ignored.append(next(name.strip() for name in header if measured_of(name) == measured))
                measured = found
        if not field and cell.strip():
            ignored.append(cell.strip())
        if not field and measured_of(re.sub(r"[(\[].*", "", cell)) and set(_words(cell)) & (OF_A_STEP | {"measured"}):
            raise InputError(f"{path}, line 1: {cell.strip()!r} has a unit that is not known; write (ms) or (s)")
        if field and unit:
            units.setdefault(field, unit)
        fields.append(field)
    for needed, others in NEEDED.items():
        if not {needed, *others} & set(fields):
            raise InputError(f"{path}, line 1: lacks the column {needed.replace('_', ' ')}")
    return fields, units, measured, ignored


def field_of(header: str) -> tuple[str, str]:
    """(field, unit in brackets as written): `tensor parallelism (TP)` → tp; ("", ...) for what means nothing here."""
    inside = found[1].strip() if (found := re.search(r"[(\[]([^)\]]*)[)\]]", header)) else ""
    outside = re.sub(r"[(\[][^)\]]*[)\]]", " ", header)
    if measured_of(header):
        return "measured", inside
    for text in (outside, inside):
        words = _words(text)
        counted = " ".join("num" if word in COUNTING else word for word in words)
        plain = " ".join(word for word in words if word not in COUNTING)
        if field := NAMES.get(counted) or NAMES.get(plain):
            return field, inside
    return "", inside


def measured_of(header: str) -> MeasuredColumn | None:
    """What a header that names a time of a step, or a rate of tokens or sequences, says about its cells."""
    words = set(_words(header)) - {"measured"} if "throughput" in header.lower() else set(_words(header))
    per_second = "per" in words or "throughput" in words or "rate" in words
    for per, names in zip(("token", "sequence"), OF_A_RATE, strict=True):
        if words & names and words & {"s", "sec", "second"} and per_second:
            known = names | OF_A_CHIP | AROUND_A_TIME | {"s", "sec", "second", "per", "throughput", "rate"}
            return MeasuredColumn(per, of_a_chip=bool(words & OF_A_CHIP)) if words <= known else None
    if words in ({"tgs"}, {"tps"}):
        return MeasuredColumn("token", of_a_chip=words == {"tgs"})
    units = words & SECONDS_IN.keys()
    of_a_step = words & OF_A_STEP or not words & {"training", "train", "total"}
    named = words & OF_A_TIME or (units and words & OF_A_STEP) or words in ({"seconds"}, {"milliseconds"})
    if len(units) > 1 or not named or not of_a_step or not words - units <= AROUND_A_TIME:
        return None
    return MeasuredColumn("step", SECONDS_IN[units.pop()] if units else None)


def _words(text: str) -> list[str]:
    """`numGPUs`, `num_gpus`, `# GPUs` → [num or #, gpus]; noise words are left out, `/` is "per"."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text.replace("ZeRO", "zero")).lower().replace("/", " per ")
    text = re.sub(r"parallelism\b", "parallel", text)
    return [word for word in re.findall(r"[a-z0-9]+|#", text) if word not in NOISE]


def _row(path: Path, line: int, fields: Sequence[str], row: Sequence[str]) -> dict[str, str] | InputError:
    """Cells by field; those missing at the end were not given. Wrong: more cells than columns, two that disagree."""
    if any(cell.strip() for cell in row[len(fields) :]):
        return InputError(f"{path}, line {line}: {len(row)} cells under {len(fields)} column names")
    given: dict[str, str] = {}
    for field, cell in zip(fields, map(str.strip, row), strict=False):
        if field and cell.lower() not in GIVEN_NOTHING and given.setdefault(field, cell) != cell:
            return InputError(
                f"{path}, line {line}: two columns mean {field.replace('_', ' ')}; they say {given[field]} and {cell}"
            )
    return given
