"""Bytes that a training step takes: ours beside transformers' `DeepseekV3ForCausalLM`, per token and per parameter.

    python benchmarks/memory.py [--sizes nano micro] [--long] [--quick] [--json]

Every case is a new process that takes three steps of random tokens (memory does not care which). Measured is the most
that it took over what it had with its libraries loaded: on a CPU the resident set (Linux's VmHWM), on a GPU
torch.cuda.max_memory_allocated. A line through the peaks at several batches gives bytes per token (its slope) and,
where there are no tokens, bytes per parameter: weights, gradients, the optimizer's state and what updating takes.

Both compute in the format that `motley pretrain` would choose here (bf16 where the CPU has such products, else fp32).
The peer trains in autocast with fused AdamW, with either way to compute experts, each also with its own gradient
checkpointing; not compiled. Ours trains as `motley pretrain` does, which keeps freed memory: that counts against it,
while the peer gives it back. --long asks for one row of so many tokens instead.

--quick ends within 50 seconds: one and four short rows of nano, and as many sides as there is time for.
"""

import argparse
import json
from dataclasses import replace
from typing import Any

import numpy as np
from budget import QUICK_SECONDS, Budget, kept
from machine import best_format, cpu_flags
from memory_by_zero import forget_peak, peak, random_batch
from processes import TookTooLong, spawned
from train_throughput import VOCAB_SIZE, Ours, Theirs, our_step, transformers_step

from motley.fleet.device import Format, choose_device
from motley.model import SIZES, ModelConfig, Transformer
from motley.progress import note
from motley.train.allocator import keep_freed_memory

SEQ_LEN, STEPS = 512, 3
ROWS = (4, 8, 16, 32)
LONG = (8192, 16384, 32768)
COMM_TIMEOUT_SECONDS = 1200.0


OURS = (Ours("muon"), Ours("adamw"), Ours("adamw", moments="bf16"), Ours("adamw", recompute=True))
THEIRS = tuple(
    Theirs(experts, kept=False, checkpointed=again) for again in (False, True) for experts in ("grouped_mm", "eager")
)
LONG_SIDES = (Ours("muon"), Ours("muon", recompute=True), *THEIRS[2:])
QUICK_SIDES = (OURS[1], THEIRS[0], *OURS[:1], *THEIRS[1:], *OURS[2:])  # the first two are compared
QUICK_SEQ_LEN = 128


def measure(rank: int, side: Ours | Theirs, config: ModelConfig, rows: int, seq_len: int, results: Any) -> None:
    """A case's process."""
    device = choose_device("auto")
    if isinstance(side, Ours):
        keep_freed_memory()
    else:
        import transformers.models.deepseek_v3.modeling_deepseek_v3  # noqa: F401  libraries are not the model's memory
    before = forget_peak(device)
    ours = isinstance(side, Ours)
    step = our_step(config, device, side) if ours else transformers_step(config, device, side)
    for number in range(STEPS):
        step(random_batch(config.vocab_size, rows, seq_len, seed=number))
    results.put((rank, peak(device) - before))


def peak_bytes(side: Ours | Theirs, config: ModelConfig, rows: int, seq_len: int, budget: Budget) -> int:
    """Raises TookTooLong."""
    (found,) = spawned(measure, 1, side, config, rows, seq_len, patience=budget.patience(COMM_TIMEOUT_SECONDS))
    note(f"{side!s:<48} {rows:4} x {seq_len:6,} tokens  {found / 1e6:9,.0f} MB")
    return found


def compared(
    size: str, rows: tuple[int, ...], format_: Format, budget: Budget, seq_len: int = SEQ_LEN
) -> dict[str, Any]:
    """Bytes by side; with a budget only of those sides that there is time for."""
    config = replace(SIZES[size], vocab_size=VOCAB_SIZE, num_nextn_predict_layers=0)
    parameters = sum(parameter.numel() for parameter in Transformer(config).parameters())
    sides = {}
    chosen = QUICK_SIDES if budget.seconds else (*OURS, *THEIRS)
    for side in budget.each((replace(side, format=format_) for side in chosen), least=2):
        peaks = [peak_bytes(side, config, count, seq_len, budget) for count in rows]
        slope, fixed = np.polyfit([count * seq_len for count in rows], peaks, 1)
        sides[str(side)] = {"bytes_per_token": slope, "bytes_per_parameter": fixed / parameters, "peaks": peaks}
    return {"size": size, "parameters": parameters, "rows": rows, "seq_len": seq_len, "sides": sides}


def long(size: str, lengths: tuple[int, ...], format_: Format, budget: Budget) -> dict[str, Any]:
    sides = [replace(side, format=format_) for side in LONG_SIDES]
    found: dict[str, list[int]] = {str(side): [] for side in sides}
    for length in budget.each(lengths):
        config = replace(SIZES[size], vocab_size=VOCAB_SIZE, num_nextn_predict_layers=0, max_position_embeddings=length)
        for side in sides:
            found[str(side)].append(peak_bytes(side, config, 1, length, budget))
    return {"size": size, "lengths": lengths, "peaks": found}


def told(found: dict[str, Any]) -> str:
    if "lengths" in found:
        lines = [f"{found['size'] + ', one row':<48} " + " ".join(f"{length:>12,}" for length in found["lengths"])]
        for name, peaks in found["peaks"].items():
            lines.append(f"{name:<48} " + " ".join(f"{most / 1e9:9.2f} GB" for most in peaks))
        return "\n".join(lines)
    lines = [
        f"{found['size']}, {found['parameters']:,} parameters{'':<20} {'KB a token':>12} {'bytes a parameter':>18}"
    ]
    for name, side in found["sides"].items():
        lines.append(f"{name:<48} {side['bytes_per_token'] / 1e3:12.1f} {side['bytes_per_parameter']:18.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["nano", "micro"])
    parser.add_argument("--long", action="store_true", help="one long row of the first size")
    parser.add_argument("--quick", action="store_true", help="two small batches of nano")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    budget = Budget(QUICK_SECONDS if arguments.quick else None)
    try:
        with kept(budget, "memory"):
            format_ = best_format()
            if arguments.long:
                found = [long(arguments.sizes[0], (512, 1024) if arguments.quick else LONG, format_, budget)]
            elif arguments.quick:
                found = [compared("nano", (1, 4), format_, budget, QUICK_SEQ_LEN)]
            else:
                found = [compared(size, ROWS, format_, budget) for size in arguments.sizes]
    except TookTooLong as slow:
        raise SystemExit(f"memory: {slow}; this machine is too slow or too busy for it") from None
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"CPU flags: {', '.join(cpu_flags())}\n" + "\n\n".join(map(told, found)))


if __name__ == "__main__":
    main()
