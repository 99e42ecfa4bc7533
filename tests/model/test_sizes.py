"""Named sizes are the published ones: every value of their config.json, every parameter."""

import dataclasses
import json
from typing import Any

import pytest
import torch

from motley.errors import InputError
from motley.model import SIZES, ModelConfig, Transformer

YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
PUBLISHED: dict[str, dict[str, Any]] = {
    # deepseek-ai/DeepSeek-V3
    "v3": {
        "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 129280,
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1, "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1,
        "n_routed_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "topk_method": "noaux_tc", "n_group": 8,
        "topk_group": 4, "num_experts_per_tok": 8, "moe_layer_freq": 1, "first_k_dense_replace": 3,
        "norm_topk_prob": True, "scoring_func": "sigmoid", "hidden_act": "silu", "max_position_embeddings": 163840,
        "initializer_range": 0.02, "rms_norm_eps": 1e-6, "rope_theta": 10000,
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "attention_bias": False,
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
    },
    # deepseek-ai/DeepSeek-V2-Lite
    "v2-lite": {
        "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "vocab_size": 102400,
        "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
        "num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 2, "n_routed_experts": 64,
        "routed_scaling_factor": 1.0, "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "qk_nope_head_dim": 128, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 6, "moe_layer_freq": 1, "first_k_dense_replace": 1, "norm_topk_prob": False,
        "scoring_func": "softmax", "hidden_act": "silu", "max_position_embeddings": 163840, "initializer_range": 0.02,
        "rms_norm_eps": 1e-6, "rope_theta": 10000,
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, "attention_bias": False,
        "tie_word_embeddings": False, "bos_token_id": 100000, "eos_token_id": 100001,
    },
    # moonshotai/Moonlight-16B-A3B
    "moonlight": {
        "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 163840,
        "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
        "num_nextn_predict_layers": 0, "num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 2,
        "n_routed_experts": 64, "routed_scaling_factor": 2.446, "kv_lora_rank": 512, "q_lora_rank": None,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "topk_method": "noaux_tc", "n_group": 1,
        "topk_group": 1, "num_experts_per_tok": 6, "moe_layer_freq": 1, "first_k_dense_replace": 1,
        "norm_topk_prob": True, "scoring_func": "sigmoid", "hidden_act": "silu", "max_position_embeddings": 8192,
        "initializer_range": 0.02, "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "rope_scaling": None,
        "attention_bias": False, "tie_word_embeddings": False, "bos_token_id": 163584, "eos_token_id": 163585,
    },
}  # fmt: skip
PARAMETERS = {"v2-lite": 15_706_484_224, "moonlight": 15_960_108_544, "v3": 671_026_404_352}
MTP_OF_V3 = 11_610_067_968


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_named_size_says_what_the_published_config_says(name: str) -> None:
    ours = SIZES[name].to_hf()
    for key, value in PUBLISHED[name].items():
        assert ours[key] == value, key


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_as_the_named_size(name: str) -> None:
    assert ModelConfig.from_hf(PUBLISHED[name]) == SIZES[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_counted_exactly(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(SIZES[name])
    counts = {key: parameter.numel() for key, parameter in model.named_parameters()}
    mtp = sum(count for key, count in counts.items() if key.startswith("mtp."))
    assert sum(counts.values()) - mtp == PARAMETERS[name]
    assert mtp == (MTP_OF_V3 if name == "v3" else 0)


@pytest.mark.parametrize("name", SIZES)
def test_a_config_survives_its_file(name: str) -> None:
    assert ModelConfig.from_hf(json.loads(json.dumps(SIZES[name].to_hf()))) == SIZES[name]


def test_the_other_spelling_of_rope_is_read_too() -> None:
    values = {key: value for key, value in PUBLISHED["v3"].items() if key not in ("rope_theta", "rope_scaling")}
    values["rope_parameters"] = {**PUBLISHED["v3"]["rope_scaling"], "rope_theta": 10000, "rope_type": "yarn"}
    del values["rope_parameters"]["type"]
    assert ModelConfig.from_hf(values) == SIZES["v3"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not known"),
        ({"model_type": None}, "is not known here"),
        ({"hidden_size": None}, "hidden_size missing"),
        ({"hidden_size": "wide"}, "wrong type"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "RoPE scaling 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "lacks original_max_position_embeddings"),
        ({"n_group": 7}, "cannot be cut into n_group=7"),
        ({"topk_group": 9}, "topk_group=9"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0"),
        ({"qk_rope_head_dim": 63}, "must be even"),
        ({"scoring_func": "softmax"}, "goes with scoring_func sigmoid"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused_in_a_sentence(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as refused:
        ModelConfig.from_hf(PUBLISHED["v3"] | change)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_kimi_k2_is_read_as_the_architecture_it_is() -> None:
    config = ModelConfig.from_hf(PUBLISHED["v3"] | {"model_type": "kimi_k2"})
    assert dataclasses.replace(config) == SIZES["v3"]
