"""`plan describe`: the published figures come out of the configurations alone."""

import pytest

from motley.errors import InputError
from motley.model import SIZES
from motley.plan.command import DescribeConfig, describe
from motley.plan.network.describe import describe_model
from motley.plan.network.registry import find_network
from motley.plan.network.spec import deepseek


@pytest.mark.parametrize(
    ("name", "billions", "gigaflops"),
    [("v3", 671.03, 250), ("v2", 235.74, 155), ("v2-lite", 15.71, None)],  # V3 report; arXiv 2505.09343, table 2
)
def test_published_parameters_and_flops(name: str, billions: float, gigaflops: float | None):
    told = describe_model(find_network(name), 4096)
    assert round(told["parameters"] / 1e9, 2) == billions
    if gigaflops:
        assert told["training_flops_per_token"] / 1e9 == pytest.approx(gigaflops, rel=0.01)


def test_cache_and_mtp_module_of_v3():
    told = describe_model(find_network("v3"), 4096)
    assert told["kv_cache_bytes_per_token"] == 70272  # arXiv 2505.09343, table 1
    assert told["mtp_parameters"] / 1e9 == pytest.approx(11.5, rel=0.01)  # README_WEIGHTS of DeepSeek-V3
    assert told["active_parameters"] / 1e9 == pytest.approx(37.55, abs=0.01)


def test_the_rows_of_the_bill_add_up():
    told = describe_model(find_network("moonlight"), 4096)
    main = [part for part in told["parts"] if not part["name"].startswith("MTP")]
    assert sum(part["parameters"] for part in main) == told["parameters"]
    assert sum(part["active"] for part in main) == told["active_parameters"]
    assert 3 * sum(part["forward_flops"] for part in main) == told["training_flops_per_token"]
    assert told["memory"]["training_state_bytes"] == sum(told["memory"]["training_state_parts"].values())
    assert told["sources"]


def test_a_sizes_name_and_its_configuration_are_the_same_model():
    assert (
        describe_model(find_network("nano"), 512)["parameters"]
        == describe_model(deepseek(SIZES["nano"]), 512)["parameters"]
    )


def test_a_sequence_is_as_long_as_the_model_can_see():
    assert describe(DescribeConfig("gpt2"))["context_length"] == 1024
    assert describe(DescribeConfig("v3"))["context_length"] == 4096
    assert describe(DescribeConfig("v3", seq_len=100_000))["context_length"] == 100_000
    with pytest.raises(InputError, match="--seq-len 2048 is longer than the context of gpt2-small, 1024"):
        describe(DescribeConfig("gpt2", seq_len=2048))
