"""The chip sheet: enough chips, every figure with its source, no trap of the data sheets."""

import pytest

from motley.errors import InputError
from motley.fleet.chips import chip_sheet, chip_sources, find_chip


def test_there_are_at_least_thirty_chips_and_all_families_asked_for():
    assert len(chip_sheet()) >= 30
    for name in (
        "A100",
        "A800",
        "H100",
        "H800",
        "H20",
        "H200",
        "B200",
        "L4",
        "L20",
        "L40S",
        "A10",
        "A30",
        "A40",
        "V100",
        "T4",
        "RTX-2080-Ti",
        "RTX-3090",
        "RTX-4090",
        "RTX-5090",
        "MI250",
        "MI300",
        "MI308",
        "910B",
        "910C",
    ):
        assert find_chip(name).memory_bytes > 0
    assert any(chip.kind == "cpu" for chip in chip_sheet().values())


def test_every_cell_has_a_known_source():
    for chip in chip_sheet().values():
        for name, (text, source) in chip.cells.items():
            assert source in chip_sources(), (chip.name, name)
            assert text == "none" or float(text) > 0, (chip.name, name)


@pytest.mark.parametrize("name", ["V100", "T4", "RTX-2080-Ti", "Titan-RTX"])
def test_chips_before_ampere_train_in_fp16(name: str):
    chip = find_chip(name)
    assert "bf16" not in chip.flops
    assert "fp8" not in chip.flops
    assert chip.best_precision() == "fp16"


@pytest.mark.parametrize("name", ["A100", "A800", "910B", "V100"])
def test_fp8_needs_a_later_chip(name: str):
    assert "fp8" not in find_chip(name).flops


def test_consumer_chips_are_listed_with_fp32_accumulation():
    assert find_chip("3090").flops["bf16"] == 71e12
    assert find_chip("4090").flops["bf16"] == 165e12
    assert not find_chip("4090").peer_to_peer


def test_links_are_per_direction():
    assert find_chip("A100").link_bandwidth == 300e9  # sold as 600 GB/s
    assert find_chip("H100").link_bandwidth == 450e9  # sold as 900 GB/s


def test_names_are_found_in_any_spelling_and_near_ones_are_offered():
    assert find_chip("nvidia a100_80gb") is find_chip("A100-80GB-SXM")
    with pytest.raises(InputError, match=r"no chip 'H1000'.*nearest: .*H100"):
        find_chip("H1000")


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("a100-sxm4-80gb", "A100-80GB-SXM"), ("NVIDIA A100-SXM4-80GB", "A100-80GB-SXM"), ("A100 SXM4", "A100-80GB-SXM"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB-SXM"), ("A100 40 GB", "A100-40GB-SXM"), ("H800 SXM", "H800-80GB-SXM"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB-SXM"), ("NVIDIA H100 PCIe", "H100-80GB-PCIe"),
        ("V100-SXM2-32GB", "V100-32GB-SXM"), ("Tesla V100-SXM2-16GB", "V100-16GB-SXM"), ("V100-SXM2", "V100-32GB-SXM"),
        ("NVIDIA GeForce RTX 2080 Ti", "RTX-2080-Ti"), ("AMD Instinct MI300X OAM", "MI300X"),
        ("B200 192GB", "B200-180GB-SXM"),
    ],
)  # fmt: skip
def test_a_chip_is_found_as_drivers_and_people_write_it(said: str, meant: str):
    assert find_chip(said).name == meant


@pytest.mark.parametrize(
    "name", ["A1000", "RTX 6000", "H100 NVL", "A100 PCIe 40GB", "rtx", "80GB", "sxm", "nvidia", ""]
)
def test_a_chip_that_is_only_like_one_of_the_sheet_is_not_taken_for_it(name: str):
    with pytest.raises(InputError, match=r"there is no chip .* nearest: "):
        find_chip(name)
