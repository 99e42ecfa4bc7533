"""Numbers on a slow link: 32, 8 or 4 bits each, and what rounding took away goes along with the next message.

    values    0.30 -0.10 0.02 ... │ ...        blocks of 128, each with its largest number as scale
    8 bits     127   -42    8     │            code = round(value / scale * 127), one byte
    4 bits       7    -2    0     │            code = round(value / scale * 7), two in a byte

Every reader decodes the same bytes by the same operations, each of them exact to the last bit on any machine (one
multiplication, one division), so that all arrive at the same numbers.
"""

from typing import Literal

import torch
from torch import Tensor

Bits = Literal[32, 8, 4]
BLOCK = 128
LARGEST = {8: 127, 4: 7}


def encode(values: Tensor, bits: Bits) -> Tensor:
    """fp32 [n] → bytes, uint8: `encoded_bytes(n, bits)` of them."""
    if bits == 32:
        return values.contiguous().view(torch.uint8).clone()
    blocks = _blocks(values)
    scale = blocks.abs().amax(1, keepdim=True)
    codes = (blocks / scale.clamp(min=torch.finfo(torch.float32).tiny) * LARGEST[bits]).round().to(torch.int8)
    codes = codes.view(torch.uint8).flatten()
    if bits == 4:
        codes = (codes[0::2] & 15) | (codes[1::2] << 4)
    return torch.cat([scale.flatten().view(torch.uint8), codes])


def decode(message: Tensor, count: int, bits: Bits) -> Tensor:
    """The inverse of `encode`, up to rounding: fp32 [count]."""
    if bits == 32:
        return message.clone().view(torch.float32)
    edge = 4 * -(-count // BLOCK)
    scale, codes = message[:edge].clone().view(torch.float32), message[edge:]
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=1).flatten()
        signed = codes.to(torch.int8)
        numbers = torch.where(signed > 7, signed - 16, signed)
    else:
        numbers = codes.view(torch.int8)
    return (numbers.view(-1, BLOCK) * (scale / LARGEST[bits])[:, None]).flatten()[:count]


def encoded_bytes(count: int, bits: Bits) -> int:
    """Bytes that `count` numbers travel as."""
    blocks = -(-count // BLOCK)
    return 4 * count if bits == 32 else blocks * (4 + BLOCK * bits // 8)


def _blocks(values: Tensor) -> Tensor:
    """[n] → [blocks, BLOCK], zeros behind."""
    return torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
