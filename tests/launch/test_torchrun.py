"""`motley launch`: whatever the plan, torchrun gives each process the rank and the chip that the plan gave it."""

import json
import os
import random
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import command, losses
from plans import LAYERS, SHAPE, plan_of
from spawned_ranks import MOTLEY, Started, free_port, run, run_ranks, start

from motley.cli import main
from motley.errors import InputError
from motley.launch.torchrun import LaunchConfig, Slot, hosts_of, launch, nodes_of, slots_of, torchrun_words
from motley.parallel.layout import coordinates_of, from_plan


def random_plan(chance: random.Random) -> dict[str, Any]:
    """Up to three teams of up to three pools, in pipelines that visit the team's pools one after the other."""
    names = ["fast", "big one", "old"]
    teams = []
    for _ in range(chance.randint(1, 3)):
        members = chance.sample(names, chance.randint(1, 3))
        stage_pools = [pool for pool in members for _ in range(chance.randint(1, 3))]
        borders = sorted(chance.sample(range(1, LAYERS), len(stage_pools) - 1))
        layers = [end - start for start, end in zip([0, *borders], [*borders, LAYERS], strict=True)]
        teams.append((stage_pools, chance.randint(1, 4), layers))
    plan = plan_of(dict.fromkeys(names, (1, 1)), teams)
    for pool in plan["pools"]:
        pool["chips_per_node"] = chance.choice([1, 2, 4, 8])
        pool["nodes"] = -(-pool["chips"] // pool["chips_per_node"]) + chance.randint(0, 1)
    return plan


def as_torchrun_starts(commands: list[list[str]]) -> dict[int, list[str]]:
    """{rank: its chip}, numbered as torchrun documents it: equal nodes, rank = node rank x processes + local rank."""
    found: dict[int, list[str]] = {}
    for words in commands:
        options = dict(re.findall(r"--([\w-]+)=(\S+)", " ".join(words)))
        assert options["nnodes"] == str(len(commands))
        each = int(options["nproc-per-node"])
        visible = re.search(r"CUDA_VISIBLE_DEVICES=(\S+)", " ".join(words))
        chips = visible[1].split(",") if visible else [str(chip) for chip in range(each)]
        for local in range(each):
            found[int(options["node-rank"]) * each + local] = [chips[local]]
    return found


@pytest.mark.parametrize("seed", range(40))
def test_torchrun_numbers_the_ranks_as_the_runtime_reads_the_plan(seed: int):
    chance = random.Random(seed)
    plan = random_plan(chance)
    hosts = {
        pool["pool"]: [f"{pool['pool'][0]}{n}" for n in range(pool["nodes"])] for pool in plan["pools"] if pool["nodes"]
    }
    named = [f"{pool}={','.join(names)}" for pool, names in hosts.items()]
    slots = slots_of(plan, hosts_of(plan, named))
    nodes = nodes_of(slots)
    started = as_torchrun_starts(torchrun_words(nodes, LaunchConfig(Path("plan.json"))))
    layout = from_plan(plan, SHAPE)
    assert sorted(started) == list(range(layout.workers))
    host_of = {rank: node.host for node in nodes for rank in node.ranks}
    for rank, (chip,) in started.items():
        coordinates = coordinates_of(layout, rank)
        planned = plan["groups"][coordinates.group_number]["stages"][coordinates.stage]["pool"]
        assert host_of[rank] in hosts[planned]
        assert int(chip) < next(pool["chips_per_node"] for pool in plan["pools"] if pool["pool"] == planned)
    assert len({(host_of[rank], chip) for rank, (chip,) in started.items()}) == layout.workers  # one rank a chip


def test_equal_machines_get_one_torchrun_each_and_copies_of_a_stage_share_a_machine():
    whole = plan_of({"a": (2, 4)}, [(["a"], 8, [LAYERS])])
    nodes = nodes_of(slots_of(whole, {"a": ["n0", "n1"]}))
    assert [(node.host, list(node.ranks), node.chips) for node in nodes] == [
        ("n0", [0, 1, 2, 3], [0, 1, 2, 3]),
        ("n1", [4, 5, 6, 7], [0, 1, 2, 3]),
    ]
    piped = plan_of({"a": (2, 4)}, [(["a", "a"], 4, [5, 7])])
    slots = slots_of(piped, {"a": ["n0", "n1"]})
    assert [slot.host for slot in slots] == ["n0", "n1"] * 4  # ranks go copy by copy, chips stage by stage


def test_chips_that_the_plan_leaves_idle_are_idle_on_every_machine():
    plan = plan_of({"a": (2, 9)}, [(["a"], 16, [LAYERS])])
    slots = slots_of(plan, {"a": ["n0", "n1"]})
    assert [slot.host for slot in slots] == ["n0"] * 8 + ["n1"] * 8


def test_one_machine_that_serves_two_pools_gives_each_its_own_chips():
    plan = plan_of({"a": (1, 2), "b": (1, 2)}, [(["a", "b"], 2, [5, 7])])
    nodes = nodes_of(slots_of(plan, {"a": ["n"], "b": ["n"]}))
    assert [node.chips for node in nodes] == [[0, 2, 1, 3]]
    words = torchrun_words(nodes, LaunchConfig(Path("plan.json"), port=1234))
    assert words[0][:2] == ["env", "CUDA_VISIBLE_DEVICES=0,2,1,3"]
    assert {"--master-addr=n", "--master-port=1234", "--virtual-local-rank"} <= set(words[0])


def test_ranks_of_one_machine_that_need_a_torchrun_each_share_its_cores_and_keep_their_chips():
    plan = plan_of({"a": (1, 2), "b": (1, 2)}, [(["a", "b"], 2, [5, 7])])
    words = torchrun_words(nodes_of(slots_of(plan, {"a": ["n"], "b": ["m"]})), LaunchConfig(Path("plan.json")))
    assert [line[: line.index("torchrun")] for line in words] == [
        ["env", "OMP_NUM_THREADS=1"],
        ["env", "OMP_NUM_THREADS=1"],
        ["env", "CUDA_VISIBLE_DEVICES=1", "OMP_NUM_THREADS=1"],
        ["env", "CUDA_VISIBLE_DEVICES=1", "OMP_NUM_THREADS=1"],
    ]


def test_a_plan_of_one_machine_needs_no_hosts():
    plan = plan_of({"a": (1, 2)}, [(["a"], 2, [LAYERS])])
    assert slots_of(plan, hosts_of(plan, [])) == [Slot("localhost", "a", 0), Slot("localhost", "a", 1)]


TWO = plan_of({"a": (2, 2), "b": (1, 2), "idle": (1, 1)}, [(["a"], 4, [LAYERS]), (["b"], 2, [LAYERS])])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "no hosts for a and b; name them: --hosts a=HOST b=HOST"),
        (["--hosts", "a=x,y"], "no hosts for b; name them: --hosts b=HOST"),
        (["--hosts", "a=x", "b=z"], "--hosts has 1 for pool a, whose 4 ranks need 2"),
        (["--hosts", "a=x,y,w", "b=z"], "--hosts has 3 for pool a, the plan 2; leave some out"),
        (["--hosts", "c=x"], "--hosts names pool c, but the plan's pools are a, b, idle"),
        (["--hosts", "a=x", "a=y"], "--hosts names pool a twice; list all its hosts at once: a=HOST,HOST"),
        (["--hosts", "a"], "--hosts has 'a'; write POOL=HOST,HOST"),
        (["--hosts", "a=x,-oProxyCommand", "b=z"], "--hosts has 'a=x,-oProxyCommand'; write POOL=HOST,HOST"),
        (["--hosts", "a=localhost,y", "b=z"], "--hosts has localhost beside y, which cannot reach it;"),
        (["--hosts", "a=x,y", "b=z", "--here", "v"], "--here is v, which has no ranks in this plan"),
        (["--hosts", "a=x,y", "b=z", "--ssh", "--here", "x"], "--ssh runs all machines, --here only one"),
        (["--job", "serve"], "--job is 'serve'; it must begin with pretrain or sft"),
        (["--job", "pretrain 'x"], '--job is "pretrain \'x", which no shell can read'),
        (["--job", "pretrain --plan other.json"], "--job has --plan, which launch adds itself"),
        (["--port", "0"], "--port is 0; it must be from 1 to 65535"),
    ],
)
def test_what_does_not_fit_the_plan_is_one_sentence(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(TWO))
    assert main(["launch", str(file), *options]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"motley launch: {said}")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_a_plan_this_runtime_cannot_run_or_no_plan_at_all_is_refused(tmp_path: Path):
    split = json.loads(json.dumps(TWO))
    split["pools"][0]["chips"] = 8  # as with tensor parallelism 2
    with pytest.raises(InputError, match="make the plan with --framework motley"):
        slots_of(split, {"a": ["x", "y"], "b": ["z"]})
    del split["pools"][0]["nodes"]
    for wrong in ([], {"groups": []}, split):
        (tmp_path / "other.json").write_text(json.dumps(wrong))
        with pytest.raises(InputError, match="is no plan as `motley plan --out` writes it"):
            launch(LaunchConfig(tmp_path / "other.json"))


