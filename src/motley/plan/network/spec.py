"""A network as the planner sees it: its products, attention, parameters and messages.

    NetworkSpec = embedding, blocks (each: products, attention, experts), MTP blocks, head

Parameters, FLOPs, memory, seconds and messages are summed from these operators, so that no number is written down
twice. A NetworkSpec is made from its family's configuration: motley's own `ModelConfig`, `GptConfig` or `LlamaConfig`.
"""

from dataclasses import dataclass, replace
from typing import Literal

from motley.errors import InputError
from motley.model import ModelConfig

Split = Literal["column", "row", "none"]


@dataclass(frozen=True)
class GptConfig:
    """GPT-2, GPT-3, OPT, BLOOM, GPT-NeoX: full attention, a GELU or ReLU MLP, biases.

    Attributes:
        context: the longest sequence.
        intermediate_size: inner width of the MLP; None: four times the hidden size.
        embedding_size: width of the word embedding; None: the hidden size (OPT-350M's is narrower).
        learned_positions: a table of positions (else rotary or ALiBi, which have no parameters).
        embedding_norm: a norm right behind the embedding (BLOOM).
        tied: the head is the word embedding.
    """

    hidden_size: int
    layers: int
    heads: int
    context: int
    vocabulary: int
    intermediate_size: int | None = None
    embedding_size: int | None = None
    learned_positions: bool = True
    embedding_norm: bool = False
    tied: bool = True


