"""Under torchrun every rank measures itself and the links; rank 0 writes one file for all."""

import subprocess
import sys
from pathlib import Path

import pytest

from motley.fleet import load_fleet
from motley.fleet.links import COLLECTIVES, MOST_HOSTS, pair_rounds


@pytest.mark.slow(20)
def test_two_ranks_write_one_fleet(tmp_path: Path):
    out = tmp_path / "fleet.yaml"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "-m",
        "motley",
        "fleet",
        "probe",
        "--seconds",
        "0.05",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Written to") == 1
    fleet = load_fleet(out)
    assert fleet.chips == 2
    assert fleet.pools[0].link_inside is not None
    for collective in COLLECTIVES:
        assert collective in out.read_text()


def test_pairs_are_measured_inside_every_host_at_once_and_then_to_every_other_host():
    assert pair_rounds(["a", "a", "b", "b", "c", "b"]) == [[(0, 1), (2, 3)], [(2, 5)], [(0, 2)], [(0, 4)]]
    assert pair_rounds(["a"]) == []


def test_a_rank_is_in_one_pair_of_a_round_and_large_jobs_stay_short():
    rounds = pair_rounds([f"host {rank // 8}" for rank in range(8 * 500)])
    assert len(rounds) == 7 + MOST_HOSTS
    for together in rounds:
        ranks = [rank for pair in together for rank in pair]
        assert len(ranks) == len(set(ranks))
