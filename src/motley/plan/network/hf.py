"""A Hugging Face `config.json` as a configuration the planner knows.

Every field that is read is checked: a whole number of at least 1, or the message names file and field.
"""

from collections.abc import Callable, Mapping
from typing import Any

from motley.errors import InputError
from motley.model import ModelConfig
from motley.plan.network.spec import GptConfig, LlamaConfig, NetworkConfig, NetworkSpec, network_of

Values = Mapping[str, Any]


def from_hf(values: Values, name: str, source: str) -> NetworkSpec:
    """Read a `config.json`; `source` is its path, for messages.

    Raises InputError for families whose cost is not known here and for fields that are missing or no sizes.
    """
    kind = str(values.get("model_type"))
    if kind not in READERS:
        raise InputError(f"{source}: model_type {kind!r} is not known here; known: {', '.join(READERS)}")
    return network_of(READERS[kind](values, source), name, source)


def _deepseek(values: Values, source: str) -> ModelConfig:
    return ModelConfig.from_hf(values, source)


def _gpt2(values: Values, source: str) -> GptConfig:
    size = _sizes(values, source)
    return GptConfig(
        hidden_size=size("n_embd"),
        layers=size("n_layer"),
        heads=size("n_head"),
        context=size("n_positions", 1024),
        vocabulary=size("vocab_size"),
        intermediate_size=_optional(values, "n_inner", source),
    )


def _gpt_neo(values: Values, source: str) -> GptConfig:
    """Its every other layer attends to 256 tokens only; that is not told apart here."""
    size = _sizes(values, source)
    return GptConfig(
        hidden_size=size("hidden_size"),
        layers=size("num_layers"),
        heads=size("num_heads"),
        context=size("max_position_embeddings", 2048),
        vocabulary=size("vocab_size"),
        intermediate_size=_optional(values, "intermediate_size", source),
    )


def _gpt_neox(values: Values, source: str) -> GptConfig:
    size = _sizes(values, source)
    return GptConfig(
        hidden_size=size("hidden_size"),
        layers=size("num_hidden_layers"),
        heads=size("num_attention_heads"),
        context=size("max_position_embeddings", 2048),
        vocabulary=size("vocab_size"),
        intermediate_size=size("intermediate_size"),
        learned_positions=False,
        tied=bool(values.get("tie_word_embeddings")),
    )


def _bloom(values: Values, source: str) -> GptConfig:
    size = _sizes(values, source)
    return GptConfig(
        hidden_size=size("n_embed" if "n_embed" in values else "hidden_size"),
        layers=size("n_layer" if "n_layer" in values else "num_hidden_layers"),
        heads=size("n_head" if "n_head" in values else "num_attention_heads"),
        context=size("seq_length", 2048),
        vocabulary=size("vocab_size"),
        learned_positions=False,
        embedding_norm=True,
    )


def _opt(values: Values, source: str) -> GptConfig:
    size = _sizes(values, source)
    return GptConfig(
        hidden_size=size("hidden_size"),
        layers=size("num_hidden_layers"),
        heads=size("num_attention_heads"),
        context=size("max_position_embeddings", 2048),
        vocabulary=size("vocab_size"),
        intermediate_size=_optional(values, "ffn_dim", source),
        embedding_size=_optional(values, "word_embed_proj_dim", source),
    )


def _llama(values: Values, source: str) -> LlamaConfig:
    size = _sizes(values, source)
    kind, heads = values["model_type"], size("num_attention_heads")
    routed = kind in ("mixtral", "qwen3_moe")
    experts = "num_experts" if "num_experts" in values else "num_local_experts"
    if kind == "qwen3_moe" and (values.get("decoder_sparse_step") not in (None, 1) or values.get("mlp_only_layers")):
        raise InputError(f"{source}: dense layers among those with experts are not known here for qwen3_moe")
    return LlamaConfig(
        hidden_size=size("hidden_size"),
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        intermediate_size=size("moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"),
        context=size("max_position_embeddings", 4096),
        vocabulary=size("vocab_size"),
        head_dim=_optional(values, "head_dim", source) or (128 if kind.startswith("qwen3") else None),
        experts=size(experts) if routed else 0,
        chosen=size("num_experts_per_tok") if routed else 0,
        qk_norm=kind.startswith("qwen3"),
        qkv_bias=kind == "qwen2",
        tied=bool(values.get("tie_word_embeddings")),
    )


READERS: dict[str, Callable[[Values, str], NetworkConfig]] = {
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "kimi_k2": _deepseek,
    "llama": _llama,
    "mistral": _llama,
    "mixtral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "qwen3_moe": _llama,
    "gpt2": _gpt2,
    "gpt_neo": _gpt_neo,
    "gpt_neox": _gpt_neox,
    "bloom": _bloom,
    "opt": _opt,
}


def _sizes(values: Values, source: str) -> Callable[..., int]:
    """A reader of fields that must be there, unless a default is given."""

    def size(name: str, default: int | None = None) -> int:
        value = _optional(values, name, source)
        if value is None and default is None:
            raise InputError(f"{source}: a config.json of model_type {values['model_type']} needs the field {name!r}")
        return value or default or 0

    return size


def _optional(values: Values, name: str, source: str) -> int | None:
    value = values.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{source}: {name} is {value!r}; it must be a whole number of at least 1")
    return value
