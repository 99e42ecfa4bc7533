"""Any crew goes on from any checkpoint folder: more workers or fewer, another layout, another number of islands.

Through the disk and bit for bit: what a crew takes from a folder and writes again is what stood there.
"""

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import command, losses
from island_runs import PIPELINE, island_of, learn
from island_runs import settings as island_settings
from layouts import pair, settings
from safetensors.torch import load_file, save_file
from spawned_ranks import on_ranks, run, run_ranks
from tiny_models import DEEP, FEW, ODD, Rows, error, random_model

from motley.data.tokenizer import train_tokenizer
from motley.model import experts
from motley.parallel.communicator import Communicator
from motley.parallel.diloco.diloco import Diloco
from motley.parallel.full_state import TIED
from motley.parallel.layout import Layout, PipelineGroup, side_by_side
from motley.parallel.rank import Ranks
from motley.train.checkpoint import checkpoints, resume, save_checkpoint
from motley.train.run_state import RunState

LEARNING_RATE = 0.01


def write(run: Path, strategy: Ranks | Diloco, course: RunState) -> None:
    """A checkpoint, as the loop writes it."""
    facts = {"step": course.at.step, "position": dataclasses.asdict(course.at)}
    own = {"guard": dataclasses.asdict(course.guard), "scales": dataclasses.asdict(strategy.scaler)}
    save_checkpoint(run, strategy, facts, own, train_tokenizer(["one two three"], 270))


def assert_same_tensors(found: Path, expected: Path) -> None:
    ours, theirs = load_file(found), load_file(expected)
    assert ours.keys() == theirs.keys(), found
    for name, tensor in theirs.items():  # a crew writes fp32 what a single process keeps in bf16
        assert ours[name].float().equal(tensor.float()), (found, name)


def a_step(strategy: Ranks | Diloco, rows: range) -> tuple[float, float, torch.Tensor | None]:
    """(loss, gradient norm, at the island's leader all weights after it) of a step on these rows."""
    ranks = strategy.ranks if isinstance(strategy, Diloco) else strategy
    found, norm = ranks.gradient(ranks.read_rows(Rows(), 0, rows))  # type: ignore[arg-type]
    ranks.update(found, norm, LEARNING_RATE)
    state = pair(ranks.state())
    if state is None:
        return found.main, norm, None
    names = sorted(state[0].keys() - ({TIED} if ranks.shape.tie_word_embeddings else set()))
    return found.main, norm, torch.cat([state[0][name].flatten() for name in names])


def assert_same_step(found: Any, unharmed: Any, about: Any) -> None:
    assert found[:2] == pytest.approx(unharmed[:2], rel=1e-6), about
    assert error(found[2], unharmed[2]) <= 1e-6, about


# ------------------------------------------------------------------------------------------------------------ layouts

CHAIN = {  # each crew goes on from the folder of the one before
    "alone": side_by_side(1, 4, 2),
    "two in a pipeline": Layout((PipelineGroup(((0, 1),), (1, 3), schedule="zero_bubble", micro_batch=2),), zero=1),
    "two with 1 and 3 experts beside a pipeline of two": Layout(
        (
            PipelineGroup(((0,), (1,)), (4,), experts=(1, 3), micro_batch=2),
            PipelineGroup(((2, 3),), (3, 1), micro_batch=3),
        ),
        zero=1,
    ),
    "two at ZeRO 3": dataclasses.replace(side_by_side(2, 4, 2, zero=3), memory=(3.0, 1.0)),
    "three at ZeRO 2": dataclasses.replace(side_by_side(3, 4, 3, zero=2), memory=(1.0, 1.0, 4.0)),
    "four at ZeRO 0": side_by_side(4, 4, 2),
    "alone again": side_by_side(1, 4, 3),
}
SHAPES = {"V3": DEEP, **ODD}


