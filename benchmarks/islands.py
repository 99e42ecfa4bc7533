"""Islands against one synchronous crew: time to the same loss over a slow link, and loss at equal tokens without one.

    python benchmarks/islands.py link --text FILE ... [--megabits 100] [--round-trip 0.05] [--quick] [--json]
    python benchmarks/islands.py loss --text FILE ... [--seeds 3] [--ways sync islands ...] [--quick] [--json]

Both run the real command, `motley pretrain`, in two processes of one thread each. `link` puts them into network
namespaces with a link between them (motley.emulation.netns, measured before use; root only), trains once with all
workers in one crew and once as two islands, and compares when each reached the loss with which the crew ended. `loss`
trains the same model on as many tokens with several seeds and compares the held-out loss of the last step. Both ways
compute in one format: the one that `motley pretrain` would choose here, unless --precision says another.

--quick ends within 50 seconds: few steps of few rows, and as many ways as there is time for.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from budget import QUICK_SECONDS, Budget, kept
from machine import best_format
from processes import step_seconds
from slow_link import measured, slow_links

from motley.data.pack import DataConfig, prepare
from motley.emulation.netns import DEVICE, SlowLinks
from motley.parallel.communicator import free_port
from motley.train.metrics import read_metrics

COMMON: dict[str, Any] = {
    "model": "nano", "batch_rows": 8, "seq_len": 128, "micro_batch": 8, "device": "cpu",
    "checkpoint_every": 10**6, "valid_rows": 256,
}  # fmt: skip
QUICK: dict[str, Any] = {"batch_rows": 2, "micro_batch": 1, "valid_rows": 4}
QUICK_STEPS, QUICK_VOCAB_SIZE, QUICK_TEXT_BYTES = 4, 512, 200_000
ISLANDS = {"islands": 2, "sync_every": 30}
WAYS: dict[str, dict[str, Any]] = {
    "sync": {},
    "islands": ISLANDS,
    "fp32": ISLANDS | {"outer_bits": 32},
    "4-bit": ISLANDS | {"outer_bits": 4},
    "often": ISLANDS | {"sync_every": 10},
    "streaming": ISLANDS | {"fragments": 3},
    "overlap": ISLANDS | {"fragments": 3, "overlap": 3},
}


def train(out: Path, data: Path, link: SlowLinks | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of one run of two workers."""
    port = free_port() if link is None else 29500
    chosen = {name: value for name, value in (COMMON | settings).items() if value is not None}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]
    words = [sys.executable, "-m", "motley", "pretrain", f"--out={out}", f"--data={data}", *options]
    workers, quiet = [], subprocess.DEVNULL
    for rank in range(2):
        where: dict[str, Any] = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": 1,
        }
        where["MASTER_ADDR"] = "127.0.0.1" if link is None else link.address(0)
        where |= {} if link is None else {"GLOO_SOCKET_IFNAME": DEVICE}
        environment = os.environ | {name: str(value) for name, value in where.items()}
        at, kept = ([], ()) if link is None else (link.at(rank), link.kept)
        workers.append(
            subprocess.Popen([*at, *words], env=environment, stdout=quiet, stderr=subprocess.PIPE, pass_fds=kept)
        )
    said = [worker.communicate()[1].decode() for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit("\n".join(said))
    return read_metrics(out)


def validations(records: list[dict[str, Any]]) -> list[tuple[int, float, float]]:
    """(step, seconds, held-out loss)."""
    return [(one["step"], one["seconds"], one["loss"]) for one in records if one["kind"] == "valid"]


def over_the_link(arguments: argparse.Namespace, data: Path, folder: Path) -> dict[str, Any]:
    """Both ways over a slow link; the crew's steps are few, because each takes seconds."""
    precision = {"precision": arguments.precision} | (QUICK if arguments.quick else {})
    steps, more = (2, 3) if arguments.quick else (arguments.steps, round(arguments.steps * arguments.more))
    with slow_links(2, arguments.megabits, arguments.round_trip) as link:
        megabits, trip = measured(link)
        comm = train(folder / "crew", data, link, precision | {"steps": steps, "valid_every": max(1, steps // 6)})
        found = {
            "megabits": megabits, "round_trip_seconds": trip,
            "crew": validations(comm),
        }  # fmt: skip
        chosen = precision | WAYS[arguments.way] | {"sync_every": arguments.sync_every or ISLANDS["sync_every"]}
        if arguments.plan:
            chosen = {**chosen, "islands": 1, "sync_every": None, "plan": arguments.plan}
        settings = chosen | {"steps": more, "valid_every": max(1, more // 12)}
        islands = train(folder / "islands", data, link, settings)
        found["islands"] = validations(islands)
    _, seconds, loss = found["crew"][-1]
    reached = next((one for one in found["islands"] if one[2] <= loss), None)
    rounds = [one for one in islands if one["kind"] == "outer_step"]
    later = rounds[1:] or rounds
    found |= {
        "settings": {n: str(v) for n, v in (COMMON | settings).items()}, "loss": loss, "crew_seconds": seconds,
        "crew_step_seconds": statistics.median(step_seconds(comm)),
        "islands_seconds": None if reached is None else reached[1],
        "faster": None if reached is None else seconds / reached[1],
        "round_seconds": statistics.median(one["round_seconds"] / one["steps"] for one in later),
        "waited_seconds": statistics.median(max(one["waited_seconds"]) for one in later),
        "bytes_sent": later[-1]["bytes_sent"],
        "planned_step_seconds": json.loads(arguments.plan.read_text())["step_seconds"] if arguments.plan else None,
    }  # fmt: skip
    return found


def at_equal_tokens(arguments: argparse.Namespace, data: Path, folder: Path) -> dict[str, Any]:
    """Held-out loss after the last step of each way, by seed."""
    steps = QUICK_STEPS if arguments.quick else arguments.steps
    own = {"steps": steps, "precision": arguments.precision} | (QUICK if arguments.quick else {})
    found: dict[str, Any] = {"settings": COMMON | own, "ways": {}}
    for way in arguments.budget.each(arguments.ways, least=2):
        losses = []
        for seed in range(1 if arguments.quick else arguments.seeds):
            settings = WAYS[way] | own | {"valid_every": steps, "seed": seed, "inner_steps": "planned"}
            losses.append(validations(train(folder / f"{way}-{seed}", data, None, settings))[-1][2])
        found["ways"][way] = {"settings": WAYS[way], "losses": losses}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["link", "loss"])
    parser.add_argument("--text", nargs="+", default=(), help="files to learn from; default: Python's standard library")
    parser.add_argument("--folder", type=Path, help="keep data and runs here; a run that is there is not repeated")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--more", type=float, default=1.3, help="link: the islands' steps, as a multiple of the crew's")
    parser.add_argument("--way", choices=WAYS, default="islands", help="link: how the islands meet")
    parser.add_argument("--sync-every", type=int, help="link: steps between two meetings")
    parser.add_argument("--plan", type=Path, help="link: a plan of two islands of one worker; its step is compared")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--megabits", type=float, default=100.0, help="a second, each direction")
    parser.add_argument("--round-trip", type=float, default=0.05, help="seconds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["sync", "islands"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    arguments.budget = Budget(QUICK_SECONDS if arguments.quick else None)
    size, most = (QUICK_VOCAB_SIZE, QUICK_TEXT_BYTES) if arguments.quick else (4096, None)
    place = nullcontext(arguments.folder) if arguments.folder else tempfile.TemporaryDirectory()
    with kept(arguments.budget, "islands"), place as where:
        folder = Path(where)
        if arguments.precision == "auto":
            arguments.precision = best_format(torch.device("cpu"))
        if not (data := folder / "data").is_dir():
            prepare(DataConfig(data=tuple(arguments.text), vocab_size=size, max_bytes=most), data)
        run = over_the_link if arguments.what == "link" else at_equal_tokens
        found = run(arguments, data, folder)
    print(json.dumps(found) if arguments.json else told(found))


def told(found: dict[str, Any]) -> str:
    lines = [" ".join(f"{name}={value}" for name, value in found["settings"].items())]
    if "ways" in found:
        base = found["ways"].get("sync", {}).get("losses")
        for way, one in found["ways"].items():
            ratio = f"{statistics.mean(one['losses']) / statistics.mean(base) - 1:+.2%}" if base else ""
            lines.append(f"  {way:10} {' '.join(f'{loss:.4f}' for loss in one['losses'])}  {ratio}")
        return "\n".join(lines)
    link = f"{found['megabits']:.1f} Mb/s, {1e3 * found['round_trip_seconds']:.1f} ms there and back"
    lines.append(f"  link         {link}, measured")
    loss = f"loss {found['loss']:.4f} after {found['crew_seconds']:.1f} s"
    lines.append(f"  one crew     {found['crew_step_seconds']:.2f} s a step, {loss}")
    waited = f"{found['waited_seconds']:.2f} s of waiting a round"
    lines.append(f"  two islands  {found['round_seconds']:.3f} s a step of the run, {waited}")
    if found["planned_step_seconds"]:
        lines.append(f"  planned      {found['planned_step_seconds']:.3f} s a step")
    if found["faster"] is None:
        lines.append(f"  the same loss was not reached: {found['islands'][-1][2]:.4f}; give them --more steps")
    else:
        lines.append(f"  the same loss after {found['islands_seconds']:.1f} s: {found['faster']:.1f} times faster")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
