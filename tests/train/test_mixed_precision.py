"""A number format per chip: loss scales change no gradient, an overflow anywhere is no step anywhere."""

import dataclasses
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_settings
from layouts import random_layout
from number_formats import SMOOTH, distances, employed, for_groups
from spawned_ranks import on_ranks
from tiny_models import DEEP, SHAPE, Rows, error, random_batch, random_model

from motley.errors import InputError
from motley.fleet.capabilities import capabilities
from motley.fleet.device import Format
from motley.fleet.probe import Machine, MatmulRate, choose_dtype, device_name
from motley.parallel import number_formats as number_formats_module
from motley.parallel.communicator import Communicator
from motley.parallel.layout import Layout, PipelineGroup, from_plan, side_by_side
from motley.parallel.number_formats import asked_format, check_formats, number_formats, wire_dtype
from motley.parallel.overflow import culprits
from motley.train import loss_scaler as scale
from motley.train.checkpoint import checkpoints
from motley.train.loss import summed_cross_entropy
from motley.train.loss_scaler import LossScaler
from motley.train.pretrain import pretrain
from motley.train.run_folder import RunFolder
from motley.train.step import LossWeights, accumulate
from motley.train.strategy import SingleProcess

pytestmark = pytest.mark.usefixtures("tiny_nano", "few")


def beside(size: int, zero: int) -> Layout:
    """SingleProcesss of speeds 1, 2, 3 ... that each compute with the whole model."""
    layout = side_by_side(size, DEEP.num_hidden_layers, 2)
    return dataclasses.replace(layout, zero=zero, rates=tuple(1.0 + rank for rank in range(size)))  # type: ignore[arg-type]


@pytest.mark.slow(12)
@pytest.mark.parametrize("size", [1, 4])
def test_loss_scales_change_no_gradient_of_any_layout(size: int) -> None:
    chance, cases = random.Random(size), []
    for seed in range(1 if size == 1 else 5):
        layout = random_layout(size, chance)
        scales = for_groups(layout, size, chance, [2.0**k for k in (-6, 3, 16)])
        cases.append((DEEP, layout, seed, ["fp32"] * size, scales))
    for zero in (2, 3):
        for shape in (DEEP, dataclasses.replace(DEEP, tie_word_embeddings=True)):
            scales = [2.0 ** chance.choice((-6, 3, 16)) for _ in range(size)]
            cases.append((shape, beside(size, zero), zero, ["fp32"] * size, scales))
    assert max(distances(size, cases)) <= 1e-6


@pytest.mark.slow(10)
def test_mixed_formats_give_the_gradient_within_their_rounding() -> None:
    """Three significant digits of fp16, two of bf16, added up over four layers."""
    size, chance, cases = 3, random.Random(3), []
    for seed in range(5):
        layout = random_layout(size, chance) if seed < 3 else beside(size, zero=seed - 1)
        for choices in (["fp16"], ["fp16", "bf16", "fp32"]):
            formats = for_groups(layout, size, chance, choices)
            scales = [2.0**12 if name == "fp16" else 1.0 for name in formats]
            cases.append((SMOOTH, layout, seed, formats, scales))
    found = distances(size, cases)
    assert max(found[::2]) < 0.01
    assert max(found[1::2]) < 0.08


PIPE = Layout((PipelineGroup(((0, 1),), (2, 2), micro_batch=2), PipelineGroup(((2,),), (4,), micro_batch=2)), zero=1)
SHARED = Layout((PipelineGroup(((0,), (1,)), (4,), (2, 2), micro_batch=2), PipelineGroup(((2,),), (4,), micro_batch=2)))


def overflow(comm: Communicator, layout: Layout, formats: list[Format], values: list[float], factor: float) -> Any:
    """(culprits, is the norm finite, what is said, scales afterwards) of a step; weights of layer 1 times `factor`."""
    ranks = employed(comm, DEEP, layout, 0, formats, values)
    for part in ranks.buffers.here:
        if part.name == "model.layers.1.self_attn.o_proj.weight":
            ranks.buffers.view(part).data *= factor
    losses, norm = ranks.gradient(ranks.read(Rows(), 0))  # type: ignore[arg-type]
    return losses.culprits, norm < float("inf"), ranks.scaler.follow(losses.culprits), ranks.scaler.values


