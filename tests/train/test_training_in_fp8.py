"""Training in fp8, alone and beside workers of other formats: the same step but for rounding."""

import dataclasses
import random
from typing import Any

import pytest
import torch
from layouts import ROWS, random_layout
from number_formats import SMOOTH, Case, distances, employed
from spawned_ranks import on_ranks
from tiny_models import DEEP, Rows

from motley.errors import InputError
from motley.fleet.device import Format
from motley.model import fp8
from motley.parallel import number_formats as number_formats_module
from motley.parallel.communicator import Communicator
from motley.parallel.layout import Layout, PipelineGroup, side_by_side
from motley.parallel.number_formats import number_formats
from motley.train import mixed_precision as precision
from motley.train.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("few")


@pytest.mark.slow(5)
def test_the_gradient_of_any_layout_is_that_of_one_process_in_fp8_but_for_what_is_rounded_anew() -> None:
    """Tiles of tokens follow the micro-batches, and spread experts are weighed behind their products, not inside."""
    size, chance = 3, random.Random(5)
    layouts = [random_layout(size, chance), random_layout(size, chance)]
    layouts.append(Layout((PipelineGroup(((0, 1, 2),), (1, 2, 1), schedule="zero_bubble", micro_batch=2),), zero=1))
    layouts.append(dataclasses.replace(side_by_side(size, DEEP.num_hidden_layers, 2), zero=3))
    cases: list[Case] = [(SMOOTH, layout, seed, ["fp8"] * size, [1.0] * size) for seed, layout in enumerate(layouts)]
    shared = [any(group.experts for group in layout.groups) for layout in layouts]
    assert shared == [False, True, False, False]
    for distance, spread in zip(distances(size, cases, "fp8"), shared, strict=True):
        assert distance < (0.12 if spread else 0.04)


def losses(comm: Communicator, layout: Layout, formats: list[Format], steps: int) -> Any:
    """(loss of every step, weights afterwards, held-out loss)."""
    ranks = employed(comm, SMOOTH, layout, 0, formats, [1.0] * comm.size)
    seen = []
    for step in range(steps):
        found, norm = ranks.gradient(ranks.read(Rows(), step % 2))  # type: ignore[arg-type]
        ranks.update(found, norm, 0.01)
        ranks.share_rows()
        seen.append(found.main)
    weights = torch.cat([p.detach().flatten() for p in ranks.model.parameters()])
    return seen, weights, ranks.held_out_loss(Rows(), ROWS)  # type: ignore[arg-type]


@pytest.mark.slow(4)
def test_a_crew_of_fp8_and_fp32_learns_what_fp32_learns_and_stays_one_model() -> None:
    steps, layout = 12, dataclasses.replace(side_by_side(2, DEEP.num_hidden_layers, 2), zero=1)
    (mixed, weights, held_out), (_, others, _) = on_ranks(2, losses, layout, ["fp8", "fp32"], steps)
    plain, _, expected = losses(Communicator(), side_by_side(1, DEEP.num_hidden_layers, 2), ["fp32"], steps)
    assert torch.equal(weights, others)
    assert plain[-1] < plain[0] - 0.3
    assert mixed == pytest.approx(plain, rel=0.05)
    assert held_out == pytest.approx(expected, rel=0.05)


def test_validation_reads_the_weights_as_bf16_does() -> None:
    alone = side_by_side(1, DEEP.num_hidden_layers, 2)
    found = [losses(Communicator(), alone, [name], 0)[2] for name in ("fp8", "bf16")]  # type: ignore[list-item]
    assert found[0] == found[1]


def test_fp8_is_said_aloud_where_it_is_emulated(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert number_formats("fp8", Communicator(), *unmeasured(tmp_path)) == ["fp8"]
    assert "rank 0 computes in fp8, which CPUs do through fp32" in " ".join(capsys.readouterr().err.split())


def unmeasured(folder: Any) -> tuple[RunFolder, Any]:
    return RunFolder(folder, None), lambda: pytest.fail("nothing is to be measured")


@pytest.mark.parametrize("fault", ["an older chip", "no Triton", "another result", "no compiler", "none"])
def test_a_gpu_trains_in_fp8_only_if_it_can_and_comes_to_what_the_emulation_says(
    fault: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(number_formats_module, "device_name", lambda device: "chip")
    monkeypatch.setattr(number_formats_module, "kind_of_chip", lambda device: "a chip of 2020")

    def wrong(device: torch.device) -> str | None:
        if fault == "no compiler":
            raise RuntimeError("no C compiler\nhere")
        return "outputs are 0.3 away" if fault == "another result" else None

    formats = ["fp32", "bf16"] if fault == "an older chip" else ["fp32", "bf16", "fp8"]
    monkeypatch.setattr(precision, "formats_of", lambda device: formats)
    monkeypatch.setattr(fp8, "find_spec", lambda name: None if fault == "no Triton" else name)
    monkeypatch.setattr(fp8, "wrong", wrong)
    comm = dataclasses.replace(Communicator(), device=torch.device("cuda"))
    said = {
        "an older chip": "it does not multiply in fp8 .*",
        "no Triton": "our kernels need Triton, which is not installed",
        "another result": "products differ from their emulation.*: outputs are 0.3 away",
        "no compiler": "products cannot be computed: RuntimeError: no C compiler",
    }
    if fault == "none":
        assert number_formats("fp8", comm, *unmeasured(tmp_path)) == ["fp8"]
        return
    with pytest.raises(
        InputError, match=rf"rank 0 \(chip\) cannot train in fp8: {said[fault]}; choose --precision bf16"
    ):
        number_formats("fp8", comm, *unmeasured(tmp_path))
