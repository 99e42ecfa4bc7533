"""Layouts to predict, read from a CSV file (`csv_columns.py`): what a row leaves out is chosen by the rules below.

framework      motley-cpu on CPUs (in fp32 motley-cpu-plain); deepseek for MLA; torchtitan where weights are sharded
            (zero 3); megatron-core for gated MLPs, and on chips with fp8; else megatron (what GPTs were trained with
            before such chips)
precision   fp8 for V3's generation under deepseek on chips with fp8; else the chip's 16 bits
schedule    under deepseek: dualpipe for V3's generation, zero_bubble for V2's; else 1f1b
recompute, zero         the framework's habit
expert parallelism      the most ranks, up to 64, that experts and data-parallel ranks divide by
virtual stages          megatron-core with pipelines: as many as there are layers a stage, up to 8; else 1
family      the model's name; else gated (llama) if there are fewer key-value heads, experts, or an MLP that is not
            four times the hidden size; else gpt
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from motley.errors import InputError
from motley.fleet.chips import Chip, find_chip
from motley.model import ModelConfig
from motley.plan.cost_model.configs import RECOMPUTES, SCHEDULES
from motley.plan.cost_model.framework import Framework, load_framework
from motley.plan.cost_model.hardware import Hardware
from motley.plan.network.registry import find_network, known_network
from motley.plan.network.spec import GptConfig, LlamaConfig, NetworkSpec, network_of
from motley.plan.validation.csv_columns import SECONDS_IN, CaseTable, number_in, read_table

DEFAULT_CHIP = "A100-80GB-SXM"
VOCABULARY = {"gpt": 50304, "llama": 32000}  # GPT-2's, padded as Megatron does; Llama's
GIGA = 1e9
MOST_EXPERT_RANKS, MOST_CHUNKS = 64, 8  # where a row does not say
MOST = 10**9  # of anything that is counted
BITS_IN = {"": 1, "Gb/s": 1, "Gbps": 1, "Gbit/s": 1, "GB/s": 8, "GByte/s": 8}
RESIZABLE = {  # column → field of each family's configuration
    "hidden_size": {"gpt": "hidden_size", "llama": "hidden_size", "deepseek": "hidden_size"},
    "layers": {"gpt": "layers", "llama": "layers", "deepseek": "num_hidden_layers"},
    "heads": {"gpt": "heads", "llama": "heads", "deepseek": "num_attention_heads"},
    "vocabulary": {"gpt": "vocabulary", "llama": "vocabulary", "deepseek": "vocab_size"},
    "intermediate_size": {"gpt": "intermediate_size", "llama": "intermediate_size", "deepseek": "intermediate_size"},
    "kv_heads": {"llama": "kv_heads"},
    "experts": {"llama": "experts", "deepseek": "n_routed_experts"},
    "chosen": {"llama": "chosen", "deepseek": "num_experts_per_tok"},
    "expert_size": {"llama": "intermediate_size", "deepseek": "moe_intermediate_size"},
}
DEGREES = ("tp", "pp", "cp", "ep", "dp")
WHOLE = (
    *("gpus", "nodes", "chips_per_node", "global_batch", "batch_tokens", "micro_batch", "micro_batches", "seq_len"),
    *(*DEGREES, "chunks", *RESIZABLE),
)
WORDS = {  # cells of several words mean their first known one: `selective+SP`, `fp16 mixed`
    "recompute": {
        **dict.fromkeys(("none", "no", "0", "false", "off"), "none"),
        **dict.fromkeys(("selective", "sel", "core", "attention"), "selective"),
        **dict.fromkeys(("full", "yes", "1", "true", "all", "uniform", "block", "on"), "full"),
    },
    "precision": {
        **dict.fromkeys(("bf16", "bfloat16"), "bf16"),
        **dict.fromkeys(("fp16", "float16", "half", "f16", "16"), "fp16"),
        **dict.fromkeys(("fp8", "float8", "f8"), "fp8"),
        **dict.fromkeys(("fp32", "float32", "single", "f32"), "fp32"),
        **dict.fromkeys(("mixed", "amp"), None),  # with whatever 16 bits the chip has
    },
    "schedule": {
        **dict.fromkeys(("1f1b", "interleaved", "vpp"), "1f1b"),  # how often, `virtual stages` says
        **dict.fromkeys(("zero", "zb", "zb1p", "zbh1"), "zero_bubble"),
        **dict.fromkeys(("dualpipe",), "dualpipe"),
        **dict.fromkeys(("none", "no"), None),
    },
    "zero": {
        **dict.fromkeys(("0", "none", "no", "false", "off", "zero0", "ddp"), "0"),
        **dict.fromkeys(("1", "yes", "true", "on", "zero1"), "1"),
        **dict.fromkeys(("2", "zero2"), "2"),
        **dict.fromkeys(("3", "zero3", "fsdp"), "3"),
    },
}
MEANT = {
    "recompute": "none, selective, full",
    "precision": "bf16, fp16, fp8, fp32",
    "schedule": "1f1b, zero_bubble, dualpipe",
    "zero": "0, 1, 2, 3",
}
MEGATRONS = ("megatron-lm", "megatron-class")  # which of them, the chip's age says


@dataclass(frozen=True)
class Case:
    """One layout to predict; `measured_seconds` is None where nothing was measured."""

    line: int
    model: str
    shape: NetworkSpec
    chip: str
    framework: Framework
    precision: str
    hardware: Hardware
    seq_len: int
    gpus: int
    layout: Mapping[str, int]
    measured_seconds: float | None
    note: str


@dataclass(frozen=True)
class RefusedRow:
    """A row that cannot be predicted, and why; the names are as the file has them."""

    line: int
    model: str
    chip: str
    framework: str
    error: str


@dataclass(frozen=True)
class CaseFile:
    """A file's rows. `unit_given`: whether the measured times say seconds or milliseconds."""

    rows: tuple[Case | RefusedRow, ...]
    ignored_columns: tuple[str, ...]
    unit_given: bool


