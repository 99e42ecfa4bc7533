"""The probe measures what is there, and says it in words."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from motley.errors import InputError
from motley.fleet import Machine, MatmulRate, best_device, describe, parse_fleet, probe
from motley.fleet.probe import choose_dtype, cpu_quota, fp8_product, host_memory, usable_cores
from motley.fleet.show import machine_table
from motley.fleet.write import fleet_text


@pytest.fixture(scope="module")
def machine() -> Machine:
    return probe(seconds=0.1)


def own_group(tmp_path: Path, controller: str = "") -> Path:
    """The folder under a made-up mount of control groups that stands for this very process."""
    own = "/"
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = path
    folder = tmp_path / controller / own.lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def rates(**gflops: float) -> tuple[MatmulRate, ...]:
    """`fp32_100=…`: rate in fp32 of a product with side 100."""
    return tuple(
        MatmulRate(dtype, int(side), int(side), int(side), value)
        for name, value in gflops.items()
        for dtype, side in [name.split("_")]
    )


def test_everything_measured_is_a_positive_number(machine: Machine):
    assert machine.matmul_rates
    assert all(rate.gflops > 0 for rate in machine.matmul_rates)
    assert machine.bandwidth_gigabytes_per_second > 0
    assert machine.memory_bytes >= machine.available_memory_bytes > 0
    assert 1 <= machine.threads <= machine.cores
    assert machine.device == best_device().type
    assert machine.name


def test_every_format_that_was_not_left_out_is_measured_where_fp32_is(machine: Machine):
    shapes = {}
    for rate in machine.matmul_rates:
        shapes.setdefault(rate.dtype, set()).add((rate.rows, rate.inner, rate.columns))
    assert "fp32" in shapes
    assert not set(shapes) & {name for name, _ in machine.left_out}
    assert all(measured <= shapes["fp32"] for measured in shapes.values())


def test_what_is_measured_is_said_before_also_where_nobody_watches(capsys: pytest.CaptureFixture[str]):
    probe(seconds=0.05, device=torch.device("cpu"))
    said = capsys.readouterr().err
    assert "multiplies matrices in fp32, and tries bf16, copies memory; about 0.05 s, at most 0.1 s" in said
    probe(seconds=0.05, device=torch.device("cpu"), shown=False)
    assert capsys.readouterr().err == ""


def test_what_is_left_out_is_said_and_kept(machine: Machine):
    without = replace(machine, left_out=(("bf16", 410.0), ("fp16", None)))
    assert Machine.from_dict(json.loads(json.dumps(without.to_dict()))) == without
    reason = "bf16 is emulated here (at least 410 times slower than fp32) and left out"
    assert reason in describe(without)
    assert f"# {reason}" in fleet_text([without])
    (pool,) = parse_fleet(fleet_text([replace(without, matmul_rates=rates(fp32_64=1))]), "kept").pools
    assert pool.precisions == ("fp32",)


def test_a_machine_survives_json(machine: Machine):
    assert Machine.from_dict(json.loads(json.dumps(machine.to_dict()))) == machine


def test_a_machine_from_before_free_memory_was_kept_is_read(machine: Machine):
    value = machine.to_dict()
    del value["device_free_bytes"], value["left_out"]
    assert Machine.from_dict(value).device_free_bytes is None
    assert Machine.from_dict(value).left_out == ()


def test_products_in_fp8_are_those_of_the_rounded_matrices():
    """The CPU multiplies in fp8 too, only slowly: enough to see that the call and its layout are right."""
    cpu = torch.device("cpu")
    torch.manual_seed(1)
    results = fp8_product(cpu, groups=3, rows=32, inner=64, columns=48)()
    torch.manual_seed(1)
    left = torch.randn(3, 32, 64).to(torch.float8_e4m3fn).float()
    right = torch.randn(3, 48, 64).to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(torch.stack(results).float(), left @ right.mT, rtol=0.01, atol=0.02)


def test_a_file_that_is_no_machine_is_refused(machine: Machine):
    value = machine.to_dict()
    del value["cores"]
    with pytest.raises(InputError, match="cores"):
        Machine.from_dict(value)


def test_the_probe_leaves_pytorch_as_it_was():
    before = torch.get_num_threads()
    probe(seconds=0.01)
    assert torch.get_num_threads() == before


def test_bf16_is_chosen_only_where_it_is_clearly_faster_in_every_shape():
    assert choose_dtype(rates(fp32_100=100, bf16_100=131)) == "bf16"
    assert choose_dtype(rates(fp32_100=100, bf16_100=129)) == "fp32"
    assert choose_dtype(rates(fp32_100=100, bf16_100=400, fp32_9=100, bf16_9=90)) == "fp32"
    assert choose_dtype(rates(fp32_100=100)) == "fp32"


def test_the_sentence_names_the_chip_its_speed_and_the_choice(machine: Machine):
    sentence = describe(machine)
    assert sentence.startswith(machine.name)
    assert sentence.endswith(f"it computes in {machine.compute_dtype}.")
    assert "LOP/s in fp32" in sentence


def test_the_table_shows_every_measurement(machine: Machine):
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(machine_table(machine))
    text = console.export_text()
    assert text.count("product, ") == len(machine.matmul_rates)
    assert machine.compute_dtype in text


def test_the_peak_is_the_fastest_shape():
    machine = Machine("cpu", "chip", 2, 2, 8, 4, None, rates(fp32_9=10, fp32_99=20, bf16_9=30), 1.0, "bf16")
    assert machine.peak_gflops("fp32") == 20
    assert machine.peak_gflops() == 30
    with pytest.raises(InputError, match="fp16"):
        machine.peak_gflops("fp16")


def test_without_a_quota_the_affinity_counts(tmp_path: Path):
    assert cpu_quota(tmp_path) == math.inf
    assert 1 <= usable_cores(tmp_path) <= (os.cpu_count() or 1)


@pytest.mark.skipif(not Path("/proc/self/cgroup").exists(), reason="control groups are Linux's")
class TestContainers:
    def test_a_quota_of_version_2_is_counted(self, tmp_path: Path):
        (own_group(tmp_path) / "cpu.max").write_text("150000 100000\n")
        assert cpu_quota(tmp_path) == 1.5
        assert usable_cores(tmp_path) == 1

    def test_a_quota_around_the_own_group_is_counted(self, tmp_path: Path):
        (own_group(tmp_path) / "cpu.max").write_text("max 100000\n")
        if own_group(tmp_path) != tmp_path:
            (tmp_path / "cpu.max").write_text("50000 100000\n")
            assert cpu_quota(tmp_path) == 0.5
            assert usable_cores(tmp_path) == 1
        else:
            assert cpu_quota(tmp_path) == math.inf

    def test_a_quota_of_version_1_is_counted(self, tmp_path: Path):
        group = own_group(tmp_path, "cpu")
        (group / "cpu.cfs_period_us").write_text("100000\n")
        (group / "cpu.cfs_quota_us").write_text("-1\n")
        assert cpu_quota(tmp_path) == math.inf
        (group / "cpu.cfs_quota_us").write_text("250000\n")
        assert cpu_quota(tmp_path) == 2.5

    def test_a_memory_limit_is_counted_and_cached_files_are_free_memory(self, tmp_path: Path):
        group = own_group(tmp_path)
        (group / "memory.max").write_text(f"{2**20}\n")
        (group / "memory.current").write_text(f"{2**19}\n")
        (group / "memory.stat").write_text(f"anon 7\ninactive_file {2**18}\n")
        assert host_memory(tmp_path) == (2**20, 2**20 - 2**19 + 2**18)

    def test_a_memory_limit_of_max_is_none(self, tmp_path: Path):
        unlimited = host_memory(tmp_path)[0]
        (own_group(tmp_path) / "memory.max").write_text("max\n")
        (own_group(tmp_path) / "memory.current").write_text("123\n")
        assert host_memory(tmp_path)[0] == unlimited
