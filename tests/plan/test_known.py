"""Shapes: read from anyone's config.json, counted as transformers counts, named where measurements are quoted."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from motley.errors import InputError
from motley.plan.cost import parameters
from motley.plan.known import find_shape, known_shapes
from motley.plan.shape import from_hf

CONFIGS = {
    "llama": transformers.LlamaConfig(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, intermediate_size=160,
        vocab_size=301,
    ),
    "llama, tied": transformers.LlamaConfig(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=6, intermediate_size=160,
        vocab_size=301, tie_word_embeddings=True,
    ),
    "mixtral": transformers.MixtralConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=301,
    ),
    "gpt2": transformers.GPT2Config(n_embd=48, n_layer=3, n_head=4, vocab_size=301, n_positions=128),
    "gpt2, wide": transformers.GPT2Config(n_embd=48, n_layer=3, n_head=4, vocab_size=301, n_positions=128, n_inner=64),
    "deepseek_v3": transformers.DeepseekV3Config(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, intermediate_size=96,
        moe_intermediate_size=32, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, n_group=2,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, vocab_size=301,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_json_is_counted_as_transformers_counts_it(name: str, tmp_path: Path):
    config = CONFIGS[name]
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    counted = sum(p.numel() for p in model.parameters())
    assert parameters(find_shape(str(tmp_path))) == counted


def test_qwen_is_counted_as_transformers_counts_it_but_for_its_biases(tmp_path: Path):
    config = transformers.Qwen2Config(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, intermediate_size=160,
        vocab_size=301,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    counted = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("bias"))
    assert parameters(from_hf(config.to_dict(), "qwen", "here")) == counted


def test_opt_is_counted_with_the_two_positions_it_never_uses():
    config = transformers.OPTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128, vocab_size=301,
        max_position_embeddings=128, word_embed_proj_dim=64,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    counted = sum(p.numel() for p in model.parameters())
    assert parameters(from_hf(config.to_dict(), "opt", "here")) == counted - 2 * 64


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("v3", 671.03), ("v2", 235.74), ("v2-lite", 15.71), ("gpt3-175b", 175), ("gpt-22b", 22), ("mt-nlg-530b", 530),
        ("gpt-1t", 1008), ("llama-7b", 6.7), ("llama-13b", 13.0), ("llama-33b", 32.5), ("llama-65b", 65.2),
        ("llama-2-70b", 69.0), ("llama-3-8b", 8.03), ("llama-3-70b", 70.6), ("llama-3-405b", 405.9),
        ("mixtral-8x7b", 46.7),
    ],
)  # fmt: skip
def test_published_shapes_have_their_published_size(name: str, billions: float):
    assert parameters(known_shapes()[name]) / 1e9 == pytest.approx(billions, rel=0.012)


def test_a_name_that_is_no_model_is_answered_with_those_there_are(tmp_path: Path):
    with pytest.raises(InputError, match=r"there is no model 'v33': name one of nano, .*v3.* config.json"):
        find_shape("v33")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="model_type 'bert' is not known here; known: deepseek_v2"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 4}')
    with pytest.raises(InputError, match="of model_type llama needs the field 'hidden_size'"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(InputError, match="it holds list, not an object"):
        find_shape(str(tmp_path))
    bad = {"model_type": "gpt2", "n_embd": 50, "n_layer": 2, "n_head": 4, "vocab_size": 10}
    (tmp_path / "config.json").write_text(json.dumps(bad))
    with pytest.raises(InputError, match="hidden size 50 cannot be cut into 4 equal attention heads"):
        find_shape(str(tmp_path))
