"""What is to be trained: model, tokens, batch, context, and the framework of each kind of chip."""

import math
from dataclasses import dataclass, replace

from motley.errors import InputError
from motley.fleet.inventory import Pool
from motley.plan.cost_model.framework import Framework, load_framework
from motley.plan.network.flops import parameters, training_flops_per_token
from motley.plan.network.spec import NetworkSpec

TOKENS_PER_BATCH = (0.2920, 0.3271)
"""Batch in tokens = 0.2920 C^0.3271 for C training FLOPs (DeepSeek LLM, arXiv 2401.02954, equation 1)."""


@dataclass(frozen=True)
class Workload:
    """One training run.

    Attributes:
        tokens: to train on in all.
        seq_len: tokens in a sequence.
        global_batch: sequences in an optimizer step.
        framework: name of the training framework; "motley" takes its CPU constants on CPUs.
        fp8: whether chips that can may compute products in fp8.
        optimizer_bytes: of optimizer state for each parameter; None: the framework's.
    """

    shape: NetworkSpec
    tokens: float
    seq_len: int
    global_batch: int
    framework: str = "motley"
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

    def framework_for(self, pool: Pool) -> Framework:
        name = self.framework
        if name == "motley" and pool.sheet.kind == "cpu":  # kernels of our own are for bf16
            name = "motley-cpu" if pool.best_precision == "bf16" else "motley-cpu-plain"
        framework = load_framework(name)
        if self.optimizer_bytes is not None:
            framework = replace(framework, state_bytes=framework.state_bytes | {"optimizer": self.optimizer_bytes})
        return framework if pool.speed == 1 else framework.at_speed(pool.speed)

    def precision_for(self, pool: Pool) -> str:
        """fp8 if asked for and possible; else what the pool's file or sheet says.

        Raises InputError if the framework cannot.
        """
        framework = self.framework_for(pool)
        if self.fp8 and "fp8" in pool.precisions and "fp8" in framework.matmul_efficiency:
            return "fp8"
        if pool.best_precision in framework.matmul_efficiency:
            return pool.best_precision
        raise InputError(
            f"the framework {framework.name} was never measured in {pool.best_precision}, which pool {pool.name!r} "
            f"computes in; choose another --framework"
        )


def default_batch(shape: NetworkSpec, tokens: float, seq_len: int) -> int:
    """Sequences per step by DeepSeek's scaling law, rounded to a power of two; at least one."""
    factor, power = TOKENS_PER_BATCH
    wanted = factor * (training_flops_per_token(shape, seq_len) * tokens) ** power / seq_len
    return 2 ** max(0, round(math.log2(max(wanted, 1))))