def read_cases(path: Path, load: Callable[[str], Framework] = load_framework) -> list[Case]:
    """All rows; `load` finds a framework by name. Raises InputError for the first row that cannot be used."""
    rows = read_rows(path, load).rows
    if refused := next((row for row in rows if isinstance(row, RefusedRow)), None):
        raise InputError(refused.error)
    return [row for row in rows if isinstance(row, Case)]


def read_rows(path: Path, load: Callable[[str], Framework] = load_framework) -> CaseFile:
    """Every row, or what is wrong with it. Raises InputError where the file as a whole cannot be used."""
    table = read_table(path)
    rows: list[Case | RefusedRow] = []
    for line, cells in table.rows:
        where = f"{path}, line {line}"
        if isinstance(cells, InputError):
            rows.append(RefusedRow(line, "", "", "", str(cells)))
            continue
        try:
            rows.append(_case(_CaseRow(table, cells), line, path.parent, load))
        except InputError as error:
            named = (cells.get(name, "") for name in ("model", "chip", "framework"))
            rows.append(RefusedRow(line, *named, error=f"{where}: {error}"))
    measured = table.measured
    return CaseFile(
        tuple(rows), table.ignored, measured is None or measured.per != "step" or measured.seconds is not None
    )


class _CaseRow:
    """Typed access to a row's cells; errors name the column."""

    def __init__(self, table: CaseTable, cells: Mapping[str, str]) -> None:
        self.table, self.cells = table, cells
        self.numbers = {name: self.whole(name) for name in WHOLE if name in cells}

    def text(self, name: str) -> str:
        return self.cells.get(name, "")

    def word(self, name: str) -> str | None:
        """The first known word of a cell; None where nothing is given."""
        known, text = WORDS[name], self.text(name).lower()
        if not text:
            return None
        whole = re.sub(r"[^a-z0-9]", "", text)
        words = [whole, *re.findall(r"[a-z0-9]+", text)]
        found = [word for word in words if word in known]
        said = [known[word] for word in found if known[word]]
        if not found:
            raise InputError(f"{name} is {self.text(name)!r}; write one of {MEANT[name]}")
        return said[0] if said else None

    def number(self, name: str, label: str | None = None) -> tuple[float, str]:
        """(a number above 0, what stands behind it)."""
        label, text = label or name.replace("_", " "), self.cells[name]
        found = number_in(text, self.table.decimal_comma)
        if found is None:
            raise InputError(f"{label} is {text!r}, which is no number")
        if not 0 < found[0] < math.inf:
            raise InputError(f"{label} is {text}; it must be above 0")
        return found

    def whole(self, name: str) -> int:
        """`50k` is 50,000, but `4k` tokens of a sequence are 4,096."""
        value, behind = self.number(name)
        kilo = 1024 if name == "seq_len" else 1000
        if behind not in ("", "k", "m"):
            raise InputError(f"{name.replace('_', ' ')} is {self.cells[name]!r}, which is no number")
        value *= {"": 1, "k": kilo, "m": kilo**2}[behind]
        if value > MOST:
            raise InputError(f"{name.replace('_', ' ')} is {self.cells[name]}; it must be at most {MOST:,}")
        if value != int(value):
            raise InputError(f"{name.replace('_', ' ')} is {self.cells[name]}; it must be a whole number")
        return int(value)


