"""Ranks that hold copies of the same weights compare them now and then: copies that differ are no longer one model.

    weights, routers' biases ──▶ a number for each group of holders ──▶ everyone's, with the step's other numbers
                                                                        one differs: all stop with a sentence

With ZeRO 0 and in an elastic job every holder updates its own copy and relies on all computing the same bits. From
ZeRO 1 on copies are sent by their owner; comparing them finds machines that transmit or keep them wrongly.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from motley.errors import InputError
from motley.model import Transformer
from motley.parallel.communicator import Communicator
from motley.parallel.zero.flat_buffers import FlatBuffers

COMPARE_EVERY = 10  # steps: a pass over the weights beside ten of theirs, and of all that training reads and writes
CHUNK = {"cpu": 2**16}  # numbers that are widened at once: they stay in the cache
CHUNK_ELSE = 2**24
MASK = 2**52 - 1  # what a float64 of a message holds exactly
MIX = 0x9E3779B1


def checksum(tensor: Tensor) -> Tensor:
    """Of the bits of fp32 numbers, in [0, 2^52); equal for equal bits, and hardly ever for others.

    Not a plain sum: one number a bit higher and another a bit lower must not cancel.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for bits in tensor.detach().reshape(-1).view(torch.int32).split(CHUNK.get(tensor.device.type, CHUNK_ELSE)):
        wide = bits.to(torch.int64)
        total += (wide * (wide + MIX)).sum()
    return total & MASK


class CopyCheck:
    """What of this rank's state other ranks hold too.

    Args:
        model: this rank's stage.
        shards: its parts.
        comm: all ranks.
    """

    def __init__(self, model: Transformer, shards: FlatBuffers, comm: Communicator) -> None:
        self.comm, self.zero = comm, shards.zero
        self.groups = sorted({part.holders for part in shards.all_parts if len(part.holders) > 1})
        self._tensors: dict[tuple[int, ...], list[Tensor]] = {group: [] for group in self.groups}
        for holders, run in groupby(shards.here, lambda part: part.holders):
            if holders in self._tensors and self.zero < 3:
                self._tensors[holders].append(shards.weights.span(list(run)))
        holders_of = {part.name.rpartition(".")[0]: part.holders for part in shards.all_parts}
        names = set(model.state_dict())
        for name, buffer in model.named_buffers():
            if name in names and (holders := holders_of[name.rpartition(".")[0]]) in self._tensors:
                self._tensors[holders].append(buffer)

    def checksums(self) -> list[float]:
        """Of each group of holders, in the same order on every rank; 0 where this one is not among them."""
        with torch.no_grad():
            zero = torch.zeros((), dtype=torch.int64, device=self.comm.device)
            sums = [sum((checksum(one) for one in self._tensors[group]), zero) & MASK for group in self.groups]
        return [float(value) for value in torch.stack(sums).tolist()] if sums else []

    def check(self, everyone: Sequence[Sequence[float]], step: int) -> None:
        """Raises InputError, on every rank, naming those whose copies differ.

        Args:
            everyone: each rank's checksums.
            step: after which they were taken.
        """
        for number, group in enumerate(self.groups):
            found = [everyone[rank][number] for rank in group]
            (usual, count), *others = Counter(found).most_common()
            if not others:
                continue
            odd = [self.comm.among_all(rank) for rank, value in zip(group, found, strict=True) if value != usual]
            rest = [self.comm.among_all(rank) for rank, value in zip(group, found, strict=True) if value == usual]
            if count <= len(group) / 2:
                who = f"ranks {_listed(sorted([*odd, *rest]))} hold copies of the same weights that differ"
            else:
                who = (
                    f"rank{'s' * (len(odd) > 1)} {_listed(odd)} hold{'s' * (len(odd) == 1)} weights that differ from "
                    f"the copies of rank{'s' * (len(rest) > 1)} {_listed(rest)}"
                )
            raise InputError(f"{who} after step {step}: {self._why()}")

    def _why(self) -> str:
        again = "start the job again, it goes on from its newest checkpoint"
        if self.zero:
            return f"a machine computes, keeps or transmits wrongly; {again} without it"
        return (
            "each updates its own copy, and their machines do not come to the same bits; choose --zero 1, where each "
            f"weight is updated once and sent to the others (without --elastic), and {again}"
        )


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:-1])) + " and " * (len(ranks) > 1) + str(ranks[-1])
