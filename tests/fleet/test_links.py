"""Under torchrun every rank measures itself and the links; rank 0 writes one file for all."""

import subprocess
import sys
from pathlib import Path

import pytest

from motley.fleet import load_fleet
from motley.fleet.links import _worth_measuring


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
    assert "all_reduce" in out.read_text()


def test_pairs_are_measured_inside_the_first_host_and_once_to_every_other():
    assert _worth_measuring(["a", "a", "b", "b", "c"]) == [1, 2, 4]
