"""The race: in how much less time on the same machine motley reaches the loss of the ordinary recipe.

    python benchmarks/thrift.py --text FILE ... [--size small] [--minutes 10] [--seeds 3] [--levers all|none|NAME ...]
                                [--horizon 60] [--device auto] [--folder runs/thrift] [--quick] [--json]

Ordinary is a Llama of transformers with AdamW, cosine and bf16 autocast, compiled where that helps; ours is what
`motley pretrain` does. Where it would not choose bf16, as on CPUs without such products, both compute in fp32. Both
learn from the same rows, and both choose learning rate and batch by equally many equally short runs. Then the ordinary
recipe trains for all of the time and ours for parts of it, each a whole run with its own schedule, until it falls short
of the ordinary recipe's loss. docs/thrift.md says why each choice is what it is, and what the clock covers.

The counts that ours learns from are a model of the text themselves, made in seconds: they have a row of their own, on
the same held-out rows. --horizon lets the ordinary recipe run on for so many minutes, to where its network passes them
(horizon.py, which also runs alone).

Every finished run is a file in --folder: broken off, the same command goes on. --quick ends within two minutes,
whatever the machine: small batches, a T of seconds, and as many levers as there is time for.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from budget import Budget, kept
from horizon import SHAPES, VOCAB_SIZE, horizon, ordinary_recipe
from machine import cpu_flags
from pictures import draw_race
from thrift_runs import HELD_OUT_ROWS, MARKS, counted, pace, trained
from thrift_sides import SEQ_LEN, Llama, Recipe

from motley.data.pack import DATA_FILE, DataConfig, prepare
from motley.data.stream import TokenStream
from motley.errors import InputError
from motley.files import read_json, write_json
from motley.fleet.device import choose_device
from motley.fleet.probe import Machine, describe, probe
from motley.model import ModelConfig
from motley.plan.network.flops import active_parameters
from motley.progress import note
from motley.train.allocator import keep_freed_memory

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
ROWS = (4, 8, 16)
LENGTHS = ((32, 0.25), (64, 0.5), (128, 0.75), (256, 0.9))  # of ours: --seq-len-warmup
NGRAMS = 0.85  # of ours: --ngram-weight
PARTS = (4, 6, 8, 12, 16, 24, 32)  # ours trains for 1/4, 1/6 ... of the time
LONGER = (2, 1)  # and for so much of it where the first of these is too short
SHORT = 10  # choices are made by runs of a tenth of the time
CLOCK = 2  # what it covers: runs of an earlier one are not taken from the folder
QUICK_SECONDS, QUICK_MINUTES, QUICK_ROWS, QUICK_HELD_OUT_ROWS, QUICK_TEXT_BYTES = 120.0, 0.1, 2, 4, 500_000


def ours(hidden: int, layers: int, heads: int, rank: int, dense: int, expert: int, **more: Any) -> ModelConfig:
    """A shape of ours; heads are 32 + 16 wide as in `nano`, one expert is shared, the first layer is dense."""
    chosen: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "kv_lora_rank": rank, "intermediate_size": dense, "moe_intermediate_size": expert, "q_lora_rank": None,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 4096, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1,
    }  # fmt: skip
    return ModelConfig(**chosen | more)


SIZES: dict[str, tuple[Llama, ModelConfig]] = {
    "small": (SHAPES["small"], ours(192, 4, 4, 64, 512, 128)),
    "large": (SHAPES["large"], ours(384, 9, 8, 128, 1024, 256)),
    "gpu": (SHAPES["gpu"], ours(768, 16, 16, 256, 2048, 512)),
}
"""About 3, 15 and 100 million parameters that a token meets, on both sides."""


@dataclass
class Race:
    """Where runs happen and are kept.

    Attributes:
        folder: one file a finished run.
        data: prepared text.
        device: what computes.
        seconds: the ordinary recipe's time, T.
        short: seconds of the runs by which choices are made.
        held_out_rows: on which the loss is measured.
        marks: shares of a run's time at which it is measured besides the end.
        budget: of all of the race.
    """

    folder: Path
    data: Path
    device: torch.device
    seconds: float
    short: float
    held_out_rows: int = HELD_OUT_ROWS
    marks: tuple[float, ...] = MARKS
    budget: Budget = dataclasses.field(default_factory=Budget)

    def run(
        self, name: str, recipe: Recipe, seconds: float, seed: int = 0, marks: Sequence[float] = ()
    ) -> dict[str, Any]:
        """What `trained` gives."""
        rows = TokenStream(self.data, "train", SEQ_LEN, seed)
        held_out = TokenStream(self.data, "valid", SEQ_LEN, shuffle=False)
        found = self._once(
            name,
            {"recipe": dataclasses.asdict(recipe), "seconds": seconds, "seed": seed, "rows": self.held_out_rows},
            lambda: trained(recipe, rows, held_out, self.device, seed, seconds, self.held_out_rows, tuple(marks)),
        )  # fmt: skip
        rate = found["tokens"] / found["seconds"]
        note(f"{name:<42} {found['steps']:6,} steps {rate:9,.0f} tokens/s   loss {found['loss']:.4f}")
        return found

    def counted(self) -> dict[str, Any]:
        """What `counted` gives."""
        rows, held_out = (TokenStream(self.data, split, SEQ_LEN, shuffle=False) for split in ("train", "valid"))
        asked = {"rows": self.held_out_rows}
        found = self._once("counts", asked, lambda: counted(rows, held_out, VOCAB_SIZE, self.held_out_rows))
        note(f"{'counts alone':<42} {found['tokens']:,} tokens in {found['seconds']:.1f} s   loss {found['loss']:.4f}")
        return found

    def horizon(self, recipe: Recipe, minutes: float) -> dict[str, Any]:
        """What `horizon` gives."""
        asked = {"recipe": dataclasses.asdict(recipe), "minutes": minutes, "rows": self.held_out_rows}
        ran = lambda: horizon(recipe, self.data, self.device, 60 * minutes, held_out_rows=self.held_out_rows)  # noqa: E731
        return self._once(f"ordinary, {minutes:g} minutes", asked, ran)

    def pace(self, name: str, recipe: Recipe, steps: int) -> dict[str, Any]:
        """What `pace` gives."""
        rows = TokenStream(self.data, "train", SEQ_LEN)
        asked = {"recipe": dataclasses.asdict(recipe), "steps": steps}
        return self._once(name, asked, lambda: pace(recipe, rows, self.device, steps))

    def _once(self, name: str, asked: dict[str, Any], do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `do` gives, from the folder if it was done before under the same settings."""
        data = read_json(self.data / DATA_FILE).get("fingerprint")
        asked |= {"device": str(self.device), "data": data, "torch": torch.__version__, "clock": CLOCK}
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:10]
        file = self.folder / f"{re.sub('[^a-z0-9.]+', '-', name)}-{digest}.json"
        if not file.is_file():
            write_json(file, {"name": name, **asked, **do()})
        return read_json(file)

    def chosen(self, name: str, recipe: Recipe, rates: Sequence[float], rows: Sequence[int]) -> Recipe:
        """`recipe` with the rate and the batch that came lowest in short runs: rates first, then batches with it.

        While the highest or the lowest of them wins, one beyond it is tried too.
        """

        def short(candidate: Recipe) -> float:
            said = f"{candidate.learning_rate:g}, {candidate.batches[-1][1]} rows"
            return self.run(f"{name} short, {said}", candidate, self.short)["loss"]

        def lowest(of: Callable[[Any], Recipe], values: Sequence[Any], beyond: bool) -> Recipe:
            tried = sorted(values)
            while True:
                best = min(tried, key=lambda value: short(of(value)))
                more = best * 2 if best == tried[-1] else type(best)(best / 2)
                if not beyond or len(tried) > len(values) + 2 or tried[0] < best < tried[-1] or not more:
                    return of(best)
                tried = sorted([*tried, more])

        recipe = lowest(lambda rate: replace(recipe, learning_rate=rate), rates, len(rates) >= len(RATES))
        if not rows:
            return recipe
        return lowest(lambda count: replace(recipe, batches=((0.0, count),)), rows, len(rows) >= len(ROWS))


