"""Many numbers from one rank's tensors to another's: in messages of bounded size, through both hosts' memory.

    tensors    │  a  │ b │          c          │ d │        on any device, one after the other
    messages   ├── 32 MB ──┼── 32 MB ──┼─ rest ─┤          fp32, each in the host's memory at both ends

So no device ever holds a copy of what travels, and a host no more than one message of it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from motley.parallel.buckets import MESSAGE_BYTES
from motley.parallel.communicator import Communicator

PARCEL_NUMBERS = MESSAGE_BYTES // torch.float32.itemsize


def send(tensors: Sequence[Tensor], comm: Communicator, to: int) -> None:
    """Send all numbers of `tensors` to rank `to`, which receives them tensor by tensor (`Arrivals`)."""
    parcel, filled = torch.empty(min(PARCEL_NUMBERS, sum(tensor.numel() for tensor in tensors))), 0
    for tensor in tensors:
        left = tensor.detach().reshape(-1)
        while len(left):
            fits = min(len(left), len(parcel) - filled)
            parcel[filled : filled + fits] = left[:fits]
            left, filled = left[fits:], filled + fits
            if filled == len(parcel):
                comm.send(parcel, to)
                filled = 0
    if filled:
        comm.send(parcel[:filled], to)


class Arrivals:
    """What rank `source` sends, tensor after tensor.

    Args:
        comm: of both.
        source: who calls `send`.
        shapes: of all that it sends, in order.
    """

    def __init__(self, comm: Communicator, source: int, shapes: Sequence[Sequence[int]]) -> None:
        self._comm, self._source = comm, source
        self._to_come = sum(math.prod(shape) for shape in shapes)
        self._room = torch.empty(min(PARCEL_NUMBERS, self._to_come))
        self._parcel = self._room[:0]

    def fill(self, tensor: Tensor) -> Tensor:
        """`tensor`, which lies in one piece, with the next numbers in it."""
        left = tensor.view(-1)
        while len(left):
            if not len(self._parcel):
                self._parcel = self._room[: self._to_come]
                self._comm.receive(self._parcel, self._source)
                self._to_come -= len(self._parcel)
            fits = min(len(left), len(self._parcel))
            left[:fits] = self._parcel[:fits]
            left, self._parcel = left[fits:], self._parcel[fits:]
        return tensor