def test_the_printed_commands_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "my plan.json"
    file.write_text(json.dumps(TWO))
    asked = ["launch", str(file), "--hosts", "a=x,y", "b=z", "--job", "sft --model 'my run'"]
    assert main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == ["# x: a, rank 0 1", "# y: a, rank 2 3", "# z: b, rank 4 5"]
    words = shlex.split(lines[3])
    assert words[:4] == ["torchrun", "--nnodes=3", "--node-rank=1", "--nproc-per-node=2"]
    assert words[-6:] == ["-m", "motley", "sft", "--model", "my run", f"--plan={file}"]
    assert main([*asked, "--json"]) == 0
    commands = json.loads(capsys.readouterr().out)["commands"]
    assert [entry["command"] for entry in commands] == lines[1::2]


@pytest.fixture
def ssh(tmp_path: Path) -> dict[str, str]:
    """The environment in which `ssh` runs its command here, in a shell as a server would, and notes the host."""
    folder = tmp_path / "bin"
    folder.mkdir()
    fake = folder / "ssh"
    fake.write_text(
        f'#!/bin/sh\nwhile [ $# -gt 2 ]; do shift; done\necho "$1" >> {tmp_path}/hosts\ncd /; exec sh -c "$2"\n'
    )
    fake.chmod(0o755)
    one_thread = {"OMP_NUM_THREADS": "1"}  # several hosts pretend to have these cores
    return one_thread | {"PATH": f"{folder}:{os.environ['PATH']}"}