@pytest.mark.parametrize(
    ("layout", "formats", "values", "factor", "expected"),
    [
        *(
            (beside(3, zero), *case)
            for zero in (2, 3)
            for case in (
                (["fp32", "fp16", "fp16"], [1.0, 2.0**40, 8.0], 1.0, [1]),  # its gradient, which reaches the owners
                (["fp16", "fp32", "fp16"], [2.0**40, 1.0, 2.0**40], 1.0, [0, 2]),
                (["fp32", "fp16", "fp32"], [1.0, 8.0, 1.0], 1e6, [1]),  # its activations
            )
        ),
        (PIPE, ["bf16", "fp16", "fp16"], [1.0, 2.0**40, 8.0], 1.0, [1]),  # backward pass of the last stage
        (PIPE, ["fp16", "fp32", "fp16"], [2.0**40, 1.0, 8.0], 1.0, [0]),  # of the first
        (PIPE, ["fp16", "fp32", "fp32"], [8.0, 1.0, 1.0], 1e6, [0]),  # activations, which reach the next stage
        (PIPE, ["fp32", "fp16", "fp32"], [1.0, 8.0, 1.0], 1e6, [1]),  # that fp16 cannot receive
        (PIPE, ["fp16", "fp32", "fp16"], [8.0, 1.0, 2.0**40], 1.0, [2]),  # another lane
        (SHARED, ["fp16", "fp16", "fp16"], [2.0**40, 2.0**40, 8.0], 1.0, [0, 1]),  # those who share experts
    ],
)
def test_an_overflow_is_no_step_anywhere_and_halves_the_scale_only_where_it_happened(
    layout: Layout, formats: list[Format], values: list[float], factor: float, expected: list[int]
) -> None:
    halved = [value / 2 if rank in expected else value for rank, value in enumerate(values)]
    for found, finite, said, after in on_ranks(3, overflow, layout, formats, values, factor):
        assert (found, finite, after) == (expected, False, halved)
        assert said.endswith(f"overflowed fp16; loss scale now {halved[expected[0]]:g}")


def test_who_only_passes_on_what_is_broken_is_no_culprit() -> None:
    def seen(**rows: int) -> torch.Tensor:
        table = torch.zeros(4, 4)
        for name, bits in rows.items():
            table[int(name[1:])] = torch.tensor([float(bit) for bit in f"{bits:04d}"])
        return table

    alone, shared = [(0,), (1,), (2,), (3,)], [(0, 1), (2, 3)]
    assert culprits(seen(), alone) == []
    assert culprits(seen(w0=1011, w1=1110), alone) == [0]  # activations, down the lane and back
    assert culprits(seen(w0=11, w1=11, w2=10), alone) == [2]  # a gradient, up the lane
    assert culprits(seen(w0=10, w3=10), alone) == [0, 3]
    assert culprits(seen(w1=1011, w0=11, w2=1110, w3=1010), shared) == [0, 1]


def test_a_scale_doubles_after_many_good_steps_and_never_where_none_is_needed() -> None:
    scales = LossScaler.of(["fp32", "fp16", "bf16", "fp16"])
    assert scales.values == [1.0, 2.0**16, 1.0, 2.0**16]
    assert scales.follow([3]) == "rank 3 overflowed fp16; loss scale now 32768"
    for _ in range(scale.GOOD_STEPS):
        assert scales.follow([]) is None
    assert scales.values == [1.0, 2.0**17, 1.0, 2.0**16]


def test_at_the_lowest_scale_an_overflow_is_a_broken_step_like_any_other() -> None:
    scales = LossScaler([1.0, 4.0, 1.0], [0, 0, 0], [1, 2])
    assert scales.follow([2]) is None
    assert scales.hopeless([2]) == "; rank 2 overflowed fp16 at a loss scale of 1: give it --precision fp32"
    assert scales.follow([0, 1]) is None, "worker 0 has none to lower"
    assert scales.hopeless([0]) == ""
    assert scales.values == [1.0, 4.0, 1.0]


