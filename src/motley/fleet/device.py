"""Where to compute and in which dtype: decided by rule, and said."""

from collections.abc import Callable
from typing import Literal

import torch

from motley.errors import InputError
from motley.fleet.probe import Machine, best_device


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


def compute_dtype(precision: Literal["auto", "bf16", "fp32"], machine: Callable[[], Machine]) -> torch.dtype:
    """The dtype of activations and matrix products; `auto` asks `machine` what it measured to be faster."""
    name = machine().compute_dtype if precision == "auto" else precision
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
