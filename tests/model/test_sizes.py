"""Named sizes are the published ones: every value of their config.json, every parameter."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from motley.errors import InputError
from motley.model import SIZES, ModelConfig, Transformer, Yarn

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
        ({"hidden_size": "wide"}, "hidden_size is 'wide'; it must be a whole number"),
        ({"hidden_size": 32.0}, "hidden_size is 32.0; it must be a whole number"),
        ({"hidden_size": True}, "hidden_size is True; it must be a whole number"),
        ({"rope_theta": "a"}, "rope_theta is 'a'; it must be a number"),
        ({"rope_theta": 10**400}, "it must be a number"),
        ({"rope_theta": -1}, "rope_theta is -1; it must be above 0"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan; it must be a number"),
        ({"norm_topk_prob": "false"}, "norm_topk_prob is 'false'; it must be true or false"),
        ({"topk_method": "foo"}, "topk_method is 'foo'; it must be 'noaux_tc' or 'greedy' or 'group_limited_greedy'"),
        ({"topk_method": "greedy", "scoring_func": "relu"}, "scoring_func is 'relu'"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1; it must be at least 0"),
        ({"moe_layer_freq": 0}, "moe_layer_freq is 0"),
        ({"n_group": 0}, "n_group is 0"),
        ({"n_shared_experts": -1}, "n_shared_experts is -1"),
        ({"intermediate_size": -3}, "intermediate_size is -3"),
        ({"q_lora_rank": -1}, "q_lora_rank is -1; it must be at least 1"),
        ({"q_lora_rank": [1]}, "q_lora_rank is [1]; it must be a whole number or null"),
        ({"eos_token_id": []}, "eos_token_id is an empty list"),
        ({"eos_token_id": ["a"]}, "eos_token_id is 'a'"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok missing"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; it must be an object or null"),
        ({"rope_scaling": [40]}, "rope_scaling is [40]; it must be an object or null"),
        ({"rope_parameters": 7}, "rope_parameters is 7; it must be an object or null"),
        ({"rope_scaling": {**YARN, "factor": "40"}}, "rope_scaling.factor is '40'; it must be a number"),
        ({"rope_scaling": {**YARN, "factor": 0}}, "rope_scaling.factor is 0; it must be above 0"),
        ({"rope_scaling": {**YARN, "type": ["yarn"]}}, "RoPE scaling ['yarn'] is not supported"),
        ({"rope_scaling": {"factor": 40}}, "rope_scaling: RoPE scaling None is not supported"),
        ({"rope_scaling": {**YARN, "attention_factor": 1.5}}, "rope_scaling.attention_factor=1.5"),
        ({"rope_scaling": {**YARN, "truncate": False}}, "rope_scaling.truncate=False"),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "default", "factor": 2}}, "rope_parameters.factor=2"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "RoPE scaling 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "lacks original_max_position_embeddings"),
        ({"n_group": 7}, "cannot be cut into n_group=7"),
        ({"topk_group": 9}, "topk_group=9"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok=129"),
        ({"qk_rope_head_dim": 63}, "must be even"),
        ({"scoring_func": "softmax"}, "goes with scoring_func sigmoid"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused_in_a_sentence(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as refused:
        ModelConfig.from_hf(PUBLISHED["v3"] | change)
    assert said in str(refused.value)
    assert str(refused.value).startswith("config.json: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("values", [[], "deepseek_v3", None, 7])
def test_a_config_that_is_no_object_is_refused_by_the_name_of_its_file(values: Any) -> None:
    with pytest.raises(InputError, match=r"^somewhere/config.json: it holds no JSON object"):
        ModelConfig.from_hf(values, "somewhere/config.json")


def test_what_transformers_writes_beside_yarns_settings_does_no_harm() -> None:
    """As transformers 5 writes it: both names of the method, no attention_factor, the default of truncate."""
    values = {key: value for key, value in PUBLISHED["v3"].items() if key not in ("rope_theta", "rope_scaling")}
    values["rope_parameters"] = {**PUBLISHED["v3"]["rope_scaling"], "rope_theta": 10000.0, "rope_type": "yarn",
                                 "attention_factor": None, "truncate": True}  # fmt: skip
    assert ModelConfig.from_hf(values) == SIZES["v3"]
    values["rope_parameters"] = {"rope_theta": 50000.0, "rope_type": "default"}
    assert ModelConfig.from_hf(values) == dataclasses.replace(SIZES["v3"], rope_theta=50000.0, rope_scaling=None)


@pytest.mark.parametrize("kind", [transformers.DeepseekV2Config, transformers.DeepseekV3Config])
def test_a_config_that_transformers_makes_is_read(kind: Any, tmp_path: Path) -> None:
    name = "v3" if kind is transformers.DeepseekV3Config else "v2-lite"
    values = {key: value for key, value in PUBLISHED[name].items() if key not in ("model_type", "architectures")}
    kind(**values).save_pretrained(tmp_path)
    assert ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text())) == SIZES[name]


def test_kimi_k2_is_read_as_the_architecture_it_is() -> None:
    theirs = {
        "model_type": "kimi_k2", "vocab_size": 163840, "num_nextn_predict_layers": 0, "num_attention_heads": 64,
        "n_routed_experts": 384, "routed_scaling_factor": 2.827, "n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-6,
        "first_k_dense_replace": 1, "max_position_embeddings": 131072, "rope_theta": 50000.0, "bos_token_id": 163584,
        "eos_token_id": 163586, "pad_token_id": 163839, "num_key_value_heads": 64,
        "rope_scaling": {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 1.0,
                         "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    }  # fmt: skip
    config = ModelConfig.from_hf(PUBLISHED["v3"] | theirs)
    assert (config.model_type, config.n_routed_experts, config.eos_token_id) == ("deepseek_v3", 384, 163586)
    assert config.rope_scaling == Yarn(32.0, 4096, beta_fast=1.0, mscale_all_dim=1.0)


def test_the_values_of_deepseek_v2_are_read() -> None:
    theirs = {
        "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 60,
        "num_attention_heads": 128, "q_lora_rank": 1536, "n_routed_experts": 160, "n_group": 8, "topk_group": 3,
        "routed_scaling_factor": 16.0, "topk_method": "group_limited_greedy",
    }  # fmt: skip
    config = ModelConfig.from_hf(PUBLISHED["v2-lite"] | theirs)
    assert {name: getattr(config, name) for name in theirs} == theirs
