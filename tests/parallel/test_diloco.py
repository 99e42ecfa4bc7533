"""Islands over slow links: what they learn is DiLoCo's algorithm to the last step, whoever computes it and how."""

import dataclasses
import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import command, until
from island_runs import PIPELINE, SHAPE, Skipped, island_of, learn, settings
from plans import SHAPE as PLANNED
from plans import plan_of
from safetensors.torch import load_file
from spawned_ranks import on_ranks, run_ranks, start_ranks
from tiny_models import DEEP, Rows, error, random_model
from told_ranks import assert_all_workers_are_told

from motley.errors import InputError
from motley.model import Transformer
from motley.parallel.communicator import Communicator
from motley.parallel.diloco.diloco import KEPT_IN_OVERLAP, ROUND_PATIENCE_SECONDS
from motley.parallel.diloco.outer_optimizer import fragments_of
from motley.parallel.diloco.quantize import BLOCK, decode, encode, encoded_bytes
from motley.parallel.diloco.sync_schedule import Round
from motley.parallel.layout import Layout, islands_of_plan, islands_side_by_side
from motley.train.config import PretrainConfig
from motley.train.optimizer import Optimizer
from motley.train.step import LossWeights, accumulate

# ------------------------------------------------------------------------------------- the algorithm, in one process


def rounded(values: torch.Tensor, bits: int) -> torch.Tensor:
    """What arrives of numbers that travel as integers of so many bits, 128 of them by one scale."""
    largest = 2 ** (bits - 1) - 1
    pieces = []
    for block in values.double().split(128):
        scale = block.abs().max().clamp(min=1e-30)
        pieces.append((block / scale * largest).round() * scale / largest)
    return torch.cat(pieces).float()


def of_one_process(
    config: PretrainConfig, speeds: Sequence[float], every: int, seed: int, skipped: Skipped = None, keeps: bool = True
) -> dict[str, torch.Tensor]:
    """The shared model after config.steps steps: islands one after the other, plain tensors, no messages (DiLoCo).

    skipped: (island, which of all its steps) that an overflow undid. keeps: what rounding takes away goes along with
    the next message.
    """
    models = [random_model(seed, SHAPE) for _ in speeds]
    optimizers = [Optimizer(m.named_parameters(), config.optimizer, config.weight_decay, torch.float32) for m in models]
    shared = {name: tensor.clone() for name, tensor in models[0].state_dict().items()}
    parameters = dict(models[0].named_parameters())
    biases = [name for name in shared if name not in parameters]
    pieces = fragments_of(
        SHAPE, {name: shared[name].shape for name in parameters}, {name: shared[name].shape for name in biases},
        config.fragments,
    )  # fmt: skip
    momentum = {name: torch.zeros_like(shared[name]) for name in parameters}
    learned = [[0] * len(pieces) for _ in speeds]
    taken = [0 for _ in speeds]
    lost = [[torch.zeros(piece.parameters) for piece in pieces] for _ in speeds]
    start = 0
    while start < config.steps:
        plan = Round.of(start, min(every, config.steps - start), config.batch_rows, speeds)
        sent: list[list[dict[str, torch.Tensor]]] = [[{} for _ in pieces] for _ in speeds]
        weights: list[list[int]] = [[0] * len(pieces) for _ in speeds]
        # A fragment arrives when all have sent it: islands take turns from one arrival to the next.
        for number in range(len(pieces)):
            for island, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
                meetings = plan.meetings(island, len(pieces), config.overlap)
                first = meetings[number - 1][1] if number else 0
                for step in range(first, meetings[number][1]):
                    rows = plan.rows(island, step)
                    model.zero_grad()
                    losses = accumulate(model, Rows().rows(rows.start, len(rows)), 2, LossWeights(0.3, 1e-4), True)
                    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
                    if (island, taken[island]) != skipped:
                        optimizer.step(0.01)
                        for gate, counts in zip(model.gates(), losses.expert_counts, strict=True):
                            gate.rebalance(counts, config.bias_speed)
                        learned[island] = [before + losses.tokens for before in learned[island]]
                    taken[island] += 1
                    for other, (leaves, _) in enumerate(meetings):
                        if leaves == step + 1:
                            now = model.state_dict()
                            change = {name: shared[name] - now[name] for name in pieces[other].names}
                            if config.outer_bits != 32:
                                flat, count = pieces[other].flat(change), pieces[other].parameters
                                wanted = flat[:count] + lost[island][other]
                                flat[:count] = rounded(wanted, config.outer_bits)
                                lost[island][other] = (wanted - flat[:count]) * keeps
                                change = pieces[other].named(flat)
                            sent[island][other] = change
                            weights[island][other], learned[island][other] = learned[island][other], 0
            total = sum(of[number] for of in weights)
            for name in pieces[number].names:
                gradient = sum(of[number][name] * (w[number] / total) for of, w in zip(sent, weights, strict=True))
                if name in momentum:
                    momentum[name] = config.outer_momentum * momentum[name] + gradient
                    gradient = (gradient + config.outer_momentum * momentum[name]) * config.outer_learning_rate
                shared[name] = shared[name] - gradient
                for model in models:
                    keep = KEPT_IN_OVERLAP if config.overlap else 0.0
                    own = model.state_dict()[name]
                    own.copy_(keep * own + (1 - keep) * shared[name])
        start += plan.steps
    return shared


