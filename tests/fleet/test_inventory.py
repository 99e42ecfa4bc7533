"""The fleet file: what is right is read in SI units, what is wrong is named with its line."""

from dataclasses import replace
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


PRETENDED = GOOD.replace(
    "    nodes: 1\n",
    """\
    nodes: 1
    emulated:
      speed: 0.25
      memory: 2 GB
      precision: fp16
      link: {bandwidth: 100 Mb/s, latency: 50 ms}
      fails_after: [8 steps, 2 min]
""",
)


def test_pretended_chips_are_read_and_go_before_what_was_measured():
    _, weak = parse_fleet(PRETENDED, "fleet.yaml").pools
    assert weak.emulated is not None
    assert weak.emulated.fails_after == ((8, "steps"), (120, "s"))
    assert (weak.memory_known, weak.network_known) == (2e9, 8 * 12.5e6)
    assert weak.flops("fp16") == 0.25 * weak.sheet.flops["fp16"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("speed: 0.25", "speed: 2", r"line 13: pools\[1\].emulated.speed is 2: .*less than or equal to 1"),
        ("speed: 0.25", "speed: 0", r"line 13: pools\[1\].emulated.speed is 0: .*greater than 0"),
        ("speed: 0.25", "sped: 0.25", r"line 13: there is no field .*sped; known here: speed, memory, precision"),
        ("memory: 2 GB", "memory: 2", r"line 14: .*write a number and its unit, such as \"80 GiB\""),
        ("precision: fp16", "precision: fp4", r"line 15: .*precision is 'fp4': .*'bf16', 'fp16', 'fp8' or 'fp32'"),
        ("bandwidth: 100 Mb/s", "bandwidth: 100 ms", r"line 16: .*'ms' is not one of"),
        ("latency: 50 ms", "delay: 50 ms", r"line 16: there is no field .*delay; known here: bandwidth, latency"),
        ("8 steps, 2 min", "8, 2 min", r"line 17: .*is 8: write a number and its unit, such as \"8 steps\""),
        ("8 steps, 2 min", "1.5 steps", r"line 17: .*1.5 steps are no whole number of steps"),
        ("8 steps, 2 min", ", ".join(["8 steps"] * 9), r"line 17: fails_after has 9 times, the pool has 8 chips"),
    ],
)
def test_what_is_wrong_with_a_pretended_chip_is_one_sentence_with_the_line(old: str, new: str, said: str):
    assert old in PRETENDED
    with pytest.raises(InputError, match=said) as refused:
        parse_fleet(PRETENDED.replace(old, new, 1), "fleet.yaml")
    assert "\n" not in str(refused.value)


def test_sites_without_a_link_between_them_are_named():
    text = GOOD[: GOOD.index("links:")]
    with pytest.raises(InputError, match="no link between the sites 'attic' and 'cellar'"):
        parse_fleet(text, "fleet.yaml")


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ("memory: 8000 GB", r"line 14: measured memory is 7.28 TiB, A100-80GB-SXM has 80.0 GiB; check the unit"),
        ("memory: 96 GB", r"memory is 89.4 GiB, A100-80GB-SXM has 80.0 GiB"),
        ("memory_bandwidth: 16 TB/s", r"line 14: measured memory bandwidth is 16 TB/s, A100-80GB-SXM has 2.039 TB/s"),
        (
            "matmul: {bf16: [[1, 8, 8, 8, 9.5], [1, 64, 64, 64, 290000000]]}",
            r"line 14: measured a rate in bf16 is 290,000,000 GFLOP/s, A100-80GB-SXM computes at 312,000 GFLOP/s",
        ),
    ],
)
def test_what_no_such_chip_can_do_is_refused_with_both_values(measured: str, said: str):
    text = GOOD.replace("chip: V100", "chip: A100").replace("memory: 30 GiB", measured)
    with pytest.raises(InputError, match=said):
        parse_fleet(text, "fleet.yaml")


def test_what_is_a_little_more_than_the_sheet_is_believed():
    text = GOOD.replace("memory: 30 GiB", "memory: 34 GiB\n      memory_bandwidth: 990 GB/s")
    assert parse_fleet(text, "fleet.yaml").pools[1].measured.memory == 34 * 2**30


def test_a_probe_of_a_cpu_may_be_many_times_the_sheets_one_core():
    fleet = parse_fleet(fleet_text([replace(machine("AMD EPYC 9654", "cpu", None), matmul_rates=FAST)]), "probed")
    assert fleet.pools[0].flops("bf16") == 5e14


@pytest.mark.parametrize("nodes", ["99999999999", "130000"])
def test_more_chips_than_anyone_has_are_too_many(nodes: str):
    with pytest.raises(InputError, match=r"line 5: [\d,]+ chips are too many; there may be 1,000,000 in all"):
        parse_fleet(GOOD.replace("nodes: 2", f"nodes: {nodes}").replace("chips_per_node: 4", "chips_per_node: 8"), "f")


@pytest.mark.parametrize(
    ("fp16", "bf16", "trains_in"), [(290_000, 280_000, "bf16"), (110_000, 20_000, "fp16"), (1, 2, "bf16")]
)
def test_fp16_must_be_clearly_faster_than_bf16_and_fp8_is_never_assumed(fp16: int, bf16: int, trains_in: str):
    matmul = "".join(
        f", {name}: [[1, 64, 64, 64, {rate}]]" for name, rate in (("fp16", fp16), ("bf16", bf16), ("fp8", 500_000))
    )
    text = GOOD.replace("chip: V100", "chip: H100").replace("memory: 30 GiB", f"matmul: {{{matmul[2:]}}}")
    assert parse_fleet(text, "fleet.yaml").pools[1].best_precision == trains_in


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


FAST = (MatmulRate("bf16", 64, 64, 64, 500_000.0),)


def test_a_probed_chip_is_never_one_that_could_not_have_done_it():
    """Whatever the device calls itself: the file that a probe writes can be read."""
    unknown = replace(machine("NVIDIA H100 of another make", "cuda", 93 * 2**30), device_free_bytes=92 * 2**30)
    pool = parse_fleet(fleet_text([unknown]), "probed").pools[0]
    assert pool.sheet.memory_bytes >= 92 * 2**30 / 1.1
    assert pool.measured.memory == 92 * 2**30
    assert nearest_chip(replace(machine("Tesla T4", "cuda", 15 * 2**30), matmul_rates=FAST)).flops["bf16"] > 3e14


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
