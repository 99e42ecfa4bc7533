"""Shapes: read from anyone's config.json, counted as transformers counts, named where measurements are quoted."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from motley.errors import InputError
from motley.plan.network.flops import parameters
from motley.plan.network.hf import from_hf
from motley.plan.network.registry import find_network, known_networks, model_table

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
    "qwen2": transformers.Qwen2Config(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, intermediate_size=160,
        vocab_size=301,
    ),
    "qwen3": transformers.Qwen3Config(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, intermediate_size=160,
        vocab_size=301, head_dim=32, tie_word_embeddings=True,
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, moe_intermediate_size=48,
        vocab_size=301, head_dim=16, num_experts=4, num_experts_per_tok=2,
    ),
    "gpt_neox": transformers.GPTNeoXConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=200, vocab_size=301,
    ),
    "bloom": transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=301),
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
    assert parameters(find_network(str(tmp_path))) == counted


def test_opt_is_counted_with_the_two_positions_it_never_uses():
    config = transformers.OPTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128, vocab_size=301,
        max_position_embeddings=128, word_embed_proj_dim=64,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    counted = sum(p.numel() for p in model.parameters())
    assert parameters(from_hf(config.to_dict(), "opt", "here")) == counted - 2 * 64


def test_gpt_neo_is_counted_but_for_the_biases_it_leaves_out():
    config = transformers.GPTNeoConfig(
        hidden_size=64, num_layers=2, num_heads=4, vocab_size=301, max_position_embeddings=128,
        attention_types=[[["global", "local"], 1]],
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    counted = sum(p.numel() for p in model.parameters())
    assert parameters(from_hf(config.to_dict(), "gpt-neo", "here")) == counted + 2 * 3 * 64


def published() -> dict[str, float]:
    """Billions of parameters of every network in models.yaml, as its publishers say."""
    table = model_table()
    rows = {name: row for kind in ("gpt", "llama") for group in table[kind].values() for name, row in group.items()}
    counts = {name: next(cell for cell in reversed(row) if not isinstance(cell, dict)) for name, row in rows.items()}
    deepseek = {name: row["published"] for group in table["deepseek"].values() for name, row in group.items()}
    return counts | deepseek | {"v3": 671.03, "v2-lite": 15.71, "moonlight": 15.96}


@pytest.mark.parametrize(("name", "billions"), published().items())
def test_published_shapes_have_their_published_size(name: str, billions: float):
    """Within 2 %, or where papers print two digits, to those."""
    counted = parameters(known_networks()[name]) / 1e9
    assert counted == pytest.approx(billions, rel=0.02) or round(counted, 1) == billions


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("DeepSeek-V3", "v3"), ("deepseek-ai/DeepSeek-V3-Base", "v3"), ("DeepSeek-R1", "v3"), ("deepseek_v3", "v3"),
        ("DeepSeek-V2", "v2"), ("deepseek-ai/DeepSeek-V2-Lite-Chat", "v2-lite"), ("DeepSeek 67B", "deepseek-67b"),
        ("moonshotai/Kimi-K2-Instruct", "kimi-k2"), ("Moonlight-16B-A3B", "moonlight"),
        ("Llama-2-7B", "llama-2-7b"), ("meta-llama/Llama-2-70b-hf", "llama-2-70b"), ("LLaMA 2 (13B)", "llama-2-13b"),
        ("LLaMA-7B", "llama-7b"), ("llama 30b", "llama-33b"), ("Llama-3 8B", "llama-3-8b"),
        ("Llama-3.1-405B", "llama-3.1-405b"), ("llama-3-1-8b", "llama-3.1-8b"), ("Meta-Llama-3-70B", "llama-3-70b"),
        ("GPT-3 175B", "gpt3-175b"), ("GPT-3", "gpt3-175b"), ("gpt3_13b", "gpt3-13b"), ("gpt2-xl", "gpt2-xl"),
        ("openai-community/gpt2", "gpt2-small"), ("GPT-2 1.5B", "gpt2-xl"), ("OPT-1.3B", "opt-1.3b"),
        ("facebook/opt-13b", "opt-13b"), ("BLOOM-176B", "bloom-176b"), ("MT-NLG 530B", "mt-nlg-530b"),
        ("Megatron-LM 8.3B", "megatron-8.3b"), ("mistralai/Mixtral-8x22B-v0.1", "mixtral-8x22b"),
        ("Mistral 7B", "mistral-7b"), ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"), ("qwen2_5_72b", "qwen2.5-72b"),
        ("EleutherAI/gpt-neox-20b", "gpt-neox-20b"), ("V3", "v3"),
    ],
)  # fmt: skip
def test_a_model_is_found_by_its_usual_names(said: str, meant: str):
    assert find_network(said) is known_networks()[meant]


def test_no_two_networks_share_a_name():
    spelled = [*known_networks(), *(other for own in model_table()["also called"].values() for other in own)]
    assert all(find_network(name).name == name for name in known_networks())
    assert len({find_network(name).name for name in spelled}) == len(known_networks())
    assert set(model_table()["also called"]) <= set(known_networks())
    for name, others in model_table()["also called"].items():
        assert {find_network(other).name for other in others} == {name}


def test_a_file_goes_before_a_name_that_is_only_like_a_known_one(tmp_path: Path):
    (tmp_path / "Llama-2-7B").mkdir()
    CONFIGS["llama"].save_pretrained(tmp_path / "Llama-2-7B")
    assert find_network("Llama-2-7B", tmp_path).hidden_size == 96
    assert find_network("llama-2-7b", tmp_path).hidden_size == 4096


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be a whole number of at least 1"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'; it must be a whole number"),
        ({"num_hidden_layers": -3}, "num_hidden_layers is -3; it must be"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5; it must be"),
        ({"intermediate_size": True}, "intermediate_size is True; it must be"),
        ({"hidden_size": None}, "of model_type llama needs the field 'hidden_size'"),
        ({"num_key_value_heads": 5}, "6 attention heads cannot share 5 key-value heads equally"),
        ({"model_type": "bert"}, "model_type 'bert' is not known here; known: deepseek_v2"),
        ({"model_type": "deepseek_v3"}, "kv_lora_rank missing"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "dense layers among those with experts"),
    ],
)
def test_a_bad_config_json_is_refused_with_file_and_field(tmp_path: Path, changed: dict[str, object], said: str):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"].to_dict() | changed))
    with pytest.raises(InputError, match=said) as caught:
        find_network(str(tmp_path))
    assert tmp_path.name in str(caught.value)


def test_a_name_that_is_no_model_is_answered_with_those_near(tmp_path: Path):
    with pytest.raises(InputError, match=r"there is no model 'v33'; nearest of \d+ known ones: .*v3.* config.json"):
        find_network("v33")
    with pytest.raises(InputError, match=r"is a folder without a config\.json"):
        find_network(str(tmp_path))
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(InputError, match="it holds list, not an object"):
        find_network(str(tmp_path))
    bad = {"model_type": "gpt2", "n_embd": 50, "n_layer": 2, "n_head": 4, "vocab_size": 10}
    (tmp_path / "config.json").write_text(json.dumps(bad))
    with pytest.raises(InputError, match="hidden size 50 cannot be cut into 4 equal attention heads"):
        find_network(str(tmp_path))