# ------------------------------------------------------------------------------------------ the same with real workers

CASES: dict[str, tuple[list[int], list[float], dict[str, Any], dict[int, Layout]]] = {
    # workers of each island, speeds, settings, layouts that are not side by side
    "two": ([1, 1], [1.0, 1.0], {}, {}),
    "uneven": ([1, 1], [3.0, 1.0], {"optimizer": "adamw"}, {}),
    "fragments": ([1, 1], [2.0, 1.0], {"fragments": 2}, {}),
    "overlap": ([1, 1], [1.0, 1.0], {"fragments": 2, "overlap": 1}, {}),
    "pipeline": ([2, 1], [2.0, 1.0], {}, {0: PIPELINE}),
    "crews": ([1, 2], [1.0, 2.0], {"fragments": 3, "batch_rows": 7}, {}),
    "8 bits": ([1, 1], [1.0, 1.0], {"outer_bits": 8, "fragments": 2}, {}),
    "4 bits": ([1, 1], [2.0, 1.0], {"outer_bits": 4, "overlap": 1}, {}),
    "skipped": ([1, 1], [2.0, 1.0], {}, {}),
}
SKIPPED: dict[str, Skipped] = {"skipped": (0, 1)}


def run_cases(comm: Communicator, names: Sequence[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        sizes, speeds, chosen, layouts = CASES[name]
        island = island_of(comm, sizes, speeds, settings(**chosen), 2, layouts)
        meetings = learn(island, 4, skipped=SKIPPED.get(name))
        gathered = island.ranks.state()  # at each island's leader
        state = None if gathered is None else {**gathered.weights, **island.outer.tensors()}
        held_out = island.held_out_loss(Rows(), 3)  # type: ignore[arg-type]
        found[name] = state, [meeting.numbers() for meeting in meetings], held_out
    return found


@pytest.mark.slow(30)
@pytest.mark.parametrize("size", [2, 3])
def test_islands_of_any_layout_take_the_steps_of_the_algorithm_in_one_process(size: int):
    names = [name for name, case in CASES.items() if sum(case[0]) == size]
    by_worker = on_ranks(size, run_cases, names)
    for name in names:
        sizes, speeds, chosen, _ = CASES[name]
        expected = of_one_process(settings(**chosen), speeds, 2, seed=3, skipped=SKIPPED.get(name))
        leaders = [sum(sizes[:number]) for number in range(len(sizes))]
        shared = [by_worker[leader][name][0] for leader in leaders]
        for tensor_name, tensor in shared[0].items():
            assert all(other[tensor_name].equal(tensor) for other in shared[1:]), (name, tensor_name)
        flat = [torch.cat([side[n].flatten().float() for n in shared[0]]) for side in (shared[0], expected)]
        # A number between two integers may be rounded either way, if its last bit differs.
        assert error(*flat) <= (1e-6 if chosen.get("outer_bits", 32) == 32 else 3e-5), name
        assert len({worker[name][2] for worker in by_worker}) == 1
        meetings = by_worker[0][name][1]
        assert [worker[name][1][-1]["island_tokens"] for worker in by_worker] == [meetings[-1]["island_tokens"]] * size
        spans = [span for meeting in meetings for span in meeting["rows"]]
        rows = sorted(row for first, count in spans for row in range(first, first + count))
        assert rows == list(range(4 * settings(**chosen).batch_rows)), "no row is lost, none comes twice"


@pytest.mark.parametrize(
    ("name", "forgets"), [("8 bits", {"keeps": False}), ("4 bits", {"keeps": False}), ("skipped", {})]
)
def test_the_cases_above_would_tell_rounding_that_is_forgotten_and_steps_that_were_not_skipped(name: str, forgets: Any):
    _, speeds, chosen, _ = CASES[name]
    right = of_one_process(settings(**chosen), speeds, 2, seed=3, skipped=SKIPPED.get(name))
    wrong = of_one_process(settings(**chosen), speeds, 2, seed=3, **forgets)
    assert error(*(torch.cat([tensor.flatten().float() for tensor in side.values()]) for side in (wrong, right))) > 1e-4


def early(comm: Communicator, left: Path) -> None:
    """Island 1 sends only once island 0 has sent and taken another step."""
    island = island_of(comm, [1, 1], [1.0, 1.0], settings(overlap=2, fragments=2), 4, {})
    for number in range(4):
        losses, norm = island.gradient(island.read(Rows(), 0))  # type: ignore[arg-type]
        island.update(losses, norm, 0.01)
        if (comm.rank, number) == (0, 1):
            left.touch()
        deadline = time.monotonic() + 60
        while (comm.rank, number) == (1, 0) and not left.exists():
            assert time.monotonic() < deadline, "island 0 waits for island 1 where it should compute"
            time.sleep(0.01)
        island.moved(losses.tokens, True, 0.01)


def test_an_island_that_sent_computes_on_before_the_others_have_sent(tmp_path: Path):
    on_ranks(2, early, tmp_path / "left")


def test_one_island_that_takes_its_change_as_it_is_learns_as_without_meetings():
    config = settings(outer_learning_rate=1.0, outer_momentum=0.0)
    met = of_one_process(config, [1.0], 2, seed=5)
    plain = of_one_process(dataclasses.replace(config, sync_every=None), [1.0], 4, seed=5)
    for name, tensor in plain.items():
        assert error(met[name], tensor) <= 1e-6, name


# ------------------------------------------------------------------------------------------------------------ pieces


@pytest.mark.parametrize("seed", range(20))
def test_a_round_takes_every_row_once_and_all_islands_arrive_together(seed: int):
    chance = random.Random(seed)
    count = chance.randint(1, 5)
    speeds = [chance.choice([1.0, 1.0, 2.0, 5.0]) for _ in range(count)]
    steps, batch_rows = chance.randint(1, 40), chance.randint(count, 30)
    start, fragments, overlap = chance.randint(0, 99), chance.randint(1, 5), chance.randint(0, 3)
    plan = Round.of(start, steps, batch_rows, speeds)
    assert sum(plan.inner) == count * steps
    rows = [row for island in range(count) for number in range(plan.inner[island]) for row in plan.rows(island, number)]
    assert rows == list(range(start * batch_rows, (start + steps) * batch_rows))
    for island, inner in enumerate(plan.inner):
        assert all(len(plan.rows(island, number)) >= 1 for number in range(inner))
        share = speeds[island] / sum(speeds)
        assert abs(inner - max(1, count * steps * share)) < count
        assert abs(plan.shares[island] - max(inner, steps * batch_rows * share)) < count
        reached = [plan.step(island, number) for number in range(inner + 1)]
        assert (reached[0], reached[-1]) == (start, start + steps)
        assert reached == sorted(reached)
        assert max(reached[:-1]) < start + steps, "the round ends with its last step"
        meetings = plan.meetings(island, fragments, overlap)
        assert all(1 <= leaves <= arrives <= inner for leaves, arrives in meetings)
        assert meetings == sorted(meetings)
        assert meetings[-1][1] == inner
    if steps * count % 4 == 0 and speeds == [3.0, 1.0]:
        assert plan.inner == (3 * steps // 2, steps // 2)


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_what_rounding_takes_from_a_message_comes_with_the_next_ones(bits: Any):
    generator = torch.Generator().manual_seed(bits)
    values = torch.randn(3 * BLOCK + 5, generator=generator) * torch.logspace(-6, 2, 3 * BLOCK + 5)
    residual, arrived = torch.zeros_like(values), torch.zeros_like(values)
    for _ in range(50):
        message = encode(values + residual, bits)
        assert len(message) == encoded_bytes(len(values), bits)
        read = decode(message, len(values), bits)
        residual = values + residual - read
        arrived += read
    largest = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK).abs().amax(1)
    step = {32: 0.0, 8: 1 / 127, 4: 1 / 7}[bits]
    bound = 2 * step * largest.repeat_interleave(BLOCK)[: len(values)] / 50 + 1e-5 * values.abs()
    assert bool(((arrived / 50 - values).abs() <= bound).all())
    assert decode(encode(torch.zeros(5), bits), 5, bits).equal(torch.zeros(5))


def test_fragments_hold_every_tensor_once_and_about_as_much_each():
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(DEEP, num_hidden_layers=9))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    biases = {name: b.shape for name, b in model.named_buffers() if name in model.state_dict()}
    for count in (1, 2, 3, 4):
        found = fragments_of(dataclasses.replace(DEEP, num_hidden_layers=9), shapes, biases, count)
        assert len(found) == count
        assert sorted(name for one in found for name in one.names) == sorted([*shapes, *biases])
        sizes = [one.parameters for one in found]
        assert max(sizes) < 2 * min(sizes)
        tensors = {name: torch.randn(shape) for name, shape in {**shapes, **biases}.items()}
        for one in found:
            assert all(tensor.equal(tensors[name]) for name, tensor in one.named(one.flat(tensors)).items())


@pytest.mark.parametrize(
    ("text", "workers", "expected"),
    [("1", 3, [3]), ("2", 4, [2, 2]), ("2", 5, [3, 2]), ("3:1", 4, [3, 1]), ("2", 2, [1, 1])],
)
def test_workers_are_split_into_islands_in_a_row(text: str, workers: int, expected: list[int]):
    islands = islands_side_by_side(text, workers, 4, 2, 1)
    assert [len(island.ranks) for island in islands] == expected
    assert [rank for island in islands for rank in island.ranks] == list(range(workers))
    assert [island.layout.workers for island in islands] == expected


def test_islands_of_a_plan_are_crews_of_the_workers_that_the_plan_numbers_team_by_team():
    plan = plan_of({"near": (1, 3), "far": (1, 4)}, [(["near"], 3, [12]), (["far"] * 2, 1, [5, 7]), (["far"], 2, [12])])
    for group, island in zip(plan["groups"], (0, 1, 1), strict=True):
        group["island"] = island
    near, far = islands_of_plan(plan, PLANNED)
    assert (near.ranks, far.ranks) == ((0, 1, 2), (3, 4, 5, 6))
    assert [group.replicas for group in far.layout.groups] == [((0, 1),), ((2,), (3,))]
    assert (near.speed, far.speed) == (3.0, 3.0)
    with pytest.raises(InputError, match="this is no plan"):
        islands_of_plan({"groups": [{}]}, PLANNED)


@pytest.mark.parametrize(("text", "workers"), [("3", 2), ("2:2", 3), ("two", 2), ("0", 2), ("1:0", 1), ("", 1)])
def test_islands_that_cannot_be_are_refused_in_a_sentence(text: str, workers: int):
    with pytest.raises(InputError, match="--islands"):
        islands_side_by_side(text, workers, 4, 2, 1)


# ------------------------------------------------------------------------------------------------ the real commands

ISLANDS: dict[str, Any] = {
    "islands": 2, "sync_every": 5, "steps": 15, "checkpoint_every": 5, "valid_every": 5, "precision": "fp32",
    "fragments": 2, "overlap": 1, "outer_bits": 4, "inner_steps": "planned",
}  # fmt: skip


def told(out: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock decides, and without what is said of repeated and of long steps."""
    clock = {"seconds", "tokens_per_second", "memory_bytes", "busy_seconds", "waited_seconds", "round_seconds"}
    values = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    clocks = ("computed again", "usually it takes")
    values = [record for record in values if not any(said in record.get("message", "") for said in clocks)]
    values = [record for record in values if record["kind"] not in ("ranks", "step_stats", "timeline")]
    return [{name: value for name, value in record.items() if name not in clock} for record in values]


@pytest.mark.slow(60)
def test_an_island_is_killed_and_the_run_goes_on_bit_for_bit_or_without_it(data: Path, shape: Path, tmp_path: Path):
    whole, out, fewer = tmp_path / "whole", tmp_path / "run", tmp_path / "fewer"
    done = run_ranks(2, command(whole, data, shape, **ISLANDS))
    assert done.returncode == 0, done.stderr
    assert_all_workers_are_told(whole, done.stderr, [0, 1], tmp_path / "report.html")
    process = start_ranks(2, command(out, data, shape, **ISLANDS))
    until(lambda: (out / "checkpoints" / "step-00000005").exists(), process)
    process.ranks[-1].kill()
    _, said = process.communicate()
    assert process.returncode != 0
    assert " failed: " in said
    shutil.copytree(out, fewer)
    done = run_ranks(2, command(out, data, shape, **ISLANDS))
    assert done.returncode == 0, done.stderr
    assert told(out) == told(whole)
    for file in ("model/model.safetensors", "islands/1/step-00000015/training.safetensors"):
        found, expected = load_file(out / file), load_file(whole / file)
        assert found.keys() == expected.keys()
        assert all(tensor.equal(expected[name]) for name, tensor in found.items())
    meetings = [record for record in told(whole) if record["kind"] == "outer_step"]
    assert [meeting["step"] for meeting in meetings] == [5, 10, 15]
    rows = sorted(row for meeting in meetings for first, n in meeting["rows"] for row in range(first, first + n))
    assert rows == list(range(15 * 4))
    done = run_ranks(1, command(fewer, data, shape, **ISLANDS))
    assert done.returncode == 2
    assert "--islands 2 does not fit the 1 rank of this job" in done.stderr
    done = run_ranks(1, command(fewer, data, shape, **(ISLANDS | {"islands": 1})))
    assert done.returncode == 0, done.stderr
    assert "2 islands wrote the checkpoint, 1 go on from the shared model" in done.stderr
    steps = [record["step"] for record in told(fewer) if record["kind"] == "train"]
    assert sorted(set(steps)) == list(range(1, 16))


def follow(comm: Communicator) -> list[tuple[int, ...]]:
    """Island 1 takes three times as long for a step; then a little longer than that, which is not worth a change."""
    island = island_of(comm, [1, 1], [1.0, 1.0], settings(inner_steps="measured", steps=6), 2, {})
    meetings = learn(island, 4, seconds=[0.01, 0.03][comm.rank])
    meetings += learn(island, 6, seconds=[0.01, 0.031][comm.rank])
    return [meeting.round.inner for meeting in meetings]


def test_inner_steps_follow_measured_speed_but_not_its_noise():
    assert on_ranks(2, follow) == [[(2, 2), (3, 1), (3, 1)]] * 2


def wait_for(comm: Communicator) -> list[float]:
    island = island_of(comm, [1, 1], [1.0, 1.0], settings(), 2, {})
    found = [island._patience]
    learn(island, 2, seconds=[0.5, 1.0][comm.rank])
    return [*found, island._patience - comm.timeout]


def test_once_a_round_showed_its_length_islands_wait_no_longer_than_their_patience_and_ten_of_them():
    for before, beyond in on_ranks(2, wait_for):
        assert before == ROUND_PATIENCE_SECONDS
        assert beyond == pytest.approx(20.0)


def differ(comm: Communicator) -> str:
    island = island_of(comm, [1, 1], [1.0, 1.0], settings(), 2, {})
    learn(island, 2)
    assert island.outer is not None
    if comm.rank == 1:
        island.outer.weights[0][5] += 1e-4
    with pytest.raises(InputError) as refused:
        learn(island, 4)
    return str(refused.value)


def test_islands_whose_shared_models_differ_stop_with_a_sentence():
    for message in on_ranks(2, differ):
        assert message.startswith("the shared model of island 1 differs from island 0's after step 4: ")