def fastest(race: Race, recipe: Recipe, quick: bool) -> tuple[Recipe, dict[str, Any]]:
    """The ordinary recipe with the format, attention and compilation that take the most steps in its time.

    bf16 is tried where the machine gains from it, fp32 always: autocast costs time, too.
    """
    formats = [recipe.precision] if quick else dict.fromkeys((recipe.precision, "fp32"))
    ways = [
        (
            f"{precision}, {attention}{', compiled' if compiled else ''}",
            replace(recipe, precision=precision, attention=attention, compiled=compiled),
        )
        for precision in formats
        for compiled in ((False,) if quick else (False, True))
        for attention in ("sdpa", "eager")
    ]
    paces: dict[str, Any] = {}
    for name, way in ways:
        found = race.pace(f"ordinary pace, {name}", way, 2 if quick else 10)
        paces[name] = {key: found[key] for key in ("warm_up_seconds", "step_seconds")}
        paces[name]["steps"] = race.seconds / found["step_seconds"]
    return max(ways, key=lambda way: paces[way[0]]["steps"])[1], paces


# ------------------------------------------------------------------------------------------------ levers


def dense(shape: ModelConfig) -> ModelConfig:
    """No routed experts: every layer as wide as what a token meets in the sparse one."""
    inner = shape.moe_intermediate_size * (shape.num_experts_per_tok + (shape.n_shared_experts or 0))
    return replace(shape, n_routed_experts=None, intermediate_size=inner)