def go_on(comm: Communicator, layout: Layout, run: Path, again: Path, shape: str, chosen: dict[str, Any]) -> list[Any]:
    """Write again what a crew takes from the run's newest checkpoint; the next step, a checkpoint, the step after."""
    experts.PAD = FEW
    ranks = Ranks(SHAPES[shape], settings(out=run, **chosen), layout, comm)
    if (run / "checkpoints").is_dir():
        course = resume(ranks)
        write(again, ranks, course)
    else:
        course = RunState()
        ranks.take_state((dict(random_model(5, SHAPES[shape]).state_dict()), {}) if comm.leads else None)
    steps = []
    for number in range(2):
        step = course.at.step + number
        steps.append(a_step(ranks, range(7 * step, 7 * step + 7)))
        if number == 0:
            course.at.step += 1
            write(run, ranks, course)
            course.at.step -= 1
    return steps


@pytest.mark.slow(40)
@pytest.mark.parametrize(
    ("shape", "chosen"), [("V3", {"optimizer": "muon"}), ("tied", {"optimizer": "adamw", "moments": "bf16"})]
)
def test_any_layout_goes_on_from_the_folder_of_any_other(shape: str, chosen: dict[str, Any], tmp_path: Path):
    run, unharmed = tmp_path / "run", None
    for number, (name, layout) in enumerate(CHAIN.items()):
        again = tmp_path / f"again-{number}"
        steps = on_ranks(layout.workers, go_on, layout, run, again, shape, chosen)[0]
        if number:
            folder = f"checkpoints/step-{number:08d}"
            for file in ("model.safetensors", "training.safetensors"):
                assert_same_tensors(again / folder / file, run / folder / file)
            assert_same_step(steps[0], unharmed, name)
        unharmed = steps[1]


# ------------------------------------------------------------------------------------------------------------ islands

ROUND = 2  # steps
APART = {"fragments": 2, "overlap": 1, "outer_bits": 4}  # islands that differ from the shared model between rounds
TWO, THREE = [2, 1], [1, 2, 1]  # workers of islands
ROWS = range(300, 306)


def learn_on(
    comm: Communicator, sizes: Sequence[int], layouts: dict[int, Layout], run: Path, again: Path, chosen: dict[str, Any]
) -> tuple[str, Any, Any]:
    """(what is said, a step of the island by itself right after the beginning, another one after a round).

    The islands begin with the run's newest checkpoint and write again what they took, or begin it. After the round they
    write the run's next one, and the step after that is the unharmed run's.
    """
    config = island_settings(out=run, steps=99, **chosen)
    said, read, course = io.StringIO(), None, RunState()

    def beginning() -> Diloco:
        nonlocal course
        island = island_of(comm, sizes, [1.0] * len(sizes), config, ROUND, layouts)
        if (run / "checkpoints").is_dir():
            course = resume(island)
        return island

    if (run / "checkpoints").is_dir():
        with contextlib.redirect_stderr(said):
            island = beginning()
        write(again, island, course)
        read = a_step(island, ROWS)
    island = beginning()
    learn(island, course.at.step + ROUND, start=course.at.step)
    course.at.step += ROUND
    write(run, island, course)
    return said.getvalue(), read, a_step(island, ROWS)


def assert_new_optimizer(state: Path) -> None:
    for name, tensor in load_file(state).items():
        assert not name.endswith((":exp_avg", ":exp_avg_sq", ":step")), name
        assert not name.endswith(":momentum") or not torch.count_nonzero(tensor), name