def _case(row: _CaseRow, line: int, base: Path, load: Callable[[str], Framework]) -> Case:
    shape = _shape(row, base)
    chip = find_chip(row.text("chip") or DEFAULT_CHIP)
    framework = load(_framework_name(row, shape, chip))
    numbers = row.numbers
    seq_len = numbers.get("seq_len", min(shape.max_context, 4096))
    layout = _layout(row, shape, seq_len, framework)
    precision = _precision(row, shape, chip, framework)
    tp, pp, cp, dp = (layout[name] for name in ("tp", "pp", "cp", "dp"))
    gpus = tp * pp * cp * dp
    per_node = numbers.get("chips_per_node") or (-(-gpus // numbers["nodes"]) if "nodes" in numbers else None)
    layout |= {
        "recompute": RECOMPUTES.index(row.word("recompute") or framework.recompute),  # pyright: ignore[reportArgumentType]
        "schedule": SCHEDULES.index(row.word("schedule") or _schedule(shape, framework, pp)),  # pyright: ignore[reportArgumentType]
        "zero": int(row.word("zero") or framework.zero),
    }
    batch = layout["micro_batch"] * layout["micro_batches"] * dp
    return Case(
        line=line,
        model=row.text("model") or f"{shape.family} h{shape.hidden_size} L{shape.num_layers}",
        shape=shape,
        chip=chip.name,
        framework=framework,
        precision=precision,
        hardware=Hardware.of_chip(chip, per_node, _network(row)),
        seq_len=seq_len,
        gpus=gpus,
        layout=layout,
        measured_seconds=_measured(row, batch, seq_len, gpus),
        note=row.text("note"),
    )


# ---------------------------------------------------------------------------------------------- shapes


def _shape(row: _CaseRow, base: Path) -> NetworkSpec:
    """The model's, with the sizes that the row gives; without a known model, one of those sizes alone."""
    model = row.text("model")
    given = {name: row.numbers[name] for name in RESIZABLE if name in row.numbers}
    if model and (known_network(model) or (base / model).exists()):
        return _resized(find_network(model, base), given)
    missing = [name.replace("_", " ") for name in ("hidden_size", "heads", "layers") if name not in given]
    if missing:
        if model:
            find_network(model, base)  # says which names come near
        raise InputError(f"without a known model the row needs {', '.join(missing)}")
    return _made(row, given)


def _resized(shape: NetworkSpec, given: Mapping[str, int]) -> NetworkSpec:
    heads = given.get("heads", shape.blocks[0].heads)
    if isinstance(shape.config, LlamaConfig) and shape.config.kv_heads == shape.config.heads:
        given = {"kv_heads": heads, **given}  # every head has its own, as before
    if shape.family != "llama" and given.get("kv_heads") == heads:
        given = {name: value for name, value in given.items() if name != "kv_heads"}
    fields = {name: RESIZABLE[name].get(shape.family) for name in given}
    if unknown := [name.replace("_", " ") for name, field in fields.items() if field is None]:
        raise InputError(f"{shape.name} is of the family {shape.family}, which knows no {', '.join(unknown)}")
    changes: dict[str, Any] = {field: given[name] for name, field in fields.items() if field}
    config = replace(shape.config, **changes)
    return shape if config == shape.config else network_of(config, shape.name, f"{shape.source}; resized")


def _made(row: _CaseRow, given: Mapping[str, int]) -> NetworkSpec:
    model, hidden, heads = row.text("model"), given["hidden_size"], given["heads"]
    wide = given.get("intermediate_size", given.get("expert_size"))
    context = row.numbers.get("seq_len", 2048)
    family = row.text("family").lower() or _family(model, given)
    if family not in ("gpt", "llama"):
        raise InputError(f"family is {family!r}; write gpt or llama (others need a model by name or config.json)")
    if family == "gpt":
        if "experts" in given:
            raise InputError("experts are known in the families llama and deepseek only")
        vocabulary = given.get("vocabulary", VOCABULARY["gpt"])
        config = GptConfig(hidden, given["layers"], heads, context, vocabulary, intermediate_size=wide)
        return network_of(config, model or "gpt", "")
    return network_of(
        LlamaConfig(
            hidden_size=hidden,
            layers=given["layers"],
            heads=heads,
            kv_heads=given.get("kv_heads", heads),
            intermediate_size=wide or 256 * math.ceil(8 * hidden / 3 / 256),  # Llama's rule
            context=context,
            vocabulary=given.get("vocabulary", VOCABULARY["llama"]),
            experts=given.get("experts", 0),
            chosen=given.get("chosen", 2 if "experts" in given else 0),
        ),
        model or "llama",
        "",
    )


def _family(model: str, given: Mapping[str, int]) -> str:
    if re.search(r"llama|mi[sx]tral|qwen|vicuna|yi-|internlm|baichuan", model.lower()) or "experts" in given:
        return "llama"
    wide = given.get("intermediate_size", 4 * given["hidden_size"])
    gated = given.get("kv_heads", given["heads"]) != given["heads"] or wide != 4 * given["hidden_size"]
    return "llama" if gated else "gpt"


# --------------------------------------------------------------------------------------------- choices


def _newest(shape: NetworkSpec) -> bool:
    """Whether it is of V3's generation: experts chosen by sigmoid scores, trained in fp8 (V3 report, 2.1.2, 3.3)."""
    return isinstance(shape.config, ModelConfig) and shape.config.scoring_func == "sigmoid"


def _framework_name(row: _CaseRow, shape: NetworkSpec, chip: Chip) -> str:
    name = re.sub(r"[\s_]+", "-", row.text("framework").lower())
    name = re.sub(r"-?v?\d+(\.\d+)*$", "", name) or name  # Megatron-Core v0.9
    if chip.kind == "cpu" and name in ("", "motley"):
        return "motley-cpu-plain" if row.word("precision") == "fp32" else "motley-cpu"
    if name not in ("", *MEGATRONS):
        return name
    if not name and shape.family == "deepseek":
        return "deepseek"
    if not name and row.word("zero") == "3":
        return "torchtitan"
    return "megatron-core" if shape.family != "gpt" or "fp8" in chip.flops else "megatron"


def _precision(row: _CaseRow, shape: NetworkSpec, chip: Chip, framework: Framework) -> str:
    possible = [name for name in chip.flops if name in framework.matmul_efficiency]
    usual = "fp8" if framework.name == "deepseek" and _newest(shape) and "fp8" in possible else chip.best_precision()
    precision = row.word("precision") or usual
    if precision not in possible:
        raise InputError(
            f"{chip.name} under {framework.name} does not compute in {precision}; possible: {', '.join(possible)}"
        )
    return precision


def _schedule(shape: NetworkSpec, framework: Framework, pp: int) -> str:
    if framework.name != "deepseek" or shape.family != "deepseek" or pp == 1:
        return "1f1b"
    return "dualpipe" if _newest(shape) and pp % 2 == 0 else "zero_bubble"


def _layout(row: _CaseRow, shape: NetworkSpec, seq_len: int, framework: Framework) -> dict[str, int]:
    """Degrees, micro-batch, micro-batches, chunks; what one column says may be worked out from others."""
    numbers = row.numbers
    tp, pp, cp = (numbers.get(name, 1) for name in ("tp", "pp", "cp"))
    gpus = numbers.get("gpus") or numbers.get("nodes", 0) * numbers.get("chips_per_node", 0)
    dp = numbers.get("dp") or max(1, gpus // (tp * pp * cp))
    if not gpus and "dp" not in numbers:
        raise InputError("gpus is empty")
    if tp * pp * cp * dp != (gpus or tp * pp * cp * dp):
        raise InputError(
            f"tensor {tp} x pipeline {pp} x context {cp} x data {dp} is {tp * pp * cp * dp}, "
            f"not the {gpus} chips of the row"
        )
    micro, batch = _batch(row, dp, seq_len)
    heads = shape.blocks[0].heads
    if heads % tp:
        raise InputError(f"{heads} attention heads cannot be cut {tp} ways")
    if pp > shape.num_layers:
        raise InputError(f"{pp} pipeline stages for {shape.num_layers} layers")
    ep = numbers.get("ep") or _expert_ranks(shape.experts, dp * cp)
    if ep > 1 and (not shape.experts or shape.experts % ep or (dp * cp) % ep):
        raise InputError(f"expert parallelism {ep} needs experts and data-parallel ranks that it divides")
    count = batch // (dp * micro)
    chunks = numbers.get("chunks") or _chunks(framework, shape.num_layers, pp, count)
    return {
        **{"tp": tp, "cp": cp, "ep": ep, "dp": dp, "pp": pp},
        **{"micro_batch": micro, "micro_batches": count, "chunks": chunks},
    }


def _expert_ranks(experts: int, ranks: int) -> int:
    """Over how many ranks experts are spread where the row does not say: nobody holds all of many experts."""
    return max(
        (ep for ep in range(1, min(experts, MOST_EXPERT_RANKS) + 1) if not experts % ep and not ranks % ep), default=1
    )


def _chunks(framework: Framework, layers: int, pp: int, micro_batches: int) -> int:
    """Chunks of a stage where the row does not say: Megatron-Core interleaves as deep as layers allow."""
    if framework.name != "megatron-core" or pp == 1 or micro_batches % pp:
        return 1
    return max(1, min(layers // pp, MOST_CHUNKS))


def _batch(row: _CaseRow, dp: int, seq_len: int) -> tuple[int, int]:
    """(micro-batch, global batch) in sequences."""
    numbers = row.numbers
    tokens = numbers.get("batch_tokens")
    if "token" in row.table.units.get("global_batch", "").lower():
        tokens = numbers.get("global_batch", tokens)
        batch = 0
    else:
        batch = numbers.get("global_batch", 0)
    batch = batch or (max(1, round(tokens / seq_len)) if tokens else 0)
    micro, count = numbers.get("micro_batch", 0), numbers.get("micro_batches", 0)
    batch = batch or dp * micro * count
    micro = micro or (batch // (dp * count) if count else 0)
    for name, value in (("global batch", batch), ("micro batch", micro)):
        if not value:
            raise InputError(f"{name} is empty")
    if batch % (dp * micro):
        raise InputError(f"a global batch of {batch} cannot be cut into {dp} equal shares of micro-batches of {micro}")
    return micro, batch


def _network(row: _CaseRow) -> float | None:
    """Bytes/s of a node; columns are in gigabits unless they say GB/s."""
    if "network" not in row.cells:
        return None
    unit = row.table.units.get("network", "")
    if unit not in BITS_IN:
        raise InputError(f"network in {unit!r}; write (Gb/s) or (GB/s), of a node")
    return row.number("network")[0] * GIGA / 8 * BITS_IN[unit]


def _measured(row: _CaseRow, batch: int, seq_len: int, gpus: int) -> float | None:
    """Seconds of a step; a unit in the cell goes before the header's. Without any, `accuracy.py` decides."""
    column = row.table.measured
    if column is None or "measured" not in row.cells:
        return None
    value, behind = row.number("measured", "iteration time")
    if column.per != "step":
        work = batch * (seq_len if column.per == "token" else 1)
        return work / (value * (gpus if column.of_a_chip else 1))
    if behind:
        if behind not in SECONDS_IN:
            raise InputError(f"iteration time is {row.cells['measured']!r}, which is no number")
        return value * SECONDS_IN[behind]
    return value * (column.seconds or 1.0)
