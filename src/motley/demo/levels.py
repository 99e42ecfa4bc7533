"""What can be learned in minutes: levels from five kinds of problem down to three easy ones.

A slow machine shows a small skill well instead of five badly. Each level names what is learned, by which network, and
after how many tokens it was seen to be learned; the plan takes the richest whose tokens fit into the time.
"""

import dataclasses
from dataclasses import dataclass

from motley.data.tasks import FAMILIES
from motley.errors import InputError
from motley.model import SIZES, ModelConfig
from motley.train.config import PretrainConfig, SftConfig


@dataclass(frozen=True)
class Level:
    """One skill and the way to it.

    Attributes:
        name: a word for files and tests.
        families: kinds of problem that are trained, offered and evaluated.
        size: of the network, in `motley.model.SIZES`.
        vocab_size: tokens of the tokenizer.
        pretrain: settings of reading.
        finetune: settings of the problems.
        pretrain_tokens: read before the problems, where it was tried.
        finetune_tokens: of problems after that.
        accuracy: share of fresh problems answered right then (docs/log.md); None: not tried yet.
        tokens_per_problem: mean length of a conversation.
    """

    name: str
    families: tuple[str, ...]
    size: str
    vocab_size: int
    pretrain: PretrainConfig
    finetune: SftConfig
    pretrain_tokens: int
    finetune_tokens: int
    accuracy: float | None
    tokens_per_problem: int

    @property
    def shape(self) -> ModelConfig:
        return dataclasses.replace(SIZES[self.size], vocab_size=self.vocab_size)


ALL = tuple(FAMILIES)
THREE = ("letter_counting", "spell_backward", "number_sorting")
THREE_EASY = ("letter_counting:easy", "spell_backward:easy", "number_sorting:easy")

_READ = PretrainConfig(
    model="pico", batch_rows=8, micro_batch=8, seq_len=128, learning_rate=4e-3, embedding_rate=4.0, mtp_weight=0.0,
    bias_speed=1e-2, confine_to_document=True,
)  # fmt: skip
_SOLVE = SftConfig(batch_rows=8, micro_batch=8, seq_len=128, learning_rate=2.5e-3, decay_share=0.7, bias_speed=1e-2)
_PICO = {"size": "pico", "vocab_size": 512, "pretrain": _READ, "finetune": _SOLVE}
_WIDE = {
    "vocab_size": 2048, "tokens_per_problem": 62, "pretrain_tokens": 1_500_000, "finetune_tokens": 4_700_000,
    "finetune": SftConfig(batch_rows=8, micro_batch=8, seq_len=256, learning_rate=3e-3),
}  # fmt: skip


def _wide(name: str, size: str, accuracy: float | None) -> Level:
    """All families, learned by one of the larger networks with everything that DeepSeek-V3 has."""
    read = PretrainConfig(model=size, batch_rows=16, micro_batch=16, seq_len=256, learning_rate=4e-3)
    return Level(name, ALL, size, pretrain=read, accuracy=accuracy, **_WIDE)


LEVELS = (
    _wide("five", "nano", 0.96),
    Level("five-small", ALL, **_PICO, pretrain_tokens=100_000, finetune_tokens=3_000_000, accuracy=None,
          tokens_per_problem=65),
    Level("three", THREE, **_PICO, pretrain_tokens=60_000, finetune_tokens=1_500_000, accuracy=0.83,
          tokens_per_problem=63),
    Level("three-easy", THREE_EASY, **_PICO, pretrain_tokens=60_000, finetune_tokens=900_000, accuracy=0.86,
          tokens_per_problem=54),
)  # fmt: skip
"""For a CPU, the richest first."""

ACCELERATOR_LEVELS = (_wide("five-micro", "micro", None), *LEVELS)


def levels_of(device: str, wanted: str = "auto") -> tuple[Level, ...]:
    """What a kind of device may be asked to learn, the richest first; or only the level that is wanted.

    Raises InputError for a level that is not known.
    """
    if wanted == "auto":
        return LEVELS if device == "cpu" else ACCELERATOR_LEVELS
    names = [level.name for level in ACCELERATOR_LEVELS]
    if wanted not in names:
        raise InputError(f"--level {wanted} is not known; there are auto, {', '.join(names)}")
    return (level_named(wanted),)


def level_named(name: str) -> Level:
    """Raises KeyError for an unknown name."""
    return {level.name: level for level in ACCELERATOR_LEVELS}[name]
