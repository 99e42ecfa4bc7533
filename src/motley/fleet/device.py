"""Device and number formats to compute in."""

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
"""Dtype between matrix products; with fp8 only the operands of linear layers are fp8."""


def choose_device(wanted: str) -> torch.device:
    """`auto` is the accelerator if there is one. Raises InputError for a device that this machine lacks."""
    if wanted == "auto":
        return best_device()
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {wanted} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def number_format(precision: Precision, machine: Callable[[], Machine]) -> Format:
    """The format to compute in; `auto` is the one that `machine` was measured to gain from."""
    return machine().compute_dtype if precision == "auto" else precision  # pyright: ignore[reportReturnType]