def levers(best: Recipe, ordinary: Recipe) -> dict[str, Recipe]:
    """Ours with one thing at a time as the ordinary recipe has it."""
    assert isinstance(best.shape, ModelConfig)
    fast = {"compiled": ordinary.compiled, "attention": ordinary.attention}
    found = {
        "architecture": replace(best, shape=ordinary.shape, mtp_weight=0.0, lengths=(), **fast),
        "sparsity": replace(best, shape=dense(best.shape)),
        "optimizer": replace(best, optimizer="adamw"),
        "embedding": replace(best, embedding_rate=1.0),
        "ngrams": replace(best, ngram_weight=0.0),
        "schedule": replace(best, schedule="cosine", final_share=ordinary.final_share),
        "context": replace(best, lengths=()),
        "decay": replace(best, weight_decay=ordinary.weight_decay),
        "precision": replace(best, precision="fp32"),
        "kernels": replace(best, plain=True),
    }
    found["mtp"] = replace(best, mtp_weight=0.0 if best.mtp_weight else 0.3)
    found["batches"] = replace(best, batches=ordinary.batches)
    return {name: recipe for name, recipe in found.items() if recipe != best}


LEVERS = (
    "architecture", "sparsity", "optimizer", "embedding", "ngrams", "schedule", "context", "decay", "precision",
    "kernels", "mtp", "batches",
)  # fmt: skip
RETUNED = ("architecture", "optimizer")  # a learning rate means something else there: chosen anew


# ------------------------------------------------------------------------------------------------ the race


def time_at(loss: float, runs: Sequence[tuple[float, float]]) -> float | None:
    """At how many seconds runs of (seconds, loss) would have come to `loss`, interpolated in the logarithm of time.

    None where `loss` lies outside of what they reached.
    """
    runs = sorted(runs)
    for (before, higher), (after, lower) in itertools.pairwise(runs):
        if higher >= loss >= lower and higher > lower:
            share = (higher - loss) / (higher - lower)
            return before * (after / before) ** share
    return None


def mean(runs: Sequence[dict[str, Any]], what: str = "loss") -> float:
    return statistics.mean(run[what] for run in runs)


def ratio(theirs: Sequence[dict[str, Any]], parts: Sequence[Sequence[dict[str, Any]]]) -> float | None:
    """The ordinary recipe's time over ours at its loss, both means over seeds; None outside of what was run."""
    at = time_at(mean(theirs), [(mean(runs, "seconds"), mean(runs)) for runs in parts])
    return None if at is None else mean(theirs, "seconds") / at