SMALL = plan_of({"strong": (1, 1), "weak": (1, 1)}, [(["strong", "weak"], 1, [1, 1])])
SHORT: dict[str, Any] = {"precision": "fp32", "steps": 8, "valid_every": 4}
ON_TWO = ["--hosts", "strong=127.0.0.2", "weak=127.0.0.3", "--ssh"]  # two names of this machine


@pytest.mark.slow(18)
def test_ranks_started_over_ssh_learn_what_those_started_together_learn(
    data: Path, shape: Path, tmp_path: Path, ssh: dict[str, str]
):
    (tmp_path / "plan.json").write_text(json.dumps(SMALL))
    torchrun = Path(sys.executable).with_name("torchrun")
    together = command(tmp_path / "together", data, shape, **SHORT, plan=tmp_path / "plan.json")
    done = run_ranks(2, together)
    assert done.returncode == 0, done.stderr
    job = shlex.join(command(tmp_path / "apart", data, shape, **SHORT)[3:])
    asked = ["launch", "plan.json", *ON_TWO, f"--job={job}", f"--torchrun={torchrun}", f"--port={free_port()}"]
    done = run([*MOTLEY, *asked], cwd=tmp_path, environment=ssh)
    assert done.returncode == 0, done.stderr
    assert sorted((tmp_path / "hosts").read_text().split()) == ["127.0.0.2", "127.0.0.3"]
    assert done.stdout == "2 of 2 ranks ran to the end\n"
    assert re.search(r"^127\.0\.0\.2: .*: 8 steps", done.stderr, re.MULTILINE)  # rank 0's summary
    assert len(losses(tmp_path / "together")) > 8
    assert losses(tmp_path / "apart") == pytest.approx(losses(tmp_path / "together"), rel=1e-5)


