"""Does the training state of a model fit? Asked before anything is allocated: a system short of memory kills."""

import torch

from motley.errors import InputError
from motley.fleet.probe import device_memory, host_memory, in_gigabytes
from motley.model import ModelConfig
from motley.plan.cost import parts
from motley.train.optimizer import OptimizerName

FP32_BYTES = 4
STATES = {"muon": 1, "adamw": 2}  # tensors of a parameter's size (Muon leaves AdamW's two to the few others)


def state_bytes(config: ModelConfig, optimizer: OptimizerName) -> int:
    """The least that training holds: weights, gradients and optimizer state in fp32; activations come on top."""
    return sum(part.parameters for part in parts(config, 0)) * FP32_BYTES * (2 + STATES[optimizer])


def check_memory(config: ModelConfig, optimizer: OptimizerName, device: torch.device) -> None:
    """Raises InputError when `device` cannot hold the training state of such a model."""
    held = device_memory(device)[1] or host_memory()[0]
    needed = state_bytes(config, optimizer)
    if needed > held:
        raise InputError(
            f"training this model takes at least {in_gigabytes(needed)} for weights, gradients and optimizer state, "
            f"and {device} has {in_gigabytes(held)}; choose a smaller --model"
        )
