"""The fleet file: what is right is read in SI units, what is wrong is named with its line."""

from pathlib import Path

import pytest

from motley.errors import InputError
from motley.fleet import Machine, MatmulRate, load_fleet, parse_fleet
from motley.fleet.command import ProbeConfig, ShowConfig, fleet_probe, fleet_show, probe_summary, show_summary
from motley.fleet.picture import fleet_page
from motley.fleet.units import RATES, SIZES, parse
from motley.fleet.write import fleet_text, nearest_chip

GOOD = """\
name: lab
pools:
  - name: strong
    chip: A100
    nodes: 2
    chips_per_node: 4
    link_outside: 100 Gb/s
    price_per_hour: 1.5
  - name: weak
    chip: V100
    nodes: 1
    site: attic
    measured:
      memory: 30 GiB
sites:
  - name: cellar
  - name: attic
links:
  - sites: [cellar, attic]
    bandwidth: 1 Gb/s
    latency: 2 ms
"""


def test_a_good_file_is_read_in_bytes_and_seconds():
    fleet = parse_fleet(GOOD, "fleet.yaml")
    strong, weak = fleet.pools
    assert (strong.chips, weak.chips, fleet.chips) == (8, 8, 16)
    assert strong.link_outside == 12.5e9
    assert weak.measured.memory == 30 * 2**30
    assert fleet.site_of(strong) == "cellar"
    assert fleet.link_between("attic", "cellar").bandwidth == 1.25e8
    assert weak.best_precision == "fp16"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("chip: V100", "chip: V1000", r"line 10: there is no chip 'V1000'.*nearest: V100"),
        ("nodes: 2", "nodes: 0", r"line 5: pools\[0\].nodes is 0"),
        ("nodes: 2", "nodes: -1", r"line 5: pools\[0\].nodes is -1"),
        ("nodes: 2", "nodes: two", r"line 5: pools\[0\].nodes is 'two'"),
        ("100 Gb/s", "100", r"line 7: .*write a number and its unit"),
        ("100 Gb/s", "100 gb/s", r"line 7: .*did you mean Gb/s or GB/s\? b are bits, B are bytes"),
        ("100 Gb/s", "0 Gb/s", r"line 7: .*must be above 0"),
        ("30 GiB", "30 Gb", r"line 14: .*did you mean GB"),
        ("price_per_hour: 1.5", "price_per_hour: -1", r"line 8: .*price_per_hour is -1"),
        ("price_per_hour: 1.5", "price_per_hour: .inf", r"line 8: .*finite"),
        (
            "price_per_hour: 1.5",
            "prize_per_hour: 1",
            r"line 8: there is no field pools\[0\].prize_per_hour; known here: .*price_per_hour",
        ),
        ("name: weak", "name: strong", r"line 9: there are two pools called 'strong'"),
        ("site: attic", "site: roof", r"line 12: there is no site 'roof'; sites: cellar, attic"),
        ("  - sites: [cellar, attic]", "  - sites: [cellar, cellar]", r"line 19: a link joins two different sites"),
        ("nodes: 1", "nodes: 1\n    precision: bf16", r"line 12: V100-32GB-SXM has no bf16; it has fp16, fp32"),
        ("nodes: 1", "nodes: 1\n    nodes: 2", r"line 12: 'nodes' is given twice"),
        ("name: lab", "name: [lab", r"not valid YAML"),
        ("latency: 2 ms", "latency: 2", r"line 21: .*write a number and its unit"),
    ],
)
def test_what_is_wrong_is_one_sentence_with_the_line(old: str, new: str, said: str):
    assert old in GOOD
    with pytest.raises(InputError, match=said) as refused:
        parse_fleet(GOOD.replace(old, new, 1), "fleet.yaml")
    assert "\n" not in str(refused.value)


def test_sites_without_a_link_between_them_are_named():
    text = GOOD[: GOOD.index("links:")]
    with pytest.raises(InputError, match="no link between the sites 'attic' and 'cellar'"):
        parse_fleet(text, "fleet.yaml")


def test_bits_and_bytes_decimal_and_binary_are_told_apart():
    assert parse("8 Gb/s", RATES, "") == parse("1 GB/s", RATES, "") == 1e9
    assert parse("1 GiB", SIZES, "") == 2**30
    assert parse("1 GB", SIZES, "") == 1e9


def test_a_missing_file_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(InputError, match="motley fleet probe"):
        load_fleet(tmp_path / "fleet.yaml")


def test_the_page_names_every_pool_and_link():
    page = fleet_page(parse_fleet(GOOD, "fleet.yaml"))
    for text in ("strong", "weak", "cellar", "attic", "125 MB/s"):
        assert text in page
    assert "<script" not in page


def machine(name: str, device: str, memory: int | None) -> Machine:
    rates = (MatmulRate("bf16", 64, 64, 64, 100.0), MatmulRate("bf16", 64, 64, 64, 90.0, groups=8))
    return Machine(device, name, 8, 8, 2**35, 2**34, memory, rates, 50.0, "bf16")


def test_a_probe_writes_a_file_that_is_read_back(tmp_path: Path):
    fleet = parse_fleet(fleet_text([machine("AMD EPYC 9654", "cpu", None)]), "probed")
    pool = fleet.pools[0]
    assert pool.measured.memory == 2**34
    assert pool.measured.matmul["bf16"] == ((1, 64, 64, 64, 100.0), (8, 64, 64, 64, 90.0))
    assert pool.flops("bf16") == 1e11
    assert pool.best_precision == "bf16"


@pytest.mark.parametrize(
    ("name", "gib", "chip"),
    [
        ("NVIDIA A100-SXM4-80GB", 79, "A100-80GB-SXM"),
        ("NVIDIA A100-SXM4-40GB", 39, "A100-40GB-SXM"),
        ("NVIDIA H100 80GB HBM3", 79, "H100-80GB-SXM"),
        ("NVIDIA GeForce RTX 3090", 23, "RTX-3090"),
        ("Tesla V100-SXM2-32GB", 31, "V100-32GB-SXM"),
        ("NVIDIA H200", 140, "H200-141GB-SXM"),
        ("Tesla T4", 15, "T4-16GB"),
    ],
)
def test_a_device_is_recognised_by_its_name_and_memory(name: str, gib: int, chip: str):
    assert nearest_chip(machine(name, "cuda", gib * 2**30)).name == chip


def test_probe_and_show_commands_keep_what_is_there(tmp_path: Path):
    out = tmp_path / "fleet.yaml"
    result = fleet_probe(ProbeConfig(out=out, seconds=0.05))
    assert result is not None
    assert str(out) in probe_summary(result)
    shown = fleet_show(ShowConfig(fleet=out))
    assert Path(shown["page"]).read_text().startswith("<!doctype html>")
    assert "part of the peak" in show_summary(shown)
    before = out.read_text()
    with pytest.raises(InputError, match="--overwrite"):
        fleet_probe(ProbeConfig(out=out, seconds=0.05))
    assert out.read_text() == before


@pytest.mark.parametrize("seconds", [0.0, -1.0, 51.0, float("nan")])
def test_a_probe_takes_at_most_a_minute(seconds: float):
    with pytest.raises(InputError, match="--seconds"):
        ProbeConfig(seconds=seconds)
