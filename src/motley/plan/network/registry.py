"""Which network is meant: a published shape by any of its usual names, or a Hugging Face `config.json`.

The published shapes are data (`models.yaml`). `deepseek-ai/DeepSeek-V3-Base`, `Llama 2 (70B)`, `GPT-3 175B`: owner,
capitals, dashes and endings that do not change the shape are nothing.
"""

import difflib
import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from motley.errors import InputError
from motley.files import read_json
from motley.model import SIZES, ModelConfig
from motley.plan.network.hf import from_hf
from motley.plan.network.spec import GptConfig, LlamaConfig, NetworkConfig, NetworkSpec, network_of

SAME_SHAPE = r"hf|base|instruct|chat|it|model|meta|lm|pretrain(ed)?|fp8|bf16|fp16|0324|0528|0711|0905|v[01]\.\d"


@cache
def known_networks() -> dict[str, NetworkSpec]:
    """Name → shape: motley's own sizes and the published networks."""
    own = {name: network_of(config, name, "motley.model.SIZES") for name, config in SIZES.items()}
    return own | {name: network_of(config, name, source) for name, source, config in _published()}


def _published() -> Iterator[tuple[str, str, NetworkConfig]]:
    """(name, source, configuration) of every row of `models.yaml`."""
    table = model_table()
    for kind, family in (("gpt", GptConfig), ("llama", LlamaConfig)):
        for source, rows in table[kind].items():
            for name, row in rows.items():
                further = row[-1] if isinstance(row[-1], dict) else {}
                sizes = row[:-2] if further else row[:-1]
                yield name, source, family(*sizes, **further)
    for source, rows in table["deepseek"].items():
        for name, row in rows.items():
            fields = {key: value for key, value in row.items() if key != "published"}
            yield name, source, ModelConfig.from_hf(fields, source)


@cache
def model_table() -> dict[str, Any]:
    """`models.yaml` as it stands."""
    return yaml.safe_load(files("motley.plan.network").joinpath("models.yaml").read_text("utf-8"))


@cache
def _names() -> dict[str, NetworkSpec]:
    """Plain name → shape, other names included."""
    known = known_networks()
    others = {_plain(other): known[name] for name, own in model_table()["also called"].items() for other in own}
    return {_plain(name): shape for name, shape in known.items()} | others


def _plain(name: str) -> str:
    """`meta-llama/Llama-2-70b-hf` → `llama270b`; points stay, for OPT-1.3B is not OPT-13B."""
    name = name.lower().rstrip("/").rpartition("/")[2].replace("_", "-")
    name = re.sub(r"(llama-?3|qwen-?2)-(\d)-(?=\d)", r"\1.\2-", name)  # llama-3-1-8b
    return "".join(word for word in re.findall(r"[a-z0-9.]+", name) if not re.fullmatch(SAME_SHAPE, word))


def known_network(model: str) -> NetworkSpec | None:
    """The published shape with this name, if there is one."""
    return known_networks().get(model) or _names().get(_plain(model))


def trainable(model: str) -> ModelConfig | None:
    """The configuration of a network with this name that motley can train: one of its own, or a published DeepSeek."""
    shape = known_network(model)
    return shape.config if shape is not None and isinstance(shape.config, ModelConfig) else None


def find_network(model: str, base: Path = Path()) -> NetworkSpec:
    """The shape that `model` names: a known name, a `config.json` (relative to `base`), or a folder that holds one.

    What exists as a file goes before a name that is only like a known one. Raises InputError with the nearest names.
    """
    path = base / model
    if model in known_networks() or not path.exists():
        if (shape := known_network(model)) is None:
            near = difflib.get_close_matches(_plain(model), _names(), n=6, cutoff=0.5)
            known = list(known_networks())
            nearest = list(dict.fromkeys(_names()[name].name for name in near)) or known
            raise InputError(
                f"there is no model {model!r}; nearest of {len(known)} known ones: {', '.join(nearest[:6])}; "
                f"a Hugging Face config.json (or its folder) may be named too"
            )
        return shape
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise InputError(f"model {model!r} is a folder without a config.json")
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} is no config.json: it holds {type(values).__name__}, not an object")
    return from_hf(values, name=path.parent.name or path.stem, source=str(path))
