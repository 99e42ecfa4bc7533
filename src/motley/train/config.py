"""Settings of the training stages: the same names on the command line, in `config.json` and in Python.

    PretrainConfig, SftConfig = a stage's own settings + the groups below, each a class of its own:

    model, data, optim, checkpoint      one process
    parallel, diloco                    many ranks

The fields of a config lie side by side, so a setting has one name everywhere; `motley pretrain --help` shows them group
by group.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import tyro

from motley.errors import InputError
from motley.fleet.device import Precision
from motley.train.expert_balance import SLOWEST, ByLength
from motley.train.lr_schedule import Schedule, factor, sequence_length, stages_of
from motley.train.optimizer import Moments, OptimizerName

Zero = Literal[0, 1, 2, 3]
Bits = Literal[32, 8, 4]
EmulateBy = Literal["auto", "cap", "wait"]
EmulateLinks = Literal["wait", "relay"]
COMM_TIMEOUT_SECONDS = 300.0
"""How long a rank waits for a silent one before it says so and exits. One that exited is noticed at once."""


@dataclass(frozen=True)
class ModelSettings:
    """What is added to the main loss, and how the router's bias moves."""

    mtp_weight: float = 0.3
    """Weight of the multi-token-prediction loss; 0 leaves its modules out of the step."""
    balance_weight: float = 1e-4
    """Weight (alpha) of the sequence-wise balance loss."""
    bias_speed: Annotated[float, tyro.conf.arg(help_behavior_hint="(default: by the number of steps)")] = ByLength(
        SLOWEST
    )
    """How far (gamma) the router's bias moves towards balance after each step. Not given: 3 / steps, at least 0.001
    (DeepSeek-V3's) and at most 0.01, so that the bias comes far enough in short runs too."""
    recompute: bool = False
    """Activation checkpointing: less memory, about a third more computing."""


@dataclass(frozen=True)
class DataSettings:
    """How much is read in a step."""

    batch_rows: int = 16
    """Sequences in one optimizer step."""
    micro_batch: int = 16
    """Sequences computed at a time; lower it when memory is short (the result stays the same)."""
    seq_len: int = 256
    """Tokens in a sequence."""
    confine_to_document: bool = False
    """Attention stays within each document of a packed sequence (DeepSeek-V3 pretrained without)."""


@dataclass(frozen=True)
class OptimSettings:
    """How weights move."""

    learning_rate: float = 4e-3
    """Peak, for Muon and AdamW alike (Muon's update is scaled to AdamW's size)."""
    embedding_rate: float = 1.0
    """The embedding's learning rate beside Muon, as a multiple of the others'; 10 learns faster from random weights."""
    optimizer: OptimizerName = "muon"
    moments: Moments = "fp32"
    """Number format of the optimizer's state; bf16 halves it, as DeepSeek-V3 did."""
    schedule: Schedule = "wsd"
    warmup_steps: int = 20
    decay_share: float = 0.4
    """Share of the steps in which wsd decays."""
    final_share: float = 0.05
    """Learning rate at the end, as a share of the peak."""
    weight_decay: float = 0.1
    clip: float = 1.0
    """Largest gradient norm."""


@dataclass(frozen=True)
class CheckpointSettings:
    """When to validate and to save."""

    valid_every: int = 100
    """Steps between validations; the last step always validates."""
    valid_rows: int = 64
    """Sequences of held-out data in one validation."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step, Ctrl-C and SIGTERM also write one."""
    keep_last: int = 2
    """Checkpoints kept besides the best."""