def raced(arguments: argparse.Namespace, race: Race, machine: Machine) -> dict[str, Any]:
    """Everything: choices, runs, ratio, levers."""
    llama, shape = SIZES[arguments.size]
    precision: Literal["bf16", "fp32"] = "bf16" if machine.compute_dtype == "bf16" else "fp32"
    rates, rows = (RATES[1:3], ()) if arguments.quick else (RATES, ROWS)
    batches = ((0.0, QUICK_ROWS if arguments.quick else ROWS[1]),)
    counts = race.counted()
    begun, paces = fastest(race, replace(ordinary_recipe(llama, precision), batches=batches), arguments.quick)
    ordinary = race.chosen("ordinary", begun, rates, rows)
    begun = Recipe(
        shape, 4e-3, batches, lengths=LENGTHS, weight_decay=0.0, mtp_weight=0.0, ngram_weight=NGRAMS,
        precision=precision,
    )  # fmt: skip
    best = race.chosen("ours", begun, rates, rows)

    seeds = range(arguments.seeds)

    def whole(recipe: Recipe, seed: int) -> dict[str, Any]:
        return race.run(f"ordinary, rate {recipe.learning_rate:g}, seed {seed}", recipe, race.seconds, seed, race.marks)

    while not arguments.quick:  # the rate of short runs may be too high for long ones: half of it, while that helps
        slower = replace(ordinary, learning_rate=ordinary.learning_rate / 2)
        if whole(slower, 0)["loss"] >= whole(ordinary, 0)["loss"]:
            break
        ordinary = slower
    theirs = [whole(ordinary, seed) for seed in seeds]
    aim = mean(theirs)

    parts: dict[int, list[dict[str, Any]]] = {}

    def reaches(part: int) -> bool:
        """Whether ours comes to the ordinary loss in that part of the time."""
        parts[part] = [
            race.run(f"ours, T over {part}, seed {s}", best, race.seconds / part, s, race.marks) for s in seeds
        ]
        return mean(parts[part]) <= aim

    for part in race.budget.each(PARTS[:2] if arguments.quick else PARTS):
        if not reaches(part):
            break
    if len(parts) == 1:  # the longest of them was too short
        for part in race.budget.each(LONGER, least=0):
            if reaches(part):
                break
    ratios = [ratio([theirs[seed]], [[runs[seed]] for runs in parts.values()]) for seed in seeds]
    reached = [part for part, runs in parts.items() if mean(runs) <= aim]
    found = {
        "size": arguments.size, "seconds": race.seconds, "seeds": arguments.seeds, "paces": paces,
        "recipes": {"ordinary": dataclasses.asdict(ordinary), "ours": dataclasses.asdict(best)},
        "active": {"ordinary": theirs[0]["parameters"], "ours": active_parameters(shape)},
        "parameters": {"ordinary": theirs[0]["parameters"], "ours": parts[min(parts)][0]["parameters"]},
        "ordinary": theirs, "ours": {str(part): parts[part] for part in sorted(parts)},
        "counts": counts, "loss": aim, "ratios": ratios, "reached": max(reached, default=None),
        "ratio": ratio(theirs, list(parts.values())),
    }  # fmt: skip
    found["levers"] = _levers(arguments, race, best, ordinary, parts, max(reached, default=min(parts)), rates)
    if arguments.horizon:
        found["horizon"] = race.horizon(ordinary, arguments.horizon)
    return found


def _levers(
    arguments: argparse.Namespace,
    race: Race,
    best: Recipe,
    ordinary: Recipe,
    parts: dict[int, list[dict[str, Any]]],
    part: int,
    rates: Sequence[float],
) -> dict[str, Any]:
    """What each lever is worth at the least time in which ours reached the ordinary loss.

    A lever's factor is by how much shorter a run of ours comes to the loss that is reached without it.
    """
    seconds = race.seconds / part
    ours_at = [(race.seconds / one, runs[0]["loss"]) for one, runs in parts.items()]
    wanted = {name: recipe for name, recipe in levers(best, ordinary).items() if name in arguments.levers}
    for shorter in [one for one in PARTS if one > max(parts)][: 2 if wanted and not arguments.quick else 0]:
        run = race.run(f"ours, T over {shorter}, seed 0", best, race.seconds / shorter, 0, race.marks)
        ours_at.append((race.seconds / shorter, run["loss"]))
    found: dict[str, Any] = {"seconds": seconds, "with all": parts[part][0]["loss"], "without": {}}
    for name, recipe in race.budget.each(wanted.items()):
        if name in RETUNED and not arguments.quick:
            recipe = race.chosen(f"without {name}", recipe, rates, ())
        run = race.run(f"without {name}", recipe, seconds, 0, race.marks)
        at = time_at(run["loss"], ours_at)
        found["without"][name] = {
            "loss": run["loss"], "tokens": run["tokens"], "factor": None if at is None else seconds / at,
        }  # fmt: skip
    return found


