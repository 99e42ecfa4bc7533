"""Benchmarks are scripts that import each other by name; here they are imported too."""

import sys
from pathlib import Path

import pytest

from motley.data.pack import DataConfig, prepare
from motley.model import ModelConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

VOCAB_SIZE = 320


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little English, as `motley.data.pack` prepares it, of VOCAB_SIZE tokens."""
    folder = tmp_path_factory.mktemp("text")
    lines = Path(__file__).parents[2].joinpath("docs", "decisions.md").read_text(encoding="utf-8").split("\n\n")
    for number in range(8):
        (folder / f"{number}.txt").write_text("\n\n".join(lines[number::8])[:12_000], encoding="utf-8")
    data = tuple(str(file) for file in sorted(folder.glob("*.txt")))
    return prepare(DataConfig(data=data, vocab_size=VOCAB_SIZE), folder / "prepared").folder


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    """A network of ours with experts, in milliseconds a step."""
    from thrift import ours

    return ours(32, 2, 2, 16, 64, 16, vocab_size=VOCAB_SIZE, num_nextn_predict_layers=0)