def test_scales_of_a_checkpoint_go_on_and_another_crew_begins_at_the_lowest() -> None:
    saved = dataclasses.asdict(LossScaler([1.0, 64.0, 256.0], [5, 6, 7], [1, 2]))
    saved = json.loads(json.dumps(saved))
    same, fewer, none = (LossScaler.of(f) for f in (["bf16", "fp16", "fp16"], ["fp16", "fp32"], ["bf16"] * 3))
    for scales in (same, fewer, none):
        scales.restore(saved)
    assert (same.values, same.good) == ([1.0, 64.0, 256.0], [5, 6, 7])
    assert (fewer.values, fewer.good) == ([64.0, 1.0], [0, 0])
    assert none.values == [1.0] * 3


def events(out: Path) -> list[str]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    messages = [record["message"] for record in records if record["kind"] == "event"]
    return [message for message in messages if "usually it takes" not in message]  # that is for the machine to decide


def train_losses(out: Path) -> list[Any]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(record["loss"], record.get("loss_scale")) for record in records if record["kind"] == "train"]


def test_a_run_finds_its_scale_and_goes_on_exactly(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins far too high: more skipped steps in a row than the guard would bear."""
    monkeypatch.setattr(scale, "FIRST", 2.0**40)
    asked = {"precision": "fp16", "steps": 30}
    whole, out = tmp_path / "whole", tmp_path / "out"
    pretrain(run_settings(whole, data, **asked))
    assert len(events(whole)) > 12
    assert events(whole)[0] == "step skipped: rank 0 overflowed fp16; loss scale now 5.49756e+11"
    assert len(checkpoints(whole)) > 1
    stop = len(train_losses(whole)) - len(events(whole)) - 3

    def stopped(self: SingleProcess, *arguments: Any) -> None:
        nonlocal stop
        stop -= 1
        if not stop:
            raise KeyboardInterrupt
        update(self, *arguments)

    update = SingleProcess.update
    with monkeypatch.context() as once:
        once.setattr(SingleProcess, "update", stopped)
        with pytest.raises(KeyboardInterrupt):
            pretrain(run_settings(out, data, **asked))
    assert len(train_losses(out)) < 30
    pretrain(run_settings(out, data, **asked))
    assert train_losses(out) == train_losses(whole)
    assert events(out) == events(whole)


def test_a_run_whose_last_gradient_overflows_is_still_complete(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow, seen = LossScaler.follow, []

    def unlucky(self: LossScaler, found: list[int]) -> str | None:
        seen.append(found)
        return follow(self, [0] if len(seen) == 13 else found)  # the gradient behind the last of 12 steps

    monkeypatch.setattr(LossScaler, "follow", unlucky)
    pretrain(run_settings(tmp_path, data, precision="fp16"))
    assert len(seen) == 14
    assert checkpoints(tmp_path)[-1].name == "step-00000012"


def test_what_overflows_at_any_scale_stops_with_the_way_out(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "FIRST", 4.0)
    with pytest.raises(InputError, match="rank 0 overflowed fp16 at a loss scale of 1: give it --precision fp32"):
        pretrain(run_settings(tmp_path, data, precision="fp16", learning_rate=1e30, steps=20))


@pytest.mark.slow(15)
def test_fp16_and_fp8_learn_what_fp32_learns(data: Path, tmp_path: Path) -> None:
    found = {}
    for name in ("fp32", "fp16", "fp8"):
        pretrain(run_settings(tmp_path / name, data, precision=name, steps=50, batch_rows=4, checkpoint_every=50))
        found[name] = [loss for loss, _ in train_losses(tmp_path / name)]
        assert not [event for event in events(tmp_path / name) if "experts of MoE layer" not in event]
    assert found["fp32"][-1] < found["fp32"][0] - 1
    ends = [sum(losses[-10:]) / 10 for losses in found.values()]
    assert ends[1:] == pytest.approx(ends[:1] * 2, rel=0.002)


@pytest.mark.parametrize("name", ["full", "compressed queries", "tied"])
def test_a_model_in_fp16_computes_what_it_computes_in_fp32(name: str) -> None:
    shape = {
        "full": SHAPE,
        "compressed queries": dataclasses.replace(SHAPE, q_lora_rank=8),
        "tied": dataclasses.replace(SHAPE, tie_word_embeddings=True),
    }[name]
    model, batch = random_model(1, shape), random_batch(1)
    results = []
    for dtype in (torch.float32, torch.float16):
        model.compute_dtype = dtype
        model.zero_grad(set_to_none=True)
        losses = accumulate(model, batch, 3, LossWeights(0.3, 0.05), confined=True)
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((losses.main, losses.mtp, grads))
    assert results[1][:2] == pytest.approx(results[0][:2], rel=1e-3)
    assert error(results[1][2], results[0][2]) < 0.01


def test_small_slopes_survive_fp16_when_the_loss_will_be_scaled() -> None:
    """A word that is hardly ever wrong still moves: its probability is below what fp16 can hold."""
    hidden = torch.zeros(8, 4, dtype=torch.float16, requires_grad=True)
    hidden.data[:, 0] = 20.0
    head = torch.zeros(3, 4, requires_grad=True)
    head.data[1, 0] = -0.9
    head.data[2, 0] = -0.95
    targets = torch.zeros(8, dtype=torch.int64)
    exact = torch.tensor([0.0, -18.0, -19.0], dtype=torch.float64).softmax(0)[1] * 20.0 * 8
    moved = []
    for slope in (1.0, 2.0**12):
        head.grad = None
        (summed_cross_entropy(hidden, head, targets, slope) * 2.0**12).backward()
        assert head.grad is not None
        moved.append(float(head.grad[1, 0]) / 2.0**12)
    assert moved[1] == pytest.approx(float(exact), rel=0.01)
    assert abs(moved[0] / float(exact) - 1) > 0.5


# ------------------------------------------------------------------------------------------------- who decides


def measured(name: str, **gflops: float) -> Machine:
    rates = tuple(MatmulRate(dtype, 4096, 256, 1024, rate) for dtype, rate in gflops.items())
    return Machine("cpu", name, 1, 1, 1, 1, None, rates, 1.0, choose_dtype(rates))


def test_auto_takes_16_bits_where_they_pay_and_bf16_before_fp16() -> None:
    assert measured("old CPU", fp32=100, bf16=60).compute_dtype == "fp32"
    assert measured("A100", fp32=100, bf16=800, fp16=900).compute_dtype == "bf16"
    assert measured("V100", fp32=14, fp16=90).compute_dtype == "fp16"
    assert measured("P4", fp32=5, fp16=5).compute_dtype == "fp32"


def test_messages_are_bf16_only_if_every_worker_can_make_and_take_them() -> None:
    assert wire_dtype(["bf16", "fp8"]) == torch.bfloat16
    assert wire_dtype(["bf16", "fp16"]) == wire_dtype(["fp32", "bf16"]) == wire_dtype(["fp16"]) == torch.float32


def decide(comm: Communicator, folder: Path, layout: Layout, asked: list[Any], chips: list[str]) -> Any:
    """(formats, who measured) by a crew of pretended chips, on which the first kind gains from bf16."""
    measuring: list[str] = []

    def measure(**_: Any) -> Machine:
        measuring.append(chips[comm.rank])
        return measured(chips[comm.rank], fp32=1, **({"bf16": 2} if chips[comm.rank] == chips[0] else {"fp16": 2}))

    number_formats_module.kind_of_chip = lambda device: chips[comm.rank]  # type: ignore[assignment]
    number_formats_module.device_name = lambda device: "the name of them all"  # type: ignore[assignment]
    number_formats_module.probe = measure  # type: ignore[assignment]
    wish = asked_format(asked[comm.rank], None, layout, comm.rank)
    return number_formats(wish, comm, RunFolder(folder, None), measure), measuring


def test_each_kind_of_chip_decides_once_for_itself_unless_told(tmp_path: Path) -> None:
    layout, chips = side_by_side(4, 4, 2), ["A100", "V100", "V100", "A100"]
    found = on_ranks(4, decide, tmp_path, layout, ["auto", "auto", "auto", "fp32"], chips)
    assert [formats for formats, _ in found] == [["bf16", "fp16", "fp16", "fp32"]] * 4
    assert [who for _, who in found] == [["A100"], ["V100"], [], []]
    later = on_ranks(2, decide, tmp_path, side_by_side(2, 4, 2), ["auto"] * 2, ["V100", "A100"])
    assert later == [(["fp16", "bf16"], [])] * 2, "what was chosen stays, whatever is measured now"


def test_what_a_run_kept_by_the_name_of_a_chip_is_honoured_where_the_chip_can_do_it(tmp_path: Path) -> None:
    """As runs did before; now one name stands for chips with bf16 and for others without."""
    layout, chips = side_by_side(2, 4, 2), ["with bf16", "without"]
    for kept, formats in (("bf16", ["bf16", "fp16"]), ("fp32", ["fp32", "fp32"])):
        folder = tmp_path / kept
        folder.mkdir()
        (folder / "formats.json").write_text(json.dumps({"the name of them all": kept}))
        found = on_ranks(2, decide, folder, layout, ["auto"] * 2, chips)
        assert [chosen for chosen, _ in found] == [formats] * 2
        again = on_ranks(2, decide, folder, layout, ["auto"] * 2, chips)
        assert again == [(formats, [])] * 2, "kept by what they are now"


def test_a_run_that_goes_on_with_another_chip_of_the_same_name_measures_again(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    now = dataclasses.replace(measured(device_name(cpu), fp32=1), chip=capabilities(cpu))
    other = dataclasses.replace(now, chip="with bf16", compute_dtype="bf16")
    named = dataclasses.replace(now, chip=None, cores=7)
    run = RunFolder(tmp_path, None)
    for kept, found in ((other, now), (now, now), (named, named)):
        (tmp_path / "machine.json").write_text(json.dumps(kept.to_dict()))
        assert run.machine(cpu, now) == found


def wait_for_measuring(comm: Communicator, folder: Path) -> list[Format]:
    """Ranks 1's chip is measured for longer than workers are patient otherwise."""

    def measure(**_: Any) -> Machine:
        time.sleep(4)
        return measured("slow", fp32=1)

    number_formats_module.kind_of_chip = lambda device: str(comm.rank)  # type: ignore[assignment]
    number_formats_module.probe = measure  # type: ignore[assignment]
    comm = dataclasses.replace(comm, timeout=2.0).acquainted()
    return number_formats("auto", comm, RunFolder(folder, None), lambda: measured("quick", fp32=1))


def test_workers_wait_for_one_that_measures_as_long_as_that_may_take(tmp_path: Path) -> None:
    assert on_ranks(2, wait_for_measuring, tmp_path) == [["fp32", "fp32"]] * 2


def test_a_plan_says_what_its_chips_compute_in_unless_told(tmp_path: Path) -> None:
    layout = Layout((PipelineGroup(((0, 1),), (2, 2), formats=("bf16", "fp16")),))
    found = on_ranks(2, decide, tmp_path, layout, ["auto", "auto"], ["A100", "V100"])
    assert found == [(["bf16", "fp16"], [])] * 2
    found = on_ranks(2, decide, tmp_path, layout, ["auto", "fp32"], ["A100", "V100"])
    assert found == [(["bf16", "fp32"], [])] * 2


def test_workers_that_share_experts_compute_in_one_format() -> None:
    layout = Layout((PipelineGroup(((0,), (1,)), (4,), (2, 2)), PipelineGroup(((2,),), (4,))))
    check_formats(["bf16", "bf16", "fp16"], layout)
    with pytest.raises(InputError, match="must compute in one format, but there are rank 0 bf16, rank 1 fp16;"):
        check_formats(["bf16", "fp16", "fp16"], layout)


def test_a_plan_file_gives_every_stage_the_format_of_its_pool() -> None:
    group: dict[str, Any] = {
        "pools": ["new", "old"], "tp": {"new": 1, "old": 1}, "cp": 1, "zero": 1, "schedule": "1f1b", "island": 0,
        "dp": 1, "ep": 1, "recompute": "none", "micro_batch": 2, "sequences": 4,
        "precision": {"new": "bf16", "old": "fp16"},
        "stages": [
            {"pool": pool, "layers": layers, "mtp": head, "head": head, "memory_bytes": {"optimizer": 1.0},
             "memory_limit_bytes": 10.0}
            for pool, layers, head in (("new", [0, 2], False), ("old", [3, 3], True))
        ],
    }  # fmt: skip
    plan = {"groups": [group], "step_seconds": 1.0}
    assert from_plan(plan, DEEP).groups[0].formats == ("bf16", "fp16")
    group["precision"]["old"] = "tf32"
    with pytest.raises(InputError, match="the plan computes in tf32 on new and old"):
        from_plan(plan, DEEP)
