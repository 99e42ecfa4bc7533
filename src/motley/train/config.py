"""Settings of the training stages: the same names on the command line, in `config.json` and in Python."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from motley.emulation.cpu_throttle import Way
from motley.emulation.roles import LinksBy
from motley.errors import InputError
from motley.fleet.device import Precision
from motley.parallel.communicator import PATIENCE_SECONDS
from motley.parallel.diloco.quantize import Bits
from motley.parallel.layout import Zero
from motley.train.expert_balance import SLOWEST, ByLength
from motley.train.lr_schedule import Schedule, sequence_length, stages_of
from motley.train.optimizer import Moments, OptimizerName


@dataclass(frozen=True)
class TrainingConfig:
    """What both training stages share."""

    out: Path = Path("runs/default")
    """Folder of this stage's run; the same command goes on where it stopped."""
    steps: int = 500
    batch_rows: int = 16
    """Sequences in one optimizer step."""
    micro_batch: int = 16
    """Sequences computed at a time; lower it when memory is short (the result stays the same)."""
    seq_len: int = 256
    """Tokens in a sequence."""
    learning_rate: float = 4e-3
    """Peak, for Muon and AdamW alike (Muon's update is scaled to AdamW's size)."""
    embedding_rate: float = 1.0
    """The embedding's learning rate beside Muon, as a multiple of the others'; 10 learns faster from random weights."""
    optimizer: OptimizerName = "muon"
    moments: Moments = "fp32"
    """What the optimizer's state is kept in; bf16 halves it, as DeepSeek-V3 did."""
    schedule: Schedule = "wsd"
    warmup_steps: int = 20
    decay_share: float = 0.4
    """Share of the steps in which wsd decays."""
    final_share: float = 0.05
    """Learning rate at the end, as a share of the peak."""
    weight_decay: float = 0.1
    clip: float = 1.0
    """Largest gradient norm."""
    mtp_weight: float = 0.3
    """Weight of the multi-token-prediction loss; 0 leaves its modules out of the step."""
    balance_weight: float = 1e-4
    """Weight (alpha) of the sequence-wise balance loss."""
    bias_speed: Annotated[float, tyro.conf.arg(help_behavior_hint="(default: by the number of steps)")] = ByLength(
        SLOWEST
    )
    """How far (gamma) the router's bias moves towards balance after each step. Not given: 3 / steps, at least 0.001
    (DeepSeek-V3's) and at most 0.01, so that the bias comes far enough in short runs too."""
    confine_to_document: bool = False
    """Attention stays within each document of a packed sequence (DeepSeek-V3 pretrained without)."""
    precision: Precision = "auto"
    """Number format of this worker's products over fp32 weights; it may be another on each. fp16 scales its loss. fp8
    rounds the operands of linear layers, with bf16 between (emulated on CPUs, slow). auto takes what the plan says, or
    bf16 (fp16 on chips without it) where this kind of chip gains from it, else fp32."""
    recompute: bool = False
    """Activation checkpointing: less memory, about a third more computing."""
    device: str = "auto"
    plan: Path | None = None
    """A plan file (`motley plan`) that says who holds and computes what; without one every worker of a crew (torchrun)
    holds the whole model and takes rows in proportion to its measured speed, or, where some cannot hold it, a plan is
    made from a probe of them."""
    zero: Zero | None = None
    """Without a plan: what the workers of a crew share instead of each keeping the whole: 0 nothing, 1 optimizer state,
    2 gradients too (more messages), 3 weights too (more still, and about a third more computing). Not given: 1, and
    with --live 0, the only one there."""
    emulate: str = ""
    """Pretend that the workers of this machine are the chips of a fleet file, which says how they are `emulated:`; or
    that they are unequal: one relative speed each, such as 1:2:4:1."""
    emulate_by: Way = "auto"
    """How slowness is made: cap (a control group takes CPU time away), priority (coarse), wait (after each piece of
    work); auto caps where the system allows it and waits elsewhere."""
    emulate_links: LinksBy = "wait"
    """What makes pretended links slow: waiting, or what `motley launch emulated` made, which sets this itself."""
    islands: str = "1"
    """Islands of workers, joined by slow links: how many (2) or the workers of each (3:1). Each trains on its own rows,
    and now and then they meet (docs/uneven.md). A plan says for itself which islands there are."""
    sync_every: int | None = None
    """Steps between two meetings of islands (not given: as the plan says, or 30)."""
    inner_steps: Literal["measured", "planned"] = "measured"
    """How many steps each island takes between meetings: by its measured speed, or by the plan's (without one by its
    number of workers), which makes a run of islands repeatable bit for bit."""
    fragments: int = 1
    """Islands exchange the model in so many pieces, spread over the time between meetings."""
    overlap: int = 0
    """Steps that islands go on for while an exchange is under way."""
    outer_bits: Bits = 8
    """Bits of a number that islands exchange."""
    outer_learning_rate: float = 0.8
    outer_momentum: float = 0.5
    """Of the step that all islands take together (SGD with Nesterov momentum)."""
    live: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Start any number of these at any time, with the same --out and without torchrun: they find each other there and
    train together; when one dies the others repeat the step, and newcomers get their state from the others."""
    patience: float = PATIENCE_SECONDS
    """Seconds that a worker of a crew waits for a silent one before it ends; one that died is noticed at once."""
    seed: int = 0
    valid_every: int = 100
    """Steps between validations; the last step always validates."""
    valid_rows: int = 64
    """Sequences of held-out data in one validation."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step, Ctrl-C and SIGTERM also write one."""
    keep_last: int = 2
    """Checkpoints kept besides the best."""

    def __post_init__(self) -> None:
        if isinstance(self.bias_speed, ByLength) and self.steps >= 1:
            object.__setattr__(self, "bias_speed", ByLength.of(self.steps))
        positive = ("steps", "batch_rows", "micro_batch", "seq_len", "valid_every", "valid_rows", "checkpoint_every",
                    "keep_last", "fragments")  # fmt: skip
        for name in positive:
            self._demand(name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup_steps", "seed"):
            self._demand(name, getattr(self, name) >= 0, "at least 0")
        for name in ("weight_decay", "mtp_weight", "balance_weight", "bias_speed"):
            self._demand(name, 0 <= getattr(self, name) < math.inf, "at least 0 and finite")
        for name in ("decay_share", "final_share"):
            self._demand(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        self._demand("learning_rate", 0 < self.learning_rate < math.inf, "above 0 and finite")
        self._demand("embedding_rate", 0 < self.embedding_rate < math.inf, "above 0 and finite")
        self._demand("clip", self.clip > 0, "above 0")
        self._demand("sync_every", self.sync_every is None or self.sync_every >= 1, "at least 1")
        self._demand("overlap", self.overlap >= 0, "at least 0")
        self._demand("outer_learning_rate", 0 < self.outer_learning_rate < math.inf, "above 0 and finite")
        self._demand("outer_momentum", 0 <= self.outer_momentum < 1, "at least 0 and below 1")
        self._demand("patience", 0 < self.patience < math.inf, "above 0 and finite")

    def length(self, step: int) -> int:
        """Tokens of the sequences of a step."""
        return self.seq_len

    def hint_weight(self) -> float:
        """Weight of counts of the text in what is learned."""
        return 0.0

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """What each setting is where nobody says."""
        return {field.name: field.default for field in dataclasses.fields(cls)}

    def _demand(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be {what}")


@dataclass(frozen=True)
class PretrainConfig(TrainingConfig):
    """Train a model on text."""

    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH|hf:NAME")] = ()
    """Text to train on: a folder made by `motley data`, or text files and folders (prepared first); none: the Python
    standard library on this machine."""
    model: str = "nano"
    """A new model: a size (nano, micro, small, v2-lite, moonlight, v3) or the path of a config.json. Or one to start
    from: a run or a checkpoint folder, of which only the weights are taken."""
    seq_len_warmup: str = ""
    """Shorter sequences first: 64:0.3,128:0.6 cuts text into 64 tokens for the first 30 % of the steps and into 128
    until 60 %. Cheaper, and a new model learns faster so."""
    ngram_weight: float = 0.0
    """Weight, from 0 to 1, of what usually follows the last two tokens, beside the one token that did: all of the text
    is counted at the start, in seconds. For short runs from random weights, which learn much faster so."""

    def __post_init__(self) -> None:
        super().__post_init__()
        stages_of(self.seq_len_warmup)
        self._demand("ngram_weight", 0 <= self.ngram_weight <= 1, "from 0 to 1")

    def length(self, step: int) -> int:
        return sequence_length(stages_of(self.seq_len_warmup), self.seq_len, step / self.steps)

    def hint_weight(self) -> float:
        return self.ngram_weight


@dataclass(frozen=True)
class FinetuneConfig(TrainingConfig):
    """Fine-tune a model on conversations."""

    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH")] = ()
    """Conversations: jsonl or parquet with `messages` (role, content, optionally reasoning_content)."""
    model: Path = Path("runs/default")
    """A checkpoint folder or a run to start from."""
    learning_rate: float = 2e-3
    mtp_weight: float = 0.0
    confine_to_document: bool = True
