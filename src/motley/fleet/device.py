"""Where to compute and in which number format: decided by rule, and said."""

from collections.abc import Callable
from typing import Literal

import torch

from motley.errors import InputError
from motley.fleet.probe import Machine, best_device

Format = Literal["bf16", "fp16", "fp32", "fp8"]
Precision = Literal["auto", "bf16", "fp16", "fp32", "fp8"]

ACTIVATIONS: dict[Format, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.bfloat16,
}
"""What stands between the products; with fp8 only the operands of the linear layers' products are fp8."""


def choose_device(wanted: str) -> torch.device:
    """`auto` takes the accelerator if there is one. Raises InputError for a device this machine lacks."""
    if wanted == "auto":
        return best_device()
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {wanted} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def number_format(precision: Precision, machine: Callable[[], Machine]) -> Format:
    """What to compute in; `auto` asks `machine` what it measured to be worth it."""
    return machine().compute_dtype if precision == "auto" else precision  # pyright: ignore[reportReturnType]
