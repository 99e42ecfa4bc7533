"""The number format that this process computes in, over fp32 weights.

    chip         auto                              loss scale
    A100         bf16                              none
    H100         bf16 (fp8 products if asked)      none
    V100, T4     fp16                              2^k
    P100, CPU    fp32, or bf16 where it gains      none

What --precision says comes first; auto takes what this kind of chip was measured to gain from.
"""

import torch

from motley.errors import InputError
from motley.fleet.device import ACTIVATIONS, Format, Precision, number_format
from motley.fleet.probe import Machine, device_name, formats_of
from motley.model import fp8, native
from motley.progress import note
from motley.train.chip_kind import kind_of_chip
from motley.train.run_folder import RunFolder


def chosen_format(precision: Precision, device: torch.device, run: RunFolder, measured: Machine | None) -> Format:
    """What one process computes in. Raises InputError for a format that the device lacks.

    Args:
        precision: what its user said.
        device: what it computes on.
        run: keeps what `auto` chose for each kind of chip (`kind_of_chip`), so that resuming exactly does not depend on
            the noise of another measurement.
        measured: what was measured before, if anything.
    """
    known, chip = run.formats(), kind_of_chip(device)
    if precision == "auto" and chip not in known:
        known[chip] = format_of_chip(run.machine(device, measured), known.get(device_name(device)))
        run.keep_formats(known)
    chosen: Format = known[chip] if precision == "auto" else precision
    if chosen == "fp8" and (reason := why_no_fp8(device)):
        raise InputError(f"{device_name(device)} cannot train in fp8: {reason}; choose --precision bf16 there")
    for remark in remarks(device, chosen, leads=True):
        note(remark)
    return chosen


def format_of_chip(machine: Machine, before: Format | None) -> Format:
    """What `auto` means on a machine.

    before: in the file of a run from when chips went by their names, which may mean another.
    """
    able = before in {rate.dtype for rate in machine.matmul_rates}
    return before if before is not None and able else number_format("auto", lambda: machine)


def remarks(device: torch.device, chosen: Format, leads: bool, who: str = "this process") -> list[str]:
    """What people should know of how a process computes."""
    if device.type != "cpu":
        return []
    found = []
    if chosen in ("fp8", "fp16"):
        found.append(f"{who} computes in {chosen}, which CPUs do through fp32: slower than fp32, for trying it only")
    if missing := native.missing():
        found.append(f"{who}: {missing}")
    elif leads:
        target = native.chosen(ACTIVATIONS[chosen])
        kernels = f"motley's own kernels for {target}" if target else "PyTorch's operators alone"
        found.append(f"computing in {chosen} with {kernels}")
    return found


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
    except Exception as error:  # whatever a compiler or a driver says, the other ranks wait to hear of it
        return f"products cannot be computed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return mistake and f"products differ from their emulation, which is a fault to report: {mistake}"