def table(found: dict[str, Any]) -> str:
    """The result for people."""
    whole = found["seconds"]
    lines = [
        f"{found['machine']} ({', '.join(found['cpu_flags'])})",
        f"size {found['size']}, T = {whole:g} s, {found['seeds']} seed(s)",
        f"parameters a token meets (all): ordinary {found['active']['ordinary']:,}, "
        f"ours {found['active']['ours']:,} ({found['parameters']['ours']:,} with MTP)",
        f"chosen: ordinary {_said(found['recipes']['ordinary'])}; ours {_said(found['recipes']['ours'])}",
        "",
        f"{'run':<14} {'seconds':>8} {'tokens':>12} {'tokens/s':>9}   held-out loss, nats a token",
    ]
    counts = found["counts"]
    sides = {"ordinary, T": found["ordinary"]} | {f"ours, T/{part}": runs for part, runs in found["ours"].items()}
    for name, runs in sides.items():
        middle = sorted(runs, key=lambda run: run["loss"])[len(runs) // 2]
        seconds, tokens = middle["seconds"], middle["tokens"]
        losses = " ".join(f"{run['loss']:.4f}" for run in runs)
        lines.append(f"{name:<14} {seconds:8.1f} {tokens:12,} {tokens / seconds:9,.0f}   {losses}")
    rate = counts["tokens"] / counts["seconds"]
    lines.append(
        f"{'counts alone':<14} {counts['seconds']:8.1f} {counts['tokens']:12,} {rate:9,.0f}   {counts['loss']:.4f}"
    )
    if "horizon" in found:
        run, at = found["horizon"], found["horizon"]["passes"]
        passed = f"below the counts from {at[0]:.0f} s on" if at else "never below the counts"
        rate = run["tokens"] / run["seconds"]
        lines.append(
            f"{'ordinary, on':<14} {run['seconds']:8.1f} {run['tokens']:12,} {rate:9,.0f}   {run['loss']:.4f}, {passed}"
        )
    each = ", ".join("outside" if one is None else f"{one:.2f}" for one in found["ratios"])
    said = "outside of what was run" if found["ratio"] is None else f"{found['ratio']:.2f}"
    lines += ["", f"the ordinary recipe's time over ours at its loss: {said} (seed by seed: {each})"]
    if found["levers"]["without"]:
        begun = f"at {found['levers']['seconds']:.0f} s"
        lines += ["", f"{begun:<22} {'loss':>8} {'tokens':>12}   worth"]
        lines.append(f"{'all levers':<22} {found['levers']['with all']:8.4f}")
    for name, seen in found["levers"]["without"].items():
        worth = "beyond what was run" if seen["factor"] is None else f"{seen['factor']:.2f} times"
        lines.append(f"{'without ' + name:<22} {seen['loss']:8.4f} {seen['tokens']:12,}   {worth}")
    return "\n".join(lines)


def _said(recipe: dict[str, Any]) -> str:
    more = ", compiled" if recipe["compiled"] else ""
    lengths = f", lengths {recipe['lengths']}" if recipe["lengths"] else ""
    ngrams = f", n-grams {recipe['ngram_weight']:g}" if recipe["ngram_weight"] else ""
    return (
        f"rate {recipe['learning_rate']:g}, batches {recipe['batches']}{lengths}{ngrams}, "
        f"decay {recipe['weight_decay']:g}, {recipe['precision']}, attention {recipe['attention']}{more}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", default=(), help="files to learn from; default: Python's standard library")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--minutes", type=float, default=10.0, help="the ordinary recipe's time")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--levers", nargs="+", choices=["all", "none", *LEVERS], default=["all"])
    parser.add_argument("--horizon", type=float, default=0.0, help="minutes of one more run of the ordinary recipe")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, default=Path("runs/thrift"))
    parser.add_argument("--quick", action="store_true", help="a look whether all of it works, within two minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if "all" in arguments.levers:
        arguments.levers = list(LEVERS)
    budget = Budget(QUICK_SECONDS if arguments.quick else None)
    try:
        with kept(budget, "thrift"):
            folder, found = whole_race(arguments, budget)
    except InputError as error:
        raise SystemExit(f"thrift: {error}") from None
    print(json.dumps(found) if arguments.json else table(found))
    note(f"{folder}: every run, result.json and race.svg")


def whole_race(arguments: argparse.Namespace, budget: Budget) -> tuple[Path, dict[str, Any]]:
    """(where everything lies, what was found)."""
    if arguments.quick:
        arguments.minutes, arguments.seeds = QUICK_MINUTES, 1
        arguments.horizon = min(arguments.horizon, QUICK_MINUTES)
    keep_freed_memory()  # as `motley pretrain` does, here for both sides
    folder = arguments.folder / ("quick" if arguments.quick else f"{arguments.size}-{arguments.minutes:g}")
    device = choose_device(arguments.device)
    most = QUICK_TEXT_BYTES if arguments.quick else None
    text = DataConfig(data=tuple(arguments.text), vocab_size=VOCAB_SIZE, max_bytes=most)
    data = prepare(text, arguments.folder / ("data-quick" if arguments.quick else "data")).folder
    seconds = 60 * arguments.minutes
    race = Race(folder, data, device, seconds, seconds / SHORT, budget=budget)
    if arguments.quick:
        race = replace(race, short=seconds / 4, held_out_rows=QUICK_HELD_OUT_ROWS, marks=())
    machine = probe(2.0, device=device)
    found = raced(arguments, race, machine)
    found |= {"machine": describe(machine), "cpu_flags": cpu_flags()}
    write_json(folder / "result.json", found)
    draw_race(found, folder / "race.svg")
    return folder, found


if __name__ == "__main__":
    main()
