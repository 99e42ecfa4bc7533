"""What each of four workers really holds at ZeRO 0, 1, 2 and 3, beside what is counted before the first step.

    python benchmarks/memory_by_zero.py [--memory 1:1:1:4] [--device cpu] [--quick] [--json]

Every worker is a process of its own, new for every case, and takes three steps. Measured is the most that they took:
on a CPU by how much the process's resident set grew over what it was when program, libraries and connections were there
(Linux's VmHWM, set back before the first step), on a GPU torch.cuda.max_memory_allocated. Counted is
`parts.held_bytes` and the activations of a micro-batch (`memory.row_bytes`): what `within_memory` decides by. The whole
model is never anywhere: each worker draws the weights that it keeps.

--quick ends within 50 seconds: nano, two workers, and as many cases as there is time for.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from budget import QUICK_SECONDS, Budget, kept
from processes import TookTooLong, spawned

from motley.data.stream import Batch
from motley.model import SIZES, ModelConfig
from motley.parallel.communicator import Communicator, free_port
from motley.parallel.layout import Layout, Zero, coordinates_of, side_by_side
from motley.parallel.memory_fit import ALLOCATED, in_passing_bytes, row_bytes
from motley.parallel.rank import Ranks
from motley.parallel.zero.partition import held_bytes
from motley.train.config import PretrainConfig

SHAPE = replace(SIZES["micro"], num_hidden_layers=12, vocab_size=4096)  # 25 million parameters
SEQ_LEN, MICRO_BATCH, ROWS, STEPS = 128, 2, 16, 3
PROCESS = Path("/proc/self")


def random_batch(vocabulary: int, rows: int, seq_len: int, seed: int) -> Batch:
    """Rows of random tokens."""
    ids = torch.randint(vocabulary, (rows, seq_len + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1], ids[:, 1:], torch.zeros_like(ids[:, 1:]))


class Rows:
    """Random rows as a pure function of their position."""

    seq_len = SEQ_LEN

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def rows(self, position: int, count: int) -> Batch:
        return random_batch(self.vocabulary, count, SEQ_LEN, seed=position)


def settings() -> PretrainConfig:
    return PretrainConfig(batch_rows=ROWS, micro_batch=MICRO_BATCH, seq_len=SEQ_LEN, steps=100, precision="fp32")


def layout_of(shape: ModelConfig, zero: Zero, memory: tuple[float, ...], size: int) -> Layout:
    """memory: of each worker, relative to the others'; empty: as much as is needed."""
    return replace(side_by_side(size, shape.num_hidden_layers, MICRO_BATCH, zero), memory=memory)


def forget_peak(device: torch.device) -> int:
    """Bytes held now; from here on `peak` counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    (PROCESS / "clear_refs").write_text("5")  # proc(5): sets VmHWM to what is resident
    return psutil.Process().memory_info().rss


def peak(device: torch.device) -> int:
    """The most bytes held since `forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = dict(line.split(":", 1) for line in (PROCESS / "status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


def work(
    rank: int, size: int, port: int, device_type: str, shape: ModelConfig, zero: Zero, memory: tuple, results: Any
) -> None:
    """One worker of a case."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", rank=rank, world_size=size)
    comm = Communicator(rank, size, device)
    comm.sum(torch.zeros(1, device=device))  # connected
    before = forget_peak(device)
    ranks = Ranks(shape, settings(), layout_of(shape, zero, memory, size), comm)
    torch.manual_seed(0)
    for part in ranks.buffers.here:
        with torch.no_grad():
            ranks.buffers.view(part).normal_(0.0, 0.02)
    for step in range(STEPS):
        losses, norm = ranks.gradient(ranks.read(Rows(shape.vocab_size), step))  # type: ignore[arg-type]
        ranks.update(losses, norm, 1e-3)
    results.put((rank, peak(device) - before))
    dist.barrier()
    dist.destroy_process_group()


def measured(
    size: int, device: str, shape: ModelConfig, zero: Zero, memory: tuple[float, ...], timeout: float = 1800.0
) -> list[int]:
    """Peak bytes of each worker of a case. Raises TookTooLong after `patience` seconds."""
    return spawned(work, size, size, free_port(), device, shape, zero, memory, patience=timeout)


def counted(size: int, shape: ModelConfig, zero: Zero, memory: tuple[float, ...]) -> dict[str, list[float]]:
    """What each worker of a case is said to hold, in bytes."""
    layout = layout_of(shape, zero, memory, size)
    passing = in_passing_bytes(shape, zero, size)
    held = [ALLOCATED * (held_bytes(shape, layout, rank, "muon").total + passing) for rank in range(size)]
    row = ALLOCATED * row_bytes(shape, coordinates_of(layout, 0), SEQ_LEN, 4, recompute=False)
    return {"held": held, "activations": [MICRO_BATCH * row] * size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="1:1:1:4", help="of the workers, relative; beside an even split")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a GPU for each worker")
    parser.add_argument("--quick", action="store_true", help="nano, two workers, without the even split")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    uneven = tuple(float(part) for part in arguments.memory.split(":"))
    shape, uneven = (replace(SIZES["nano"], vocab_size=512), uneven[-2:]) if arguments.quick else (SHAPE, uneven)
    size = len(uneven)
    levels: tuple[Zero, ...] = (1, 2, 3)
    memories: list[tuple[float, ...]] = [uneven] if arguments.quick else [(), uneven]
    whole: Zero = 0
    cases = [(whole, ()), *((zero, memory) for zero in levels for memory in memories)]
    found = []
    budget = Budget(QUICK_SECONDS if arguments.quick else None)
    try:
        with kept(budget, "memory_by_zero"):
            for zero, memory in budget.each(cases):
                said = counted(size, shape, zero, memory)
                peaks = measured(size, arguments.device, shape, zero, memory, budget.patience(1800.0))
                ratios = [real / (held + run) for real, held, run in zip(peaks, *said.values(), strict=True)]
                found.append({"zero": zero, "memory": memory, "peak_bytes": peaks, "ratios": ratios}
                             | {f"counted_{name}_bytes": value for name, value in said.items()})  # fmt: skip
    except TookTooLong as slow:
        raise SystemExit(f"memory_by_zero: {slow}; this machine is too slow or too busy for it") from None
    if arguments.json:
        about = {"hidden": shape.hidden_size, "layers": shape.num_hidden_layers, "device": arguments.device}
        print(json.dumps({**about, "seq_len": SEQ_LEN, "micro_batch": MICRO_BATCH, "cases": found}))
        return
    print(
        f"{size} workers on {arguments.device}, micro-batches of {MICRO_BATCH} x {SEQ_LEN} tokens, Muon; megabytes of"
    )
    print("each worker: the most that it held, and in brackets counted: state and messages + activations")
    for case in found:
        memory = ":".join(f"{part:g}" for part in case["memory"]) or "even"
        cells = [
            f"{real / 1e6:6.0f} ({held / 1e6:.0f} + {run / 1e6:.0f})"
            for real, held, run in zip(
                case["peak_bytes"], case["counted_held_bytes"], case["counted_activations_bytes"], strict=True
            )
        ]
        print(f"  ZeRO {case['zero']}  {memory:8} {'  '.join(cells)}")


if __name__ == "__main__":
    main()