WORKER = """#!/bin/sh
# Stands for torchrun: node 0 works until it is told to end, node 1 does what the test wants.
case "$2" in
  --node-rank=0) trap 'touch ended; echo told to end; exit 1' TERM; touch begun; while :; do sleep 0.05; done ;;
  *) until [ -e begun ]; do sleep 0.05; done; {second} ;;
esac
"""


def started(tmp_path: Path, ssh: dict[str, str], second: str) -> Started:
    (tmp_path / "plan.json").write_text(json.dumps(SMALL))
    (tmp_path / "torchrun").write_text(WORKER.replace("{second}", second))
    (tmp_path / "torchrun").chmod(0o755)
    asked = [*MOTLEY, "launch", "plan.json", *ON_TWO, "--torchrun=./torchrun"]
    return start(asked, cwd=tmp_path, environment=ssh)


def test_when_one_fails_all_are_ended_and_it_is_named(tmp_path: Path, ssh: dict[str, str]):
    process = started(tmp_path, ssh, "echo out of memory; exit 3")
    _, said = process.communicate(timeout=30)
    assert process.returncode == 2
    lines = said.splitlines()
    assert lines[:2] == ["127.0.0.3: out of memory", "127.0.0.2: told to end"]
    assert lines[2].startswith("motley launch: 127.0.0.3 (rank 1) exited with status 3, so all were stopped;")
    assert (tmp_path / "ended").exists()


def test_with_restarts_all_are_started_again_when_one_fails(tmp_path: Path):
    (tmp_path / "plan.json").write_text(json.dumps(TWO))
    (tmp_path / "torchrun").write_text("#!/bin/sh\necho once >> tried; [ $(wc -l < tried) = 3 ]\n")
    (tmp_path / "torchrun").chmod(0o755)
    asked = ["launch", "plan.json", "--hosts", "a=x,y", "b=z", "--here=y", f"--torchrun={tmp_path}/torchrun"]
    for restarts, ended in ((1, 2), (2, 0)):
        (tmp_path / "tried").unlink(missing_ok=True)
        done = run([*MOTLEY, *asked, f"--restarts={restarts}"], cwd=tmp_path)
        assert (done.returncode, done.stderr.count("starting all again")) == (ended, restarts), done.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_the_launcher(how: signal.Signals, tmp_path: Path, ssh: dict[str, str]):
    process = started(tmp_path, ssh, "exec sleep 60")
    deadline = time.monotonic() + 30
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(how)
    process.communicate(timeout=30)
    assert process.returncode == (-how if how == signal.SIGKILL else 130)
    while not (tmp_path / "ended").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_machine_of_a_cluster_runs_its_own_part_only(tmp_path: Path):
    (tmp_path / "plan.json").write_text(json.dumps(TWO))
    (tmp_path / "torchrun").write_text('#!/bin/sh\necho "$2 in $PWD"\n')
    (tmp_path / "torchrun").chmod(0o755)
    asked = ["launch", "plan.json", "--hosts", "a=x,y", "b=z", "--here=y", f"--torchrun={tmp_path}/torchrun"]
    done = run([*MOTLEY, *asked], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "2 of 6 ranks ran to the end\n")
    assert done.stderr == f"y: --node-rank=1 in {tmp_path}\n"
