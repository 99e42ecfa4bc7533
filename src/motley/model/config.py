"""The shape of a DeepSeek V2/V3 model, as a value.

Field names are those of the published `config.json` files, so that a reader can hold both side by side.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from motley.errors import InputError

ARCHITECTURES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (arXiv 2309.00071; DeepSeek-V3 report, 4.3)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


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
        for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank",
                      "qk_nope_head_dim", "v_head_dim", "max_position_embeddings"):  # fmt: skip
            if getattr(self, field) < 1:
                raise InputError(f"model config: {field} is {getattr(self, field)}; it must be at least 1")
        if self.qk_rope_head_dim % 2 or self.qk_rope_head_dim < 2:
            raise InputError(
                f"model config: qk_rope_head_dim is {self.qk_rope_head_dim}; RoPE turns pairs, so it must be even"
            )
        if self.n_routed_experts is not None:
            self._check_experts(self.n_routed_experts)

    def _check_experts(self, experts: int) -> None:
        if self.topk_method == "noaux_tc" and self.scoring_func != "sigmoid":
            raise InputError("model config: topk_method noaux_tc goes with scoring_func sigmoid")
        if experts % self.n_group:
            raise InputError(f"model config: {experts} experts cannot be cut into n_group={self.n_group} equal groups")
        if self.topk_method == "noaux_tc" and experts // self.n_group < 2:
            raise InputError("model config: a group score is the sum of the two best, so a group needs two experts")
        reachable = experts // self.n_group * self.topk_group
        if not 1 <= self.topk_group <= self.n_group or not 1 <= self.num_experts_per_tok <= reachable:
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
    def from_hf(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Read a Hugging Face `config.json` of the DeepSeek V2 or V3 family.

        Raises InputError for another architecture or a setting this code does not compute.
        """
        kind = str(values.get("model_type"))
        kind = {"kimi_k2": "deepseek_v3"}.get(kind, kind)  # Kimi-K2 publishes the V3 architecture under its own name
        if kind not in ARCHITECTURES:
            raise InputError(
                f"config.json: model_type {values.get('model_type')!r} is not known here; "
                f"known: {', '.join([*ARCHITECTURES, 'kimi_k2'])}"
            )
        known = {field.name for field in fields(cls)} - {"model_type", "rope_scaling", "rope_theta"}
        chosen = {name: values[name] for name in known if values.get(name) is not None}
        defaults: dict[str, Any] = {  # what the published files leave out
            "q_lora_rank": None, "n_routed_experts": None, "n_shared_experts": None, "pad_token_id": None,
            "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0, "initializer_range": 0.02,
        }  # fmt: skip
        if kind == "deepseek_v2":
            defaults |= {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
            defaults |= {"routed_scaling_factor": 1.0, "first_k_dense_replace": 0}
        missing = [
            name
            for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank")
            if name not in chosen
        ]
        if missing:
            raise InputError(f"config.json: {', '.join(missing)} missing; is this a whole config of a DeepSeek model?")
        for name, only in {"hidden_act": "silu", "rope_interleave": True, "mlp_bias": False}.items():
            if values.get(name, only) != only:
                raise InputError(f"config.json: {name}={values[name]!r} is not supported; only {only!r} is")
        theta, scaling = _read_rope(values)
        eos = chosen.get("eos_token_id")
        if isinstance(eos, list):
            chosen["eos_token_id"] = eos[0]
        try:
            return cls(model_type=kind, rope_theta=theta, rope_scaling=scaling, **(defaults | chosen))  # pyright: ignore[reportArgumentType]
        except TypeError as error:
            raise InputError(f"config.json: a setting has the wrong type ({error})") from None

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


def _read_rope(values: Mapping[str, Any]) -> tuple[float, Yarn | None]:
    """Base and YaRN settings from either spelling: `rope_theta` + `rope_scaling`, or `rope_parameters`."""
    rope = dict(values.get("rope_parameters") or {})
    scaling = values.get("rope_scaling") or rope
    theta = float(rope.get("rope_theta") or values.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise InputError(f"config.json: RoPE scaling {kind!r} is not supported; DeepSeek models use 'yarn'")
    names = {field.name for field in fields(Yarn)}
    chosen = {name: value for name, value in scaling.items() if name in names and value is not None}
    missing = {"factor", "original_max_position_embeddings"} - set(chosen)
    if missing:
        raise InputError(f"config.json: rope_scaling of type yarn lacks {', '.join(sorted(missing))}")
    return theta, Yarn(**chosen)