@dataclass(frozen=True)
class ParallelSettings:
    """Many ranks, started by torchrun or `motley launch`: who holds and computes what."""

    plan: Path | None = None
    """A plan file (`motley plan`) that says who holds and computes what; without one every rank (torchrun) holds the
    whole model and takes rows in proportion to its measured speed, or, where some cannot hold it, a plan is made from a
    probe of them."""
    zero: Zero | None = None
    """Without a plan: what ranks shard instead of each keeping the whole (ZeRO): 0 nothing, 1 optimizer state, 2
    gradients too (more messages), 3 weights too (more still, and about a third more computing). Not given: 1, and with
    --elastic 0, the only one there."""
    elastic: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Start any number of these at any time, with the same --out and without torchrun: they find each other there and
    train together; when one exits the others repeat the step, and new ones get their state from the others."""
    comm_timeout: float = COMM_TIMEOUT_SECONDS
    """Seconds that a rank waits for a silent one before it exits; one that exited is noticed at once."""
    emulate: str = ""
    """Treat the ranks of this machine as the chips of a fleet file, which says how they are `emulated:`; or as unequal:
    one relative speed each, such as 1:2:4:1."""
    emulate_by: EmulateBy = "auto"
    """How slowness is made: cap (a control group takes CPU time away) or wait (after each piece of work); auto caps
    where the system allows it and waits elsewhere."""
    emulate_links: EmulateLinks = "wait"
    """What makes emulated links slow: waiting, or what `motley launch emulated` made, which sets this itself."""


@dataclass(frozen=True)
class DilocoSettings:
    """Islands of ranks joined by slow links (DiLoCo): each trains on its own rows, and now and then all take an outer
    step together."""

    islands: str = "1"
    """How many islands (2), or the ranks of each (3:1). A plan says for itself which islands there are."""
    sync_every: int | None = None
    """Steps between two outer steps (not given: as the plan says, or 30)."""
    inner_steps: Literal["measured", "planned"] = "measured"
    """How many steps each island takes between outer steps: by its measured speed, or by the plan's (without one by its
    number of ranks), which makes a run of islands repeatable bit for bit."""
    fragments: int = 1
    """Islands exchange the model in so many pieces, spread over the time between outer steps."""
    overlap: int = 0
    """Steps that islands go on for while an exchange is under way."""
    outer_bits: Bits = 8
    """Bits of a number that islands exchange."""
    outer_learning_rate: float = 0.8
    outer_momentum: float = 0.5
    """Of the outer optimizer (SGD with Nesterov momentum)."""


@dataclass(frozen=True)
class RunSettings:
    """What a run is."""

    out: Path = Path("runs/default")
    """Folder of this stage's run; the same command goes on where it stopped."""
    steps: int = 500
    precision: Precision = "auto"
    """Compute dtype on this rank (fp32 master weights); ranks may differ. fp16 scales its loss. fp8 rounds the operands
    of linear layers, with bf16 between (emulated on CPUs, slow). auto takes what the plan says, or bf16 (fp16 on chips
    without it) where this kind of chip gains from it, else fp32."""
    device: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class TrainingConfig(
    DilocoSettings, ParallelSettings, CheckpointSettings, OptimSettings, DataSettings, ModelSettings, RunSettings
):
    """What both training stages share."""

    GROUPS: ClassVar[dict[str, type]] = {
        "": RunSettings,
        "model": ModelSettings,
        "data": DataSettings,
        "optim": OptimSettings,
        "checkpoint": CheckpointSettings,
        "parallel": ParallelSettings,
        "diloco": DilocoSettings,
    }
    """As `--help` shows them, in this order."""
    RENAMED: ClassVar[dict[str, str]] = {"live": "elastic", "patience": "comm_timeout"}
    """Settings by the names that they had before: read from old run folders, accepted on the command line."""

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
        self._demand("comm_timeout", 0 < self.comm_timeout < math.inf, "above 0 and finite")

    @classmethod
    def of_saved(cls, values: Mapping[str, Any]) -> Self:
        """Settings that were kept in a file, by the names that they have now or had before."""
        return cls(**{cls.RENAMED.get(name, name): value for name, value in values.items()})

    def length(self, step: int) -> int:
        """Tokens of the sequences of a step."""
        return self.seq_len

    def ngram_share(self) -> float:
        """Share of n-gram soft targets in what is learned."""
        return 0.0

    def learning_rate_at(self, step: int) -> float:
        """Of the update of a step."""
        return self.learning_rate * factor(
            step, self.steps, self.schedule, self.warmup_steps, self.decay_share, self.final_share
        )

    @property
    def needs_ranks(self) -> bool:
        """Whether this is a job of ranks (motley.parallel), be it of one, and not of this process alone."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        return bool(world_size > 1 or self.plan or self.elastic or self.emulate or self.islands != "1")

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """What each setting is where nobody says."""
        return {one.name: one.default for one in dataclasses.fields(cls)}

    def _demand(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be {what}")


@dataclass(frozen=True)
class PretrainSettings(RunSettings):
    """What is pretrained on what."""

    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH|hf:NAME")] = ()
    """Text to train on: a folder made by `motley data`, or text files and folders (prepared first); none: the Python
    standard library on this machine."""
    model: str = "nano"
    """A new model: a size (nano, micro, small, v2-lite, moonlight, v3) or the path of a config.json. Or one to start
    from: a run or a checkpoint folder, of which only the weights are taken."""


@dataclass(frozen=True)
class TextSettings(DataSettings):
    """How much is read in a step, and what is learned of it."""

    seq_len_warmup: str = ""
    """Shorter sequences first: 64:0.3,128:0.6 cuts text into 64 tokens for the first 30 % of the steps and into 128
    until 60 %. Cheaper, and a new model learns faster so."""
    ngram_weight: float = 0.0
    """Weight, from 0 to 1, of n-gram soft targets (what usually follows the last two tokens) beside the one token that
    did: all of the text is counted at the start, in seconds. For short runs from random weights, which learn much
    faster so."""


@dataclass(frozen=True)
class PretrainConfig(TextSettings, PretrainSettings, TrainingConfig):
    """Train a model on text."""

    GROUPS: ClassVar[dict[str, type]] = {**TrainingConfig.GROUPS, "": PretrainSettings, "data": TextSettings}

    def __post_init__(self) -> None:
        super().__post_init__()
        stages_of(self.seq_len_warmup)
        self._demand("ngram_weight", 0 <= self.ngram_weight <= 1, "from 0 to 1")

    def length(self, step: int) -> int:
        return sequence_length(stages_of(self.seq_len_warmup), self.seq_len, step / self.steps)

    def ngram_share(self) -> float:
        return self.ngram_weight


@dataclass(frozen=True)
class SftSettings(RunSettings):
    """What is fine-tuned on what."""

    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH")] = ()
    """Conversations: jsonl or parquet with `messages` (role, content, optionally reasoning_content)."""
    model: Path = Path("runs/default")
    """A checkpoint folder or a run to start from."""


@dataclass(frozen=True)
class SftConfig(SftSettings, TrainingConfig):
    """Fine-tune a model on conversations."""

    GROUPS: ClassVar[dict[str, type]] = {**TrainingConfig.GROUPS, "": SftSettings}

    learning_rate: float = 2e-3
    mtp_weight: float = 0.0
    confine_to_document: bool = True