@dataclass(frozen=True)
class LlamaConfig:
    """Llama, Mistral, Qwen: grouped-query attention, a gated MLP; with `experts`, Mixtral and Qwen3's MoE.

    Attributes:
        intermediate_size: inner width of the MLP, or of one expert.
        context: the longest sequence.
        head_dim: None: hidden size over heads.
        experts, chosen: routed experts of every layer, and how many of them see a token.
        qk_norm: norms of queries and keys (Qwen3).
        qkv_bias: biases of queries, keys and values (Qwen2).
        tied: the head is the word embedding.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    context: int
    vocabulary: int
    head_dim: int | None = None
    experts: int = 0
    chosen: int = 0
    qk_norm: bool = False
    qkv_bias: bool = False
    tied: bool = False


NetworkConfig = ModelConfig | GptConfig | LlamaConfig


@dataclass(frozen=True)
class Matmul:
    """One product: a token's vector of `inner` numbers becomes `outer` numbers.

    Attributes:
        part: row of the bill it belongs to.
        inner, outer: sides of the matrix.
        split: how tensor parallelism cuts it: by columns, by rows, or not at all.
        held: matrices of this kind in a layer (routed experts), of which `chosen` work on one token.
    """

    part: str
    inner: int
    outer: int
    split: Split
    held: int = 1
    chosen: int = 1

    @property
    def parameters(self) -> int:
        return self.held * self.inner * self.outer

    @property
    def active(self) -> int:
        return self.chosen * self.inner * self.outer


@dataclass(frozen=True)
class BlockSpec:
    """One layer.

    Attributes:
        matmuls: every product with a weight.
        heads, qk_dim, v_dim: attention between tokens (causal), numbers per head.
        extras: parameters that multiply nothing: norms, biases.
        kv_numbers: numbers a token leaves in the cache for decoding.
        gated: the MLP multiplies two projections (SwiGLU) rather than passing one through GELU.
        experts, chosen: routed experts and how many of them see a token; 0 in dense layers.
        groups: most groups of experts (nodes, when placed so) a token may reach; 0: any.
    """

    matmuls: tuple[Matmul, ...]
    heads: int
    qk_dim: int
    v_dim: int
    extras: int
    kv_numbers: int
    gated: bool
    experts: int = 0
    chosen: int = 0
    most_expert_groups: int = 0

    @property
    def parameters(self) -> int:
        return self.extras + sum(matmul.parameters for matmul in self.matmuls)

    @property
    def active(self) -> int:
        return self.extras + sum(matmul.active for matmul in self.matmuls)

    @property
    def expert_parameters(self) -> int:
        return sum(matmul.parameters for matmul in self.matmuls if matmul.held > 1)

    def attention_flops(self, context_length: int) -> float:
        """FLOPs per token, forward: queries times keys, weights times values, over the visible half."""
        return 2 * self.heads * (self.qk_dim + self.v_dim) * context_length / 2

    def forward_flops(self, context_length: int) -> float:
        return 2 * sum(matmul.active for matmul in self.matmuls) + self.attention_flops(context_length)


@dataclass(frozen=True)
class NetworkSpec:
    """A whole network.

    Attributes:
        family: "deepseek", "llama" or "gpt": for messages.
        runs: blocks in order as (block, how many in a row).
        mtp: blocks of the multi-token-prediction modules.
        embedding_parameters: tables looked up, not multiplied (word and learned position embeddings).
        tied: the head is the word embedding.
        source: where the numbers come from.
        config: what it was made from.
    """

    name: str
    family: Literal["deepseek", "llama", "gpt"]
    hidden_size: int
    vocab_size: int
    runs: tuple[tuple[BlockSpec, int], ...]
    mtp: tuple[BlockSpec, ...]
    embedding_parameters: int
    tied: bool
    max_context: int
    source: str
    config: NetworkConfig

    @property
    def num_layers(self) -> int:
        return sum(count for _, count in self.runs)

    @property
    def head(self) -> Matmul:
        return Matmul("head", self.hidden_size, self.vocab_size, "column")

    @property
    def experts(self) -> int:
        return max(block.experts for block, _ in self.runs)

    @property
    def blocks(self) -> list[BlockSpec]:
        return [block for block, count in self.runs for _ in range(count)]

    @property
    def final_norm(self) -> int:
        return self.hidden_size * (2 if self.family == "gpt" else 1)

    def mtp_projection(self) -> Matmul:
        return Matmul("MTP projection", 2 * self.hidden_size, self.hidden_size, "none")


# ------------------------------------------------------------------------------------------- DeepSeek


def deepseek(config: ModelConfig, name: str = "deepseek", source: str = "motley.model.ModelConfig") -> NetworkSpec:
    """MLA + DeepSeekMoE + MTP (V2 report 2.1, 2.2; V3 report section 2)."""
    kinds = [config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)]
    runs: list[tuple[BlockSpec, int]] = []
    for moe in kinds:
        block = _deepseek_block(config, moe)
        if runs and runs[-1][0] == block:
            runs[-1] = (block, runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    mtp = tuple(
        _deepseek_block(config, config.is_moe_layer(config.num_hidden_layers + depth))
        for depth in range(config.num_nextn_predict_layers)
    )
    return NetworkSpec(
        name=name,
        family="deepseek",
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        runs=tuple(runs),
        mtp=mtp,
        embedding_parameters=config.vocab_size * config.hidden_size,
        tied=config.tie_word_embeddings,
        max_context=config.max_position_embeddings,
        source=source,
        config=config,
    )


def _deepseek_block(config: ModelConfig, moe: bool) -> BlockSpec:
    hidden, heads = config.hidden_size, config.num_attention_heads
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    query = heads * config.qk_head_dim
    projections = "attention projections"
    rows: list[Matmul] = []
    if config.q_lora_rank is None:
        rows.append(Matmul(projections, hidden, query, "column"))
    else:
        rows.append(Matmul(projections, hidden, config.q_lora_rank, "none"))
        rows.append(Matmul(projections, config.q_lora_rank, query, "column"))
    rows.append(Matmul(projections, hidden, latent, "none"))
    rows.append(
        Matmul(projections, config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), "column")
    )
    rows.append(Matmul(projections, heads * config.v_head_dim, hidden, "row"))
    extras = 2 * hidden + config.kv_lora_rank + (config.q_lora_rank or 0)
    if config.attention_bias:  # on the way into both latents, and out
        extras += (config.q_lora_rank or 0) + latent + hidden
    experts = (config.n_routed_experts or 0) if moe else 0
    if moe:
        inner, chosen = config.moe_intermediate_size, config.num_experts_per_tok
        shared = (config.n_shared_experts or 0) * inner
        rows.append(Matmul("routers", hidden, experts, "none"))
        if shared:
            rows.append(Matmul("shared experts", hidden, 2 * shared, "column"))
            rows.append(Matmul("shared experts", shared, hidden, "row"))
        rows.append(Matmul("routed experts", hidden, 2 * inner, "column", experts, chosen))
        rows.append(Matmul("routed experts", inner, hidden, "row", experts, chosen))
    else:
        rows.append(Matmul("dense MLPs", hidden, 2 * config.intermediate_size, "column"))
        rows.append(Matmul("dense MLPs", config.intermediate_size, hidden, "row"))
    return BlockSpec(
        matmuls=tuple(rows),
        heads=heads,
        qk_dim=config.qk_head_dim,
        v_dim=config.v_head_dim,
        extras=extras,
        kv_numbers=latent,
        gated=True,
        experts=experts,
        chosen=config.num_experts_per_tok if moe else 0,
        most_expert_groups=config.topk_group if moe and config.n_group > 1 else 0,
    )


# ------------------------------------------------------------------------------------- other families


def gpt(config: GptConfig, name: str = "gpt", source: str = "") -> NetworkSpec:
    """The layers of `GptConfig`."""
    hidden, heads = config.hidden_size, config.heads
    _divides(heads, hidden, name)
    wide, narrow = config.intermediate_size or 4 * hidden, config.embedding_size or hidden
    block = BlockSpec(
        matmuls=(
            Matmul("attention projections", hidden, 3 * hidden, "column"),
            Matmul("attention projections", hidden, hidden, "row"),
            Matmul("dense MLPs", hidden, wide, "column"),
            Matmul("dense MLPs", wide, hidden, "row"),
        ),
        heads=heads,
        qk_dim=hidden // heads,
        v_dim=hidden // heads,
        extras=4 * hidden + (3 * hidden + hidden + wide + hidden),  # two norms; four biases
        kv_numbers=2 * hidden,
        gated=False,
    )
    tables = narrow * config.vocabulary + (2 * narrow * hidden if narrow != hidden else 0)
    tables += config.context * hidden * config.learned_positions + 2 * hidden * config.embedding_norm
    return NetworkSpec(
        name=name,
        family="gpt",
        hidden_size=hidden,
        vocab_size=config.vocabulary,
        runs=((block, config.layers),),
        mtp=(),
        embedding_parameters=tables,
        tied=config.tied,
        max_context=config.context,
        source=source,
        config=config,
    )


def llama(config: LlamaConfig, name: str = "llama", source: str = "") -> NetworkSpec:
    """The layers of `LlamaConfig`."""
    hidden, heads, kv_heads, ffn = config.hidden_size, config.heads, config.kv_heads, config.intermediate_size
    if config.head_dim is None:
        _divides(heads, hidden, name)
    head_dim = config.head_dim or hidden // heads
    if heads % kv_heads:
        raise InputError(f"{name}: {heads} attention heads cannot share {kv_heads} key-value heads equally")
    if config.experts and not 1 <= config.chosen <= config.experts:
        raise InputError(f"{name}: a token cannot choose {config.chosen} of {config.experts} experts")
    queries_keys_values = (heads + 2 * kv_heads) * head_dim
    rows = [
        Matmul("attention projections", hidden, queries_keys_values, "column"),
        Matmul("attention projections", heads * head_dim, hidden, "row"),
    ]
    if config.experts:
        rows.append(Matmul("routers", hidden, config.experts, "none"))
        rows.append(Matmul("routed experts", hidden, 2 * ffn, "column", config.experts, config.chosen))
        rows.append(Matmul("routed experts", ffn, hidden, "row", config.experts, config.chosen))
    else:
        rows.append(Matmul("dense MLPs", hidden, 2 * ffn, "column"))
        rows.append(Matmul("dense MLPs", ffn, hidden, "row"))
    block = BlockSpec(
        matmuls=tuple(rows),
        heads=heads,
        qk_dim=head_dim,
        v_dim=head_dim,
        extras=2 * hidden + 2 * head_dim * config.qk_norm + queries_keys_values * config.qkv_bias,
        kv_numbers=2 * kv_heads * head_dim,
        gated=True,
        experts=config.experts,
        chosen=config.chosen,
    )
    return NetworkSpec(
        name=name,
        family="llama",
        hidden_size=hidden,
        vocab_size=config.vocabulary,
        runs=((block, config.layers),),
        mtp=(),
        embedding_parameters=config.vocabulary * hidden,
        tied=config.tied,
        max_context=config.context,
        source=source,
        config=config,
    )


def _divides(heads: int, hidden: int, name: str) -> None:
    if hidden % heads:
        raise InputError(f"{name}: hidden size {hidden} cannot be cut into {heads} equal attention heads")


def network_of(config: NetworkConfig, name: str, source: str) -> NetworkSpec:
    """The network that a configuration of any family describes."""
    if isinstance(config, GptConfig):
        return gpt(config, name, source)
    if isinstance(config, LlamaConfig):
        return llama(config, name, source)
    return deepseek(config, name, source)


def without_mtp(shape: NetworkSpec) -> NetworkSpec:
    return replace(shape, mtp=())