@pytest.mark.slow(40)
@pytest.mark.parametrize("chosen", [{}, APART], ids=["together", "apart"])
def test_any_number_of_islands_goes_on_from_the_folder_of_any_other(chosen: dict[str, Any], tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    ((_, _, unharmed),) = on_ranks(1, learn_on, [1], {}, one, tmp_path, chosen)

    # One becomes two. What a save that was killed left of two islands before belongs to another life of the run.
    shutil.copytree(one, two)
    step = "step-00000002"
    left = two / "islands" / "0" / step
    left.mkdir(parents=True)
    save_file({}, left / "training.safetensors")
    (left / "training.json").write_text("{}")
    again = tmp_path / "again-two"
    first, _, second = on_ranks(3, learn_on, TWO, {0: PIPELINE}, two, again, chosen)
    assert first[0].splitlines() == [
        "1 island wrote the checkpoint, 2 go on from the shared model",
        f"island 0 finds nothing of its own in {left}: it begins from the shared model, with the optimizer state of "
        "the checkpoint",
    ]
    assert second[0].splitlines() == [
        f"island 1 finds nothing of its own in {two / 'islands' / '1' / step}: it begins from the shared model, with a "
        "new optimizer"
    ]
    for file in ("model.safetensors", "training.safetensors"):
        assert_same_tensors(again / "checkpoints" / step / file, one / "checkpoints" / step / file)
    assert_new_optimizer(again / "islands" / "1" / step / "training.safetensors")
    assert_same_step(first[1], unharmed, "island 0")
    assert second[1][:2] == pytest.approx(unharmed[:2], rel=1e-6), "the shared model"

    # Two become three, each of the two with what was its own.
    three, again, step = tmp_path / "three", tmp_path / "again-three", "step-00000004"
    shutil.copytree(two, three)
    by_worker = on_ranks(4, learn_on, THREE, {}, three, again, chosen)
    assert "2 islands wrote the checkpoint, 3 go on from the shared model" in by_worker[0][0]
    assert [said.count("finds nothing of its own") for said, *_ in by_worker] == [0, 0, 0, 1]
    for file in ("model.safetensors", "training.safetensors", "outer.safetensors"):
        assert_same_tensors(again / "checkpoints" / step / file, two / "checkpoints" / step / file)
    for island in ("0", "1"):
        ours, theirs = (folder / "islands" / island / step for folder in (again, two))
        assert_same_tensors(ours / "training.safetensors", theirs / "training.safetensors")
        since = [json.loads((folder / "training.json").read_text())["learned_since"] for folder in (ours, theirs)]
        assert since[0] == since[1]
    assert_new_optimizer(again / "islands" / "2" / step / "training.safetensors")
    assert_same_step(by_worker[0][1], first[2], "island 0")
    assert_same_step(by_worker[1][1], second[2], "island 1")

    # Two become one: the shared model, with the optimizer state of island 0.
    again = tmp_path / "again-one"
    layouts = {0: side_by_side(3, 3, 2, zero=3)}
    by_worker_of_one = on_ranks(3, learn_on, [3], layouts, two, again, chosen)
    assert by_worker_of_one[0][0] == "2 islands wrote the checkpoint, 1 go on from the shared model\n"
    for file in ("model.safetensors", "training.safetensors"):
        assert_same_tensors(again / "checkpoints" / step / file, three / "checkpoints" / step / file)
    assert by_worker_of_one[0][1][:2] == pytest.approx(by_worker[3][1][:2], rel=1e-6), "the shared model"
    if not chosen:  # island 0 was where the shared model is
        assert_same_step(by_worker_of_one[0][1], first[2], "island 0")


# ------------------------------------------------------------------------------------------------- the real commands


@pytest.mark.slow(40)
def test_a_run_that_gets_more_workers_at_each_start_learns_what_one_process_learns(
    data: Path, shape: Path, tmp_path: Path
):
    """One worker until step 2, two at ZeRO 3 until step 4, four at ZeRO 2 to the end."""
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    chosen = {"steps": 6, "checkpoint_every": 2, "valid_every": 2, "keep_last": 9, "precision": "fp32"}
    done = run(command(whole, data, shape, **chosen))
    assert done.returncode == 0, done.stderr
    shutil.copytree(whole, grown)
    for workers, zero, kept in ((2, 3, 1), (4, 2, 2)):
        (grown / "result.json").unlink()
        shutil.rmtree(grown / "model")
        for later in checkpoints(grown)[kept:]:
            shutil.rmtree(later)
        done = run_ranks(workers, command(grown, data, shape, **chosen, zero=zero))
        assert done.returncode == 0, done.stderr
        assert losses(grown) == pytest.approx(losses(whole), rel=1e-5)
    found, expected = (load_file(out / "model" / "model.safetensors") for out in (grown, whole))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert error(found[name], tensor) <= 1e-4, name
