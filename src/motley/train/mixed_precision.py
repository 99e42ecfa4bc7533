"""A number format for each chip, and one for the messages between them.

    chip         computes in                      loss scale      messages of the whole job
    A100         bf16                             none            bf16 if all workers compute in bf16 or fp8,
    H100         fp8 products, bf16 between       none            else fp32; a worker casts what it receives
    V100, T4     fp16                             2^k, its own
    P100, CPU    fp32                             none

What a worker is told comes first (`--precision`), then the chip it plays, then the plan, then what its kind of chip was
measured to gain from.
"""

from collections.abc import Callable, Sequence

import torch

from motley.errors import InputError
from motley.fleet.device import ACTIVATIONS, Format, Precision, number_format
from motley.fleet.probe import PROBE_SECONDS, Machine, device_name, formats_of, most_seconds, probe
from motley.model import fp8, native
from motley.parallel.communicator import PREPARING_SECONDS, Crew
from motley.parallel.layout import Layout, place_of
from motley.progress import note
from motley.train.chip_kind import kind_of_chip
from motley.train.run_folder import Run


def wire_dtype(formats: Sequence[Format]) -> torch.dtype:
    """Of messages between stages, the same for all workers. Never fp16: it cannot hold what bf16 can."""
    same = {ACTIVATIONS[name] for name in formats} == {torch.bfloat16}
    return torch.bfloat16 if same else torch.float32


def check_formats(formats: Sequence[Format], layout: Layout) -> None:
    """Raises InputError where workers that share experts compute in different formats."""
    for ranks in layout.expert_groups():
        if len({formats[rank] for rank in ranks}) > 1:
            each = ", ".join(f"worker {rank} {formats[rank]}" for rank in ranks)
            raise InputError(
                f"workers that share experts must compute in one format, but there are {each}; give them one "
                "--precision, or choose a plan whose expert groups are of one kind of chip"
            )


def why_no_fp8(device: torch.device) -> str | None:
    """What keeps a device from training in fp8, if anything: it cannot, or does not come to what the emulation says."""
    if device.type == "cpu":
        return None
    if "fp8" not in formats_of(device):
        return "it does not multiply in fp8 (NVIDIA's chips do from Ada and Hopper on; CPUs emulate it)"
    if reason := fp8.lacking():
        return reason
    try:
        mistake = fp8.wrong(device)
    except Exception as error:  # whatever a compiler or a driver says, the other workers wait to hear of it
        return f"products cannot be computed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return mistake and f"products differ from their emulation, which is a fault to report: {mistake}"


def asked_format(precision: Precision, played: Format | None, layout: Layout, rank: int) -> Precision:
    """What a worker was told: by its user, by the chip it plays (`--emulate`), or by the plan it follows."""
    return precision if precision != "auto" else played or place_of(layout, rank).planned_format or "auto"


def number_formats(asked: Precision, crew: Crew, run: Run, machine: Callable[[], Machine]) -> list[Format]:
    """What each worker computes in. Every worker calls this; all see the same list.

    Args:
        asked: what this worker was told (`asked_format`).
        crew: all workers.
        run: keeps what `auto` chose for each kind of chip (`kind_of_chip`), so that going on exactly does not hang on
            the noise of another measurement.
        machine: measures worker 0's.

    Raises InputError for a format that the device lacks.
    """
    chip, name = kind_of_chip(crew.device), device_name(crew.device)
    everyone: list[tuple[Precision, str]] = crew.all_values((asked, chip))
    known: dict[str, Format] = crew.led(run.formats)
    open_chips = {name for wish, name in everyone if wish == "auto"} - set(known)
    own: dict[str, Format] = {}
    if chip in open_chips and everyone.index(("auto", chip)) == crew.rank:  # one measures for all of its kind
        measured = machine() if crew.leads else probe(device=crew.device, shown=False)
        before = known.get(name)  # in the file of a run from when chips went by their names, which may mean another
        able = before in {rate.dtype for rate in measured.matmul_rates}
        own = {chip: before if before is not None and able else number_format("auto", lambda: measured)}
    with crew.waiting(crew.patience + most_seconds(PROBE_SECONDS)):  # for those who measure
        gathered = crew.all_values(own)
    for chosen in gathered:
        known |= chosen
    crew.led(lambda: run.keep_formats(known))
    formats: list[Format] = [known[name] if wish == "auto" else wish for wish, name in everyone]
    if "fp8" in formats:
        with crew.waiting(max(crew.patience, PREPARING_SECONDS)):  # for kernels to be compiled
            reasons = crew.all_values(why_no_fp8(crew.device) if formats[crew.rank] == "fp8" else None)
        names = crew.all_values(name)
        for rank, reason in enumerate(reasons):
            if reason:
                raise InputError(
                    f"worker {rank} ({names[rank]}) cannot train in fp8: {reason}; choose --precision bf16 there"
                )
    if crew.device.type == "cpu" and formats[crew.rank] in ("fp8", "fp16"):
        name = formats[crew.rank]
        note(f"worker {crew.rank} computes in {name}, which CPUs do through fp32: slower than fp32, for trying it only")
    if crew.device.type == "cpu" and (missing := native.missing()):
        note(f"worker {crew.rank}: {missing}")
    elif crew.device.type == "cpu" and crew.leads:
        target = native.chosen(ACTIVATIONS[formats[crew.rank]])
        kernels = f"motley's own kernels for {target}" if target else "PyTorch's operators alone"
        note(f"computing in {formats[crew.rank]} with {kernels}")
    return formats
