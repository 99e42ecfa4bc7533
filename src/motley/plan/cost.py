"""Parameters, FLOPs and bytes of one token: computed here, used by planner, report and benchmarks alike.

    parts(config, S)            one row per part of the network          [parameters | active | forward FLOPs]
      parameters, active_...    = sum of the first columns
      forward_flops_per_token   = sum of the third
      training_flops_per_token  = 3 x forward: the backward pass multiplies by every matrix twice,
                                  once for the gradient of its input and once for its own

Counted are products (one multiplication and one addition are 2 FLOPs), as in "Insights into DeepSeek-V3"
(arXiv 2505.09343, table 2: 250 GFLOP per training token at 4,096 tokens); norms, softmax and the choice of
experts are below one percent and left out. Work that repeats itself (activation checkpointing) is not
counted either: these are the FLOPs the mathematics needs, so that a share of the peak computed from them is
honest.
"""

from dataclasses import dataclass

from motley.model import ModelConfig

TRAINING_OVER_FORWARD = 3
MTP = "MTP module"


@dataclass(frozen=True)
class Part:
    """One part of the network, summed over all layers that have it.

    Attributes:
        name: what it is, for tables.
        parameters: numbers held.
        active: parameters that work on one token (of the routed experts only the chosen ones).
        forward_flops: FLOPs of the forward pass per token.
    """

    name: str
    parameters: int
    active: int
    forward_flops: float


def parts(config: ModelConfig, context_length: int) -> list[Part]:
    """The rows of the bill, MTP modules last (V2 report sections 2.1, 2.2; V3 report section 2).

    Args:
        config: the shape of the model.
        context_length: tokens in a sequence; a token attends to half of them on average (causal). For packed
            documents with attention confined to each, give the mean length of a document.

    A tied head holds no parameters of its own but multiplies all the same.
    """
    hidden, vocabulary = config.hidden_size, config.vocab_size
    head = vocabulary * hidden
    own_head = 0 if config.tie_word_embeddings else head
    blocks = [
        part
        for layer in range(config.num_hidden_layers)
        for part in _block(config, context_length, config.is_moe_layer(layer))
    ]
    rows = [
        Part("embedding", head, head, 0),  # a look-up, not a product
        *_summed(blocks),
        Part("final norm", hidden, hidden, 0),
        Part("head", own_head, own_head, 2 * head),
    ]
    for depth in range(config.num_nextn_predict_layers):
        # Two norms of the inputs, the projection of both side by side, a whole block, a norm before the head.
        projection = 2 * hidden * hidden
        block = _block(config, context_length, config.is_moe_layer(config.num_hidden_layers + depth))
        rows.append(
            Part(
                f"{MTP} {depth + 1}",
                projection + 3 * hidden + sum(part.parameters for part in block),
                projection + 3 * hidden + sum(part.active for part in block),
                2 * (projection + head) + sum(part.forward_flops for part in block),
            )
        )
    return rows


def parameters(config: ModelConfig) -> int:
    """All parameters of the main model, embedding and head included, as published counts have it.

    The routing bias is not one of them: no gradient trains it.
    """
    return sum(row.parameters for row in parts(config, 0) if not _is_mtp(row))


def active_parameters(config: ModelConfig) -> int:
    """Parameters of the main model that work on one token, embedding and head included.

    V3: 37.55 billion; 36.6 without the embedding table, which multiplies nothing.
    """
    return sum(row.active for row in parts(config, 0) if not _is_mtp(row))


def mtp_parameters(config: ModelConfig) -> int:
    """Parameters the MTP modules have besides the main model's (they share its embedding and head)."""
    return sum(row.parameters for row in parts(config, 0) if _is_mtp(row))


def forward_flops_per_token(config: ModelConfig, context_length: int) -> float:
    """FLOPs of the forward pass per token of a training batch, MTP modules included."""
    return sum(row.forward_flops for row in parts(config, context_length))


def training_flops_per_token(config: ModelConfig, context_length: int) -> float:
    """FLOPs of forward and backward pass per token, MTP modules included.

    For the published numbers, which leave the MTP modules out, set `num_nextn_predict_layers` to 0.
    """
    return TRAINING_OVER_FORWARD * forward_flops_per_token(config, context_length)


def kv_cache_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes the latent cache of the main model holds per token; 2 bytes per value are bf16.

    Each layer keeps the compressed latent and the rotary key that all heads share (V2 report, section 2.1.2).
    """
    return config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * bytes_per_value


def _is_mtp(row: Part) -> bool:
    return row.name.startswith(MTP)


def _block(config: ModelConfig, context_length: int, moe: bool) -> list[Part]:
    """The parts of one layer."""
    hidden = config.hidden_size
    norms = 2 * hidden + config.kv_lora_rank + (config.q_lora_rank or 0)
    if config.attention_bias:  # on the way into both latents, and out
        norms += (config.q_lora_rank or 0) + config.kv_lora_rank + config.qk_rope_head_dim + hidden
    rows = [
        Part("norms and biases", norms, norms, 0),
        _matrices("attention projections", _attention_parameters(config)),
        Part("attention between tokens", 0, 0, _attention_flops(config, context_length)),
    ]
    if not moe:
        return [*rows, _matrices("dense MLPs", 3 * hidden * config.intermediate_size)]
    experts = config.n_routed_experts or 0
    expert = 3 * hidden * config.moe_intermediate_size  # gate, up and down projection
    chosen = config.num_experts_per_tok * expert
    rows.append(_matrices("routers", hidden * experts))
    if config.n_shared_experts:
        rows.append(_matrices("shared experts", config.n_shared_experts * expert))
    rows.append(Part("routed experts", experts * expert, chosen, 2 * chosen))
    return rows


def _attention_parameters(config: ModelConfig) -> int:
    """Matrices of one MLA layer: queries (compressed or not), latent and rotary key, expansion, output."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    if config.q_lora_rank is None:
        queries = hidden * query
    else:
        queries = hidden * config.q_lora_rank + config.q_lora_rank * query
    latent = hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
    expansion = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    output = heads * config.v_head_dim * hidden
    return queries + latent + expansion + output


def _attention_flops(config: ModelConfig, context_length: int) -> float:
    """Queries times keys and weights times values of one layer, over the visible half of the context."""
    per_head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return 2 * config.num_attention_heads * per_head * context_length / 2


def _matrices(name: str, parameters: int) -> Part:
    """Matrices that multiply every token."""
    return Part(name, parameters, parameters, 2 * parameters)


def _summed(rows: list[Part]) -> list[Part]:
    """Rows of the same name added up, in order of first appearance."""
    names = list(dict.fromkeys(row.name for row in rows))
    return [
        Part(
            name,
            sum(row.parameters for row in rows if row.name == name),
            sum(row.active for row in rows if row.name == name),
            sum(row.forward_flops for row in rows if row.name == name),
        )
        for name in names
    ]
