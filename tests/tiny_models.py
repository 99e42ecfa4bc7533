"""Networks of a few thousand random weights, and random rows for them."""

import dataclasses
import random

import torch

from motley.data.stream import Batch
from motley.model import SIZES, ModelConfig, Transformer

VOCAB, SEQ = 40, 12
SHAPE = dataclasses.replace(
    SIZES["nano"], vocab_size=VOCAB, hidden_size=16, intermediate_size=24, moe_intermediate_size=8,
    num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    n_routed_experts=4, num_experts_per_tok=2, num_nextn_predict_layers=2,
)  # fmt: skip


def random_model(seed: int, config: ModelConfig = SHAPE) -> Transformer:
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2, generator=generator)
    return model


def random_batch(seed: int, rows: int = 6) -> Batch:
    """Rows of packed documents, some padded at the end, some targets masked as in fine-tuning."""
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    ids = torch.randint(VOCAB, (rows, SEQ), generator=generator)
    targets = torch.randint(VOCAB, (rows, SEQ), generator=generator)
    documents = torch.randint(0, 3, (rows, SEQ), generator=generator).sort(dim=1).values
    targets[torch.rand(rows, SEQ, generator=generator) < 0.2] = -100
    for row in range(rows):
        padding = chance.choice([0, 0, 3, SEQ - 1])
        documents[row, SEQ - padding :] = -1
        targets[row, SEQ - padding :] = -100
    targets[0] = -100  # a row that teaches nothing
    return Batch(ids, targets, documents)


FEW = 4  # rows of an expert are padded to a multiple: every new number of rows costs a kernel's compilation
DEEP = dataclasses.replace(SHAPE, num_hidden_layers=4, first_k_dense_replace=1)
ODD = {  # shapes that the sweep above does not draw
    "tied": dataclasses.replace(DEEP, tie_word_embeddings=True),
    "dense, no MTP": dataclasses.replace(DEEP, n_routed_experts=None, num_nextn_predict_layers=0),
    "V2": dataclasses.replace(
        DEEP, model_type="deepseek_v2", scoring_func="softmax", topk_method="greedy", norm_topk_prob=False
    ),
}


class Rows:
    """A stream of random rows, a pure function of the position, as `TokenStream` is."""

    seq_len, rows_per_epoch = 12, 100

    def rows(self, position: int, count: int) -> Batch:
        whole = [random_batch(row, rows=2) for row in range(position, position + count)]
        parts = zip(*((b.input_ids[1:], b.targets[1:], b.documents[1:]) for b in whole), strict=True)
        return Batch(*(torch.cat(tensors) for tensors in parts))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9))
