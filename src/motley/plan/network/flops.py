"""Parameters, FLOPs and bytes of one token: computed here, used by planner, report and benchmarks alike.

    parts(model, S)             one row per part of the network          [parameters | active | forward FLOPs]
      parameters, active_...    = sum of the first columns
      forward_flops_per_token   = sum of the third
      training_flops_per_token  = 3 x forward: the backward pass multiplies by every matrix twice,
                                  once for the gradient of its input and once for its own

Counted are products (one multiplication and one addition are 2 FLOPs), as in "Insights into DeepSeek-V3"
(arXiv 2505.09343, table 2: 250 GFLOP per training token at 4,096 tokens); norms, softmax and the choice of
experts are below one percent and left out. Work that repeats itself (activation checkpointing) is not
counted either: these are the FLOPs the mathematics needs, so that a share of the peak computed from them is
honest. `model` is motley's own ModelConfig or the NetworkSpec of any family.
"""

from dataclasses import dataclass

from motley.model import ModelConfig
from motley.plan.network.spec import BlockSpec, Matmul, NetworkSpec, deepseek

TRAINING_OVER_FORWARD = 3
MTP = "MTP module"


@dataclass(frozen=True)
class NetworkPart:
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


def network_parts(model: ModelConfig | NetworkSpec, context_length: int) -> list[NetworkPart]:
    """The rows of the bill, MTP modules last (V2 report sections 2.1, 2.2; V3 report section 2).

    Args:
        model: the shape of the model.
        context_length: tokens in a sequence; a token attends to half of them on average (causal). For packed
            documents with attention confined to each, give the mean length of a document.

    A tied head holds no parameters of its own but multiplies all the same.
    """
    shape = as_network(model)
    hidden, head = shape.hidden_size, shape.head
    blocks = [part for block in shape.blocks for part in _block(block, context_length)]
    own_head = 0 if shape.tied else head.parameters
    rows = [
        NetworkPart(
            "embedding", shape.embedding_parameters, shape.embedding_parameters, 0
        ),  # looked up, not multiplied
        *_summed(blocks),
        NetworkPart("final norm", shape.final_norm, shape.final_norm, 0),
        NetworkPart("head", own_head, own_head, 2 * head.active),
    ]
    for depth, block in enumerate(shape.mtp):
        # Two norms of the inputs, the projection of both side by side, a whole block, a norm before the head.
        projection = shape.mtp_projection()
        around = projection.parameters + 3 * hidden
        rows.append(
            NetworkPart(
                f"{MTP} {depth + 1}",
                around + block.parameters,
                around + block.active,
                2 * (projection.active + head.active) + block.forward_flops(context_length),
            )
        )
    return rows


def parameters(model: ModelConfig | NetworkSpec) -> int:
    """All parameters of the main model, embedding and head included, as published counts have it.

    The routing bias is not one of them: no gradient trains it.
    """
    return sum(row.parameters for row in network_parts(model, 0) if not _is_mtp(row))


def active_parameters(model: ModelConfig | NetworkSpec) -> int:
    """Parameters of the main model that work on one token, embedding and head included.

    V3: 37.55 billion; 36.6 without the embedding table, which multiplies nothing.
    """
    return sum(row.active for row in network_parts(model, 0) if not _is_mtp(row))


def multiplying_parameters(model: ModelConfig | NetworkSpec) -> int:
    """Parameters of the main model that a token is multiplied by: the active ones without norms and lookups."""
    return round(sum(row.forward_flops for row in network_parts(model, 0) if not _is_mtp(row)) / 2)


def mtp_parameters(model: ModelConfig | NetworkSpec) -> int:
    """Parameters the MTP modules have besides the main model's (they share its embedding and head)."""
    return sum(row.parameters for row in network_parts(model, 0) if _is_mtp(row))


def forward_flops_per_token(model: ModelConfig | NetworkSpec, context_length: int) -> float:
    """FLOPs of the forward pass per token of a training batch, MTP modules included."""
    return sum(row.forward_flops for row in network_parts(model, context_length))


def training_flops_per_token(model: ModelConfig | NetworkSpec, context_length: int) -> float:
    """FLOPs of forward and backward pass per token, MTP modules included.

    For the published numbers, which leave the MTP modules out, set `num_nextn_predict_layers` to 0.
    """
    return TRAINING_OVER_FORWARD * forward_flops_per_token(model, context_length)


def kv_cache_bytes_per_token(model: ModelConfig | NetworkSpec, bytes_per_value: int = 2) -> int:
    """Bytes the cache of the main model holds per token; 2 bytes per value are bf16.

    A layer of MLA keeps the compressed latent and the rotary key that all heads share (V2 report, section 2.1.2);
    other families keep keys and values.
    """
    return sum(block.kv_numbers for block in as_network(model).blocks) * bytes_per_value


def as_network(model: ModelConfig | NetworkSpec) -> NetworkSpec:
    return deepseek(model) if isinstance(model, ModelConfig) else model


def _is_mtp(row: NetworkPart) -> bool:
    return row.name.startswith(MTP)


def _block(block: BlockSpec, context_length: int) -> list[NetworkPart]:
    """The parts of one layer."""
    return [
        NetworkPart("norms and biases", block.extras, block.extras, 0),
        *(_product(matmul) for matmul in block.matmuls),
        NetworkPart("attention between tokens", 0, 0, block.attention_flops(context_length)),
    ]


def _product(matmul: Matmul) -> NetworkPart:
    return NetworkPart(matmul.part, matmul.parameters, matmul.active, 2 * matmul.active)


def _summed(rows: list[NetworkPart]) -> list[NetworkPart]:
    """Rows of the same name added up, in order of first appearance."""
    summed: dict[str, NetworkPart] = {}
    for row in rows:
        before = summed.get(row.name, NetworkPart(row.name, 0, 0, 0))
        summed[row.name] = NetworkPart(
            row.name,
            before.parameters + row.parameters,
            before.active + row.active,
            before.forward_flops + row.forward_flops,
        )
    return list(summed.values())
