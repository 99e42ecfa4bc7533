"""A Hugging Face `config.json` as a configuration the planner knows.

`FAMILIES` says which field of the file holds what. Every field that is read is checked: it is a whole number of at
least 1, or the message names file and field.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from motley.errors import InputError
from motley.model import ModelConfig
from motley.plan.network.spec import GptConfig, LlamaConfig, NetworkConfig, NetworkSpec, network_of

Values = Mapping[str, Any]


@dataclass(frozen=True)
class HfFamily:
    """How the `config.json` of a model type is read.

    Attributes:
        config: what it becomes.
        needed: field of `config` → its names in the file; the first that is there counts.
        optional: field of `config` → (name in the file, value where it is missing: a number, or another field's; None:
            that of `config`).
        fixed: fields of `config` that follow from the model type.
        says_tied: whether `tie_word_embeddings` in the file says that the head is the word embedding.
    """

    config: type[GptConfig] | type[LlamaConfig]
    needed: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, int | str | None]]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    says_tied: bool = False


USUAL = {
    "hidden_size": ("hidden_size",),
    "layers": ("num_hidden_layers",),
    "heads": ("num_attention_heads",),
    "vocabulary": ("vocab_size",),
}
CONTEXT = ("max_position_embeddings", 2048)
EXPERTS = {"experts": ("num_experts", "num_local_experts"), "chosen": ("num_experts_per_tok",)}
LLAMA = HfFamily(
    LlamaConfig,
    needed={**USUAL, "intermediate_size": ("intermediate_size",)},
    optional={
        "context": ("max_position_embeddings", 4096),
        "kv_heads": ("num_key_value_heads", "heads"),
        "head_dim": ("head_dim", None),
    },
    says_tied=True,
)
QWEN3 = replace(LLAMA, optional={**LLAMA.optional, "head_dim": ("head_dim", 128)}, fixed={"qk_norm": True})
DEEPSEEK = ("deepseek_v2", "deepseek_v3", "kimi_k2")
"""Model types that `ModelConfig` reads itself."""
FAMILIES: dict[str, HfFamily] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": replace(LLAMA, needed={**LLAMA.needed, **EXPERTS}),
    "qwen2": replace(LLAMA, fixed={"qkv_bias": True}),
    "qwen3": QWEN3,
    "qwen3_moe": replace(QWEN3, needed={**USUAL, **EXPERTS, "intermediate_size": ("moe_intermediate_size",)}),
    "gpt2": HfFamily(
        GptConfig,
        needed={
            "hidden_size": ("n_embd",),
            "layers": ("n_layer",),
            "heads": ("n_head",),
            "vocabulary": ("vocab_size",),
        },
        optional={"context": ("n_positions", 1024), "intermediate_size": ("n_inner", None)},
    ),
    "gpt_neo": HfFamily(  # every other layer attends to 256 tokens only, which is not modelled
        GptConfig,
        needed={**USUAL, "layers": ("num_layers",), "heads": ("num_heads",)},
        optional={"context": CONTEXT, "intermediate_size": ("intermediate_size", None)},
    ),
    "gpt_neox": HfFamily(
        GptConfig,
        needed={**USUAL, "intermediate_size": ("intermediate_size",)},
        optional={"context": CONTEXT},
        fixed={"learned_positions": False},
        says_tied=True,
    ),
    "bloom": HfFamily(
        GptConfig,
        needed={
            "hidden_size": ("n_embed", "hidden_size"),
            "layers": ("n_layer", "num_hidden_layers"),
            "heads": ("n_head", "num_attention_heads"),
            "vocabulary": ("vocab_size",),
        },
        optional={"context": ("seq_length", 2048)},
        fixed={"learned_positions": False, "embedding_norm": True},
    ),
    "opt": HfFamily(
        GptConfig,
        needed=USUAL,
        optional={
            "context": CONTEXT,
            "intermediate_size": ("ffn_dim", None),
            "embedding_size": ("word_embed_proj_dim", None),
        },
    ),
}


def from_hf(values: Values, name: str, source: str) -> NetworkSpec:
    """Read a `config.json`; `source` is its path, for messages.

    Raises InputError for families whose cost is not known here and for fields that are missing or no sizes.
    """
    kind = str(values.get("model_type"))
    if kind in DEEPSEEK:
        return network_of(ModelConfig.from_hf(values, source), name, source)
    if kind not in FAMILIES:
        known = ", ".join((*DEEPSEEK, *FAMILIES))
        raise InputError(f"{source}: model_type {kind!r} is not known here; known: {known}")
    if kind == "qwen3_moe" and (values.get("decoder_sparse_step") not in (None, 1) or values.get("mlp_only_layers")):
        raise InputError(f"{source}: dense layers among those with experts are not known here for qwen3_moe")
    return network_of(_read(values, FAMILIES[kind], kind, source), name, source)


def _read(values: Values, family: HfFamily, kind: str, source: str) -> NetworkConfig:
    sizes: dict[str, Any] = dict(family.fixed)
    for own, names in family.needed.items():
        there = next((name for name in names if name in values), names[-1])
        size = _size(values, there, source)
        if size is None:
            raise InputError(f"{source}: a config.json of model_type {kind} needs the field {there!r}")
        sizes[own] = size
    for own, (there, otherwise) in family.optional.items():
        size = _size(values, there, source) or (sizes[otherwise] if isinstance(otherwise, str) else otherwise)
        if size is not None:
            sizes[own] = size
    if family.says_tied:
        sizes["tied"] = bool(values.get("tie_word_embeddings"))
    return family.config(**sizes)


def _size(values: Values, name: str, source: str) -> int | None:
    """A field of the file; None where it is missing. Raises InputError for what is no size."""
    value = values.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{source}: {name} is {value!r}; it must be a whole number of at least 1")
    return value
