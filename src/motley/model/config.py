"""The shape of a DeepSeek V2/V3 model, as a value.

Field names are those of the published `config.json` files, so that a reader can hold both side by side.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from motley.errors import InputError

ARCHITECTURES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}
IN_WORDS = {int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def _check_types(settings: Any) -> None:
    """Raises InputError for the first field that does not hold what its annotation says; JSON brings anything."""
    for name, kind in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if not _is(value, kind):
            raise InputError(f"{name} is {value!r}; it must be {_in_words(kind)}")


def _is(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_is(value, one) for one in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is kind


def _in_words(kind: Any) -> str:
    if isinstance(kind, UnionType):
        return " or ".join(map(_in_words, get_args(kind)))
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return IN_WORDS.get(kind) or f"a {kind.__name__}"


def _check_at_least(settings: Any, least: float, names: tuple[str, ...]) -> None:
    for name in names:
        if (value := getattr(settings, name)) is not None and value < least:
            raise InputError(f"{name} is {value}; it must be at least {least}")


def _check_positive(settings: Any, names: tuple[str, ...]) -> None:
    for name in names:
        if (value := getattr(settings, name)) <= 0:
            raise InputError(f"{name} is {value}; it must be above 0")


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (arXiv 2309.00071; DeepSeek-V3 report, 4.3)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(self, 1, ("original_max_position_embeddings",))
        _check_positive(self, ("factor", "beta_fast", "beta_slow"))


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of one model; defaults are DeepSeek-V3's constants (report, section 4.2)."""

    model_type: Literal["deepseek_v2", "deepseek_v3"] = "deepseek_v3"
    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    """Inner width of the leading dense layers."""
    moe_intermediate_size: int = 2048
    """Inner width of one routed (or shared) expert."""
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536
    """Width of the compressed query; None: queries are not compressed (V2-Lite, Moonlight)."""
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_routed_experts: int | None = 256
    """None: every layer is dense."""
    n_shared_experts: int | None = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    first_k_dense_replace: int = 3
    moe_layer_freq: int = 1
    num_nextn_predict_layers: int = 1
    """Depth D of multi-token prediction: how many MTP modules follow the main model."""
    max_position_embeddings: int = 163840
    rope_theta: float = 10000.0
    rope_scaling: Yarn | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | None = 1
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(self, 1, (
            "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
            "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "n_routed_experts",
            "num_experts_per_tok", "n_group", "topk_group", "moe_layer_freq", "max_position_embeddings",
        ))  # fmt: skip
        _check_at_least(
            self, 0, ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers", "initializer_range")
        )
        _check_positive(self, ("rope_theta", "rms_norm_eps", "routed_scaling_factor"))
        if self.qk_rope_head_dim % 2 or self.qk_rope_head_dim < 2:
            raise InputError(f"qk_rope_head_dim is {self.qk_rope_head_dim}; RoPE turns pairs, so it must be even")
        if self.n_routed_experts is not None:
            self._check_experts(self.n_routed_experts)

    def _check_experts(self, experts: int) -> None:
        if self.topk_method == "noaux_tc" and self.scoring_func != "sigmoid":
            raise InputError("topk_method noaux_tc goes with scoring_func sigmoid")
        if experts % self.n_group:
            raise InputError(f"{experts} experts cannot be cut into n_group={self.n_group} equal groups")
        if self.topk_method == "noaux_tc" and experts // self.n_group < 2:
            raise InputError("a group score is the sum of the two best, so a group needs two experts")
        reachable = experts // self.n_group * self.topk_group
        if self.topk_group > self.n_group or self.num_experts_per_tok > reachable:
            raise InputError(
                f"model config: num_experts_per_tok={self.num_experts_per_tok} with topk_group={self.topk_group} of "
                f"n_group={self.n_group} groups leaves {reachable} experts to choose from"
            )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` (MTP modules count on from num_hidden_layers) has routed experts."""
        return (
            self.n_routed_experts is not None
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )

    @classmethod
    def from_hf(cls, values: Any, origin: str | Path = "config.json") -> "ModelConfig":
        """Read the content of a Hugging Face `config.json` of the DeepSeek V2 or V3 family.

        Args:
            values: what the file holds.
            origin: the file's path, for messages.

        Raises InputError naming `origin` and the field, for another architecture, a value that is no such setting, or
        a setting this code does not compute.
        """
        try:
            if not isinstance(values, Mapping):
                raise InputError("it holds no JSON object")
            return cls(**_settings(values))
        except InputError as error:
            raise InputError(f"{origin}: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers and the serving engines read."""
        values = asdict(self)
        values["rope_scaling"] = self.rope_scaling and {"type": "yarn", **asdict(self.rope_scaling)}
        return {
            "architectures": [ARCHITECTURES[self.model_type]],
            **values,
            "num_key_value_heads": self.num_attention_heads,
            "hidden_act": "silu",
            **({"rope_interleave": True} if self.model_type == "deepseek_v3" else {"mlp_bias": False}),
        }


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ModelConfig that a published file means, some of which it leaves out."""
    kind = str(values.get("model_type"))
    kind = {"kimi_k2": "deepseek_v3"}.get(kind, kind)  # Kimi-K2 publishes the V3 architecture under its own name
    if kind not in ARCHITECTURES:
        known = ", ".join([*ARCHITECTURES, "kimi_k2"])
        raise InputError(f"model_type {values.get('model_type')!r} is not known here; known: {known}")
    names = {field.name for field in fields(ModelConfig)} - {"model_type", "rope_scaling", "rope_theta"}
    chosen = {name: values[name] for name in names if values.get(name) is not None}
    defaults: dict[str, Any] = {
        "q_lora_rank": None, "n_routed_experts": None, "n_shared_experts": None, "pad_token_id": None,
        "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0, "initializer_range": 0.02,
    }  # fmt: skip
    if kind == "deepseek_v2":
        defaults |= {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
        defaults |= {"routed_scaling_factor": 1.0, "first_k_dense_replace": 0}
    needed = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank"]
    needed += ["num_experts_per_tok"] if "n_routed_experts" in chosen else []
    missing = [name for name in needed if name not in chosen]
    if missing:
        raise InputError(f"{', '.join(missing)} missing; is this a whole config of a DeepSeek model?")
    for name, only in {"hidden_act": "silu", "rope_interleave": True, "mlp_bias": False}.items():
        if values.get(name, only) != only:
            raise InputError(f"{name}={values[name]!r} is not supported; only {only!r} is")
    if isinstance(eos := chosen.get("eos_token_id"), list):
        if not eos:
            raise InputError("eos_token_id is an empty list; it must name the token that ends a text")
        chosen["eos_token_id"] = eos[0]
    return {**defaults, **chosen, **_rope_settings(values), "model_type": kind}


def _rope_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling from either spelling: `rope_theta` + `rope_scaling`, or `rope_parameters`."""
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(values.get(name) or {}, Mapping):
            raise InputError(f"{name} is {values[name]!r}; it must be an object or null")
    rope = values.get("rope_parameters") or {}
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    scaling = {key: value for key, value in (values.get(name) or {}).items() if value is not None}
    theta = next((of["rope_theta"] for of in (rope, values) if of.get("rope_theta") is not None), 10000.0)
    method = scaling.get("rope_type", scaling.get("type", "default" if name == "rope_parameters" else None))
    if method not in ("default", "yarn"):
        raise InputError(f"{name}: RoPE scaling {method!r} is not supported; DeepSeek models use 'yarn'")
    yarn = {field.name for field in fields(Yarn)} if method == "yarn" else set()
    harmless = {"type", "rope_type", "rope_theta"} | ({"truncate"} if scaling.get("truncate") is True else set())
    if unknown := sorted(scaling.keys() - yarn - harmless):
        raise InputError(f"{name}.{unknown[0]}={scaling[unknown[0]]!r} with RoPE {method!r} is not computed here")
    if method == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if missing := sorted({"factor", "original_max_position_embeddings"} - scaling.keys()):
        raise InputError(f"{name} of type yarn lacks {', '.join(missing)}")
    try:
        return {"rope_theta": theta, "rope_scaling": Yarn(**{key: scaling[key] for key in yarn & scaling.keys()})}
    except InputError as error:
        raise InputError(f"{name}.{error}") from None
