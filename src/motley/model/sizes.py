"""Named sizes: four of our own that fit small machines, and published shapes under their published values."""

from typing import Any

from motley.model.config import ModelConfig, Yarn

_SMALL_CONTEXT: dict[str, Any] = {
    "max_position_embeddings": 4096,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

SIZES: dict[str, ModelConfig] = {
    # minutes on a CPU without 16-bit products
    "pico": ModelConfig(
        vocab_size=512, hidden_size=128, intermediate_size=384, moe_intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, q_lora_rank=None, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16,
        v_head_dim=32, n_routed_experts=8, num_experts_per_tok=2, num_nextn_predict_layers=0, **_SMALL_CONTEXT,
    ),
    # minutes on two CPU cores
    "nano": ModelConfig(
        vocab_size=4096, hidden_size=192, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, q_lora_rank=None, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16,
        v_head_dim=32, n_routed_experts=8, num_experts_per_tok=2, **_SMALL_CONTEXT,
    ),
    # hours on a CPU, minutes on any GPU
    "micro": ModelConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=768, moe_intermediate_size=128, num_hidden_layers=6,
        num_attention_heads=4, q_lora_rank=None, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=16,
        v_head_dim=32, n_routed_experts=16, num_experts_per_tok=4, **_SMALL_CONTEXT,
    ),
    # a day on one good GPU
    "small": ModelConfig(
        vocab_size=32768, hidden_size=1024, intermediate_size=4096, moe_intermediate_size=512, num_hidden_layers=16,
        num_attention_heads=16, q_lora_rank=None, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32,
        v_head_dim=64, n_routed_experts=64, num_experts_per_tok=6, **_SMALL_CONTEXT,
    ),
    # deepseek-ai/DeepSeek-V2-Lite, config.json
    "v2-lite": ModelConfig(
        model_type="deepseek_v2", vocab_size=102400, hidden_size=2048, intermediate_size=10944,
        moe_intermediate_size=1408, num_hidden_layers=27, num_attention_heads=16, q_lora_rank=None, kv_lora_rank=512,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64, n_shared_experts=2,
        num_experts_per_tok=6, n_group=1, topk_group=1, routed_scaling_factor=1.0, norm_topk_prob=False,
        scoring_func="softmax", topk_method="greedy", first_k_dense_replace=1, num_nextn_predict_layers=0,
        max_position_embeddings=163840, initializer_range=0.02, bos_token_id=100000, eos_token_id=100001,
        rope_scaling=Yarn(factor=40, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707),
    ),
    # moonshotai/Moonlight-16B-A3B, config.json
    "moonlight": ModelConfig(
        vocab_size=163840, hidden_size=2048, intermediate_size=11264, moe_intermediate_size=1408,
        num_hidden_layers=27, num_attention_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
        n_group=1, topk_group=1, routed_scaling_factor=2.446, first_k_dense_replace=1, num_nextn_predict_layers=0,
        max_position_embeddings=8192, rope_theta=50000.0, rms_norm_eps=1e-5, initializer_range=0.02,
        bos_token_id=163584, eos_token_id=163585,
    ),
    # deepseek-ai/DeepSeek-V3, config.json
    "v3": ModelConfig(
        initializer_range=0.02,
        rope_scaling=Yarn(factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0),
    ),
}  # fmt: skip
