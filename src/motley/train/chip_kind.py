"""The kind of a rank's chip: ranks of one kind share a number format and compute the same bits."""

import torch

from motley.fleet.capabilities import capabilities
from motley.model import native


def kind_of_chip(device: torch.device) -> str:
    """What a chip can do, and on a CPU which kernels of ours compute there: the same for two that round alike."""
    return capabilities(device, kernels() if device.type == "cpu" else "")


def kernels() -> str:
    """Our own kernels that this process computes with, in words."""
    return f"{native.library().stem}, {native.describe()}"
