"""The number format of every rank, and one for the activations that travel between them.

    rank         computes in                      messages of the whole job
    A100         bf16                             bf16 if all ranks compute in bf16 or fp8, else fp32;
    H100         fp8 products, bf16 between       a rank casts what it receives
    V100, T4     fp16
    P100, CPU    fp32

A rank's `--precision` comes first, then the chip that it emulates, then the plan, then what its kind of chip was
measured to gain from.
"""

from collections.abc import Callable, Sequence

import torch

from motley.errors import InputError
from motley.fleet.device import ACTIVATIONS, Format, Precision
from motley.fleet.probe import PROBE_SECONDS, Machine, device_name, most_seconds, probe
from motley.parallel.communicator import PREPARING_SECONDS, Communicator
from motley.parallel.layout import Layout, coordinates_of
from motley.progress import note
from motley.train.chip_kind import kind_of_chip
from motley.train.mixed_precision import format_of_chip, remarks, why_no_fp8
from motley.train.run_folder import RunFolder


def wire_dtype(formats: Sequence[Format]) -> torch.dtype:
    """Of messages between stages, the same for all ranks. Never fp16: it cannot hold what bf16 can."""
    same = {ACTIVATIONS[name] for name in formats} == {torch.bfloat16}
    return torch.bfloat16 if same else torch.float32


def check_formats(formats: Sequence[Format], layout: Layout) -> None:
    """Raises InputError where ranks that share experts compute in different formats."""
    for ranks in layout.expert_groups():
        if len({formats[rank] for rank in ranks}) > 1:
            each = ", ".join(f"rank {rank} {formats[rank]}" for rank in ranks)
            raise InputError(
                f"ranks that share experts must compute in one format, but there are {each}; give them one "
                "--precision, or choose a plan whose expert groups are of one kind of chip"
            )


def asked_format(precision: Precision, emulated: Format | None, layout: Layout, rank: int) -> Precision:
    """What a rank was told: by its user, by the chip it emulates (`--emulate`), or by the plan it follows."""
    return precision if precision != "auto" else emulated or coordinates_of(layout, rank).planned_format or "auto"


def number_formats(
    asked: Precision, comm: Communicator, run: RunFolder, machine: Callable[[], Machine]
) -> list[Format]:
    """What each rank computes in. Every rank calls this; all see the same list.

    Args:
        asked: what this rank was told (`asked_format`).
        comm: all ranks.
        run: keeps what `auto` chose for each kind of chip (`kind_of_chip`), so that resuming exactly does not depend on
            the noise of another measurement.
        machine: measures rank 0's.

    Raises InputError for a format that the device lacks.
    """
    chip, name = kind_of_chip(comm.device), device_name(comm.device)
    everyone: list[tuple[Precision, str]] = comm.all_values((asked, chip))
    known: dict[str, Format] = comm.led(run.formats)
    open_chips = {kind for wish, kind in everyone if wish == "auto"} - set(known)
    own: dict[str, Format] = {}
    if chip in open_chips and everyone.index(("auto", chip)) == comm.rank:  # one measures for all of its kind
        measured = machine() if comm.leads else probe(device=comm.device, shown=False)
        own = {chip: format_of_chip(measured, known.get(name))}
    with comm.waiting(comm.timeout + most_seconds(PROBE_SECONDS)):  # for those who measure
        gathered = comm.all_values(own)
    for chosen in gathered:
        known |= chosen
    comm.led(lambda: run.keep_formats(known))
    formats: list[Format] = [known[kind] if wish == "auto" else wish for wish, kind in everyone]
    if "fp8" in formats:
        with comm.waiting(max(comm.timeout, PREPARING_SECONDS)):  # for kernels to be compiled
            reasons = comm.all_values(why_no_fp8(comm.device) if formats[comm.rank] == "fp8" else None)
        names = comm.all_values(name)
        for rank, reason in enumerate(reasons):
            if reason:
                raise InputError(
                    f"rank {rank} ({names[rank]}) cannot train in fp8: {reason}; choose --precision bf16 there"
                )
    for remark in remarks(comm.device, formats[comm.rank], comm.leads, f"rank {comm.rank}"):
        note(remark)
    return formats
