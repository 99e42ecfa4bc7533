"""What is to be trained, as the search sees it: model, tokens, batch, context, engine of each kind of chip."""

import math
from dataclasses import dataclass, replace

from motley.errors import InputError
from motley.fleet.inventory import Pool
from motley.plan.cost_model.framework import Engine, load_engine
from motley.plan.network.flops import parameters, training_flops_per_token
from motley.plan.network.spec import Shape

TOKENS_PER_BATCH = (0.2920, 0.3271)
"""Batch in tokens = 0.2920 C^0.3271 for C training FLOPs (DeepSeek LLM, arXiv 2401.02954, equation 1)."""


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        tokens: to train on in all.
        seq_len: tokens in a sequence.
        global_batch: sequences in an optimizer step.
        engine: name of the training system; "motley" takes its CPU constants on CPUs.
        fp8: whether chips that can may compute products in fp8.
        optimizer_bytes: of optimizer state for each parameter; None: what the engine usually keeps.
    """

    shape: Shape
    tokens: float
    seq_len: int
    global_batch: int
    engine: str = "motley"
    fp8: bool = False
    optimizer_bytes: float | None = None

    @property
    def flops_per_token(self) -> float:
        return training_flops_per_token(self.shape, self.seq_len)

    @property
    def parameters(self) -> float:
        """All that is trained, MTP modules included."""
        mtp = sum(
            block.parameters + self.shape.mtp_projection().parameters + 3 * self.shape.hidden_size
            for block in self.shape.mtp
        )
        return float(parameters(self.shape) + mtp)

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / (self.seq_len * self.global_batch))

    def engine_for(self, pool: Pool) -> Engine:
        name = self.engine
        if name == "motley" and pool.sheet.kind == "cpu":  # kernels of our own are for bf16
            name = "motley-cpu" if pool.best_precision == "bf16" else "motley-cpu-plain"
        engine = load_engine(name)
        if self.optimizer_bytes is not None:
            engine = replace(engine, state_bytes=engine.state_bytes | {"optimizer": self.optimizer_bytes})
        return engine if pool.speed == 1 else engine.at_speed(pool.speed)

    def precision_for(self, pool: Pool) -> str:
        """fp8 if asked for and possible; else what the pool's file or sheet says.

        Raises InputError if the engine cannot.
        """
        engine = self.engine_for(pool)
        if self.fp8 and "fp8" in pool.precisions and "fp8" in engine.matmul_efficiency:
            return "fp8"
        if pool.best_precision in engine.matmul_efficiency:
            return pool.best_precision
        raise InputError(
            f"the engine {engine.name} was never measured in {pool.best_precision}, which pool {pool.name!r} "
            f"computes in; choose another --engine"
        )


def default_batch(shape: Shape, tokens: float, seq_len: int) -> int:
    """Sequences per step by DeepSeek's scaling law, rounded to a power of two; at least one."""
    factor, power = TOKENS_PER_BATCH
    wanted = factor * (training_flops_per_token(shape, seq_len) * tokens) ** power / seq_len
    return 2 ** max(0, round(math.log2(max(wanted, 1))))
