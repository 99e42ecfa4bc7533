"""Which network is meant: a published shape by name, or a Hugging Face `config.json`.

Published shapes are those that measurements are quoted for, by name, with the values of their papers and config.json.
"""

from pathlib import Path

from motley.errors import InputError
from motley.files import read_json
from motley.model import SIZES, ModelConfig
from motley.plan.shape import Shape, deepseek, from_hf, gpt, llama

V2 = ModelConfig(  # deepseek-ai/DeepSeek-V2, config.json
    model_type="deepseek_v2",
    vocab_size=102400,
    hidden_size=5120,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    num_hidden_layers=60,
    num_attention_heads=128,
    n_routed_experts=160,
    n_shared_experts=2,
    num_experts_per_tok=6,
    n_group=8,
    topk_group=3,
    routed_scaling_factor=16.0,
    norm_topk_prob=False,
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    first_k_dense_replace=1,
    num_nextn_predict_layers=0,
)

_LLAMA_1 = "Llama (arXiv 2302.13971), table 2"
_LLAMA_3 = "Llama 3 (arXiv 2407.21783), table 3"
_MEGATRON = "Megatron (arXiv 2205.05198), table 3"


def known_shapes() -> dict[str, Shape]:
    """Name → shape."""
    shapes = [
        *(deepseek(config, name, "motley.model.SIZES") for name, config in SIZES.items()),
        deepseek(V2, "v2", "deepseek-ai/DeepSeek-V2, config.json"),
        gpt(6144, 48, 64, 2048, 51200, "gpt-22b", _MEGATRON),
        gpt(12288, 96, 96, 2048, 51200, "gpt3-175b", _MEGATRON),
        gpt(20480, 105, 128, 2048, 51200, "mt-nlg-530b", _MEGATRON),
        gpt(25600, 128, 160, 2048, 51200, "gpt-1t", _MEGATRON),
        gpt(1024, 24, 16, 2048, 50272, "opt-350m", "facebook/opt-350m, with a full-width embedding", ffn=4096),
        gpt(2560, 32, 20, 2048, 50257, "gpt-neo-2.7b", "EleutherAI/gpt-neo-2.7B, config.json"),
        llama(4096, 32, 32, 32, 11008, 2048, 32000, "llama-7b", _LLAMA_1),
        llama(5120, 40, 40, 40, 13824, 2048, 32000, "llama-13b", _LLAMA_1),
        llama(6656, 60, 52, 52, 17920, 2048, 32000, "llama-33b", _LLAMA_1),
        llama(8192, 80, 64, 64, 22016, 2048, 32000, "llama-65b", _LLAMA_1),
        llama(8192, 80, 64, 8, 28672, 4096, 32000, "llama-2-70b", "Llama 2 (arXiv 2307.09288)"),
        llama(4096, 32, 32, 8, 14336, 8192, 128256, "llama-3-8b", _LLAMA_3),
        llama(8192, 80, 64, 8, 28672, 8192, 128256, "llama-3-70b", _LLAMA_3),
        llama(16384, 126, 128, 8, 53248, 8192, 128256, "llama-3-405b", _LLAMA_3),
        llama(
            4096,
            32,
            32,
            8,
            14336,
            32768,
            32000,
            "mixtral-8x7b",
            "Mixtral (arXiv 2401.04088), table 1",
            experts=8,
            chosen=2,
        ),
    ]
    return {shape.name: shape for shape in shapes}


def find_shape(model: str, base: Path = Path()) -> Shape:
    """The shape that `model` names: a known name, a `config.json` (relative to `base`), or a folder that holds one.

    Raises InputError saying what was looked for.
    """
    if (known := known_shapes()).get(model.lower()):
        return known[model.lower()]
    path = base / model
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise InputError(
            f"there is no model {model!r}: name one of {', '.join(known)}, "
            f"or a Hugging Face config.json (or its folder)"
        )
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} is no config.json: it holds {type(values).__name__}, not an object")
    return from_hf(values, name=path.parent.name or path.stem, source=str(path))
