"""`motley launch`: the torchrun commands that start the ranks of a plan, each on the chip that the plan gave it.

    plan      one pipeline group: stage 0 on `big`, stage 1 on `old`, two replicas   ranks: by replica, then by stage
    chips     big 0: rank 0   old 0: rank 1   big 1: rank 2   old 1: rank 3          filled by stage: replicas of a
                 │               │               │               │                   stage exchange most, on one host
    torchrun  node 0          node 1          node 2          node 3                 rank = node rank x processes

torchrun gives consecutive ranks to the processes of a node, and supports only equal numbers of processes on all nodes.
So its nodes are here runs of consecutive ranks on one host, of the greatest length that divides the runs of all hosts.
Equal hosts with whole replicas get one torchrun each, the most uneven plan gets one for each rank.
"""

import math
import os
import shlex
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any

import tyro

from motley.errors import InputError
from motley.parallel.layout import ranks_of_pools
from motley.plan.read_plan import read_plan
from motley.progress import note

STAGES_OF_TRAINING = ("pretrain", "sft")
ONLY_HERE = ("localhost", "127.0.0.1", "::1")
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15")  # no prompts; a dead host ends the connection
END_SECONDS = 60.0
"""For all commands to exit: torchrun gives its ranks 30 s to write a checkpoint."""


@dataclass(frozen=True)
class LaunchConfig:
    """Print, or run, the torchrun commands that start a plan on its machines."""

    plan: Annotated[Path, tyro.conf.Positional]
    """The plan file (`motley plan`); every machine must find it under this path, and the data and run folders too."""
    hosts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="POOL=HOST,HOST")] = ()
    """The machines of each pool, by the names under which they reach each other; one machine may serve several pools.
    Not needed for a plan of one pool on one machine: this one."""
    job: str = "pretrain"
    """The command to start with its options, in quotes, such as 'sft --model runs/base'; --plan is added."""
    ssh: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run everything, over ssh; when one command fails, all are stopped."""
    here: Annotated[str | None, tyro.conf.arg(metavar="HOST")] = None
    """Run, on this machine, what HOST is to run: for SLURM and Kubernetes, where every machine calls this itself."""
    folder: Path = Path()
    """Where the commands run on every machine (relative paths are seen from there); default: this folder."""
    torchrun: str = "torchrun"
    """The torchrun of the environment that has motley, such as .venv/bin/torchrun."""
    restarts: int = 0
    """How often to start everything again when a command that was run failed; training goes on from its newest
    checkpoint."""
    port: int = 29500
    """Of the machine of rank 0; the others must be able to reach it."""

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise InputError(f"--port is {self.port}; it must be from 1 to 65535")
        if self.restarts < 0:
            raise InputError(f"--restarts is {self.restarts}; it must be at least 0")
        if self.restarts and not (self.ssh or self.here):
            raise InputError("--restarts is for commands that are run; add --ssh or --here HOST")
        if self.ssh and self.here is not None:
            raise InputError("--ssh runs all machines, --here only one; give one of them")
        job_words(self.job, ["--plan"])


def job_words(job: str, added: Collection[str]) -> list[str]:
    """A training command as words. Raises InputError for another command, and for options that launch adds itself."""
    try:
        words = shlex.split(job)
    except ValueError as error:
        raise InputError(f"--job is {job!r}, which no shell can read: {error}") from None
    if words[:1] not in [[name] for name in STAGES_OF_TRAINING]:
        raise InputError(f"--job is {job!r}; it must begin with {' or '.join(STAGES_OF_TRAINING)}")
    for option in added:
        if any(word.split("=")[0] == option for word in words):
            raise InputError(f"--job has {option}, which launch adds itself; leave it out")
    return words


@dataclass(frozen=True)
class Slot:
    """The chip of a rank: number `chip` of its host, from 0."""

    host: str
    pool: str
    chip: int


@dataclass(frozen=True)
class TorchrunNode:
    """Consecutive ranks on one host, which one torchrun starts."""

    ranks: range
    slots: tuple[Slot, ...]

    @property
    def host(self) -> str:
        return self.slots[0].host

    @property
    def pools(self) -> list[str]:
        return list(dict.fromkeys(slot.pool for slot in self.slots))

    @property
    def chips(self) -> list[int]:
        return [slot.chip for slot in self.slots]


def launch(config: LaunchConfig) -> dict[str, Any]:
    """The commands as data; with --ssh or --here it has run them.

    Raises InputError for hosts that do not fit the plan, and when a command failed.
    """
    plan = read_plan(config.plan)
    try:
        nodes = nodes_of(slots_of(plan, hosts_of(plan, config.hosts)))
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{config.plan} is no plan as `motley plan --out` writes it: {error!r} is missing or wrong"
        ) from None
    words = torchrun_words(nodes, config)
    chosen = [number for number, node in enumerate(nodes) if config.here in (None, node.host)]
    if not chosen:
        there_are = ", ".join(dict.fromkeys(node.host for node in nodes))
        raise InputError(f"--here is {config.here}, which has no ranks in this plan; hosts that have: {there_are}")
    run = config.ssh or config.here is not None
    if run:
        commands = [
            (nodes[n], tied_to_stdin(words[n], config.folder, nodes[n].host if config.ssh else None)) for n in chosen
        ]
        run_with_restarts(lambda _: commands, config.restarts)
    return {
        "ranks": len(nodes) * len(nodes[0].ranks),
        "ran": run,
        "commands": [
            {
                "host": nodes[n].host,
                "pools": nodes[n].pools,
                "ranks": list(nodes[n].ranks),
                "chips": nodes[n].chips,
                "command": shlex.join(words[n]),
            }
            for n in chosen
        ],
    }


def summary(result: dict[str, Any]) -> str:
    """The commands to paste, by host; all of them have to run at the same time."""
    commands = result["commands"]
    if result["ran"]:
        return f"{sum(len(entry['ranks']) for entry in commands)} of {result['ranks']} ranks ran to the end"
    lines = []
    for entry in commands:
        ranks = " ".join(map(str, entry["ranks"]))
        lines += [f"# {entry['host']}: {' and '.join(entry['pools'])}, rank {ranks}", entry["command"]]
    return "\n".join(lines)


def hosts_of(plan: Mapping[str, Any], named: Sequence[str]) -> dict[str, list[str]]:
    """The hosts of each pool that has ranks, from `POOL=HOST,HOST` each."""
    nodes = {entry["pool"]: int(entry["nodes"]) for entry in plan["pools"]}
    used = {entry["pool"]: entry["chips"] > 0 for entry in plan["pools"]}
    if not named and list(nodes.values()) == [1]:
        return {pool: ["localhost"] for pool in nodes}
    hosts: dict[str, list[str]] = {}
    for entry in named:
        pool, _, listed = entry.partition("=")
        names = listed.split(",")
        if not all(names) or any(name.startswith("-") for name in names):
            raise InputError(f"--hosts has {entry!r}; write POOL=HOST,HOST")
        if pool not in nodes:
            raise InputError(f"--hosts names pool {pool}, but the plan's pools are {', '.join(nodes)}")
        if pool in hosts:
            raise InputError(f"--hosts names pool {pool} twice; list all its hosts at once: {pool}=HOST,HOST")
        if len(names) > nodes[pool]:
            raise InputError(f"--hosts has {len(names)} for pool {pool}, the plan {nodes[pool]}; leave some out")
        hosts[pool] = names
    if missing := [pool for pool in nodes if used[pool] and pool not in hosts]:
        example = " ".join(f"{pool}=HOST" for pool in missing)
        raise InputError(f"no hosts for {' and '.join(missing)}; name them: --hosts {example}")
    every = {name for names in hosts.values() for name in names}
    if len(every) > 1 and (hidden := every.intersection(ONLY_HERE)):
        raise InputError(
            f"--hosts has {min(hidden)} beside {min(every - hidden)}, which cannot reach it; "
            "name this machine as the others know it"
        )
    return hosts


def slots_of(plan: Mapping[str, Any], hosts: Mapping[str, Sequence[str]]) -> list[Slot]:
    """The slot of each rank; ranks as `from_plan` orders them: by pipeline group, replica and stage.

    The chips of a pool are filled by group and stage, replicas of a stage side by side, as the planner assumes.
    """
    of_pools = ranks_of_pools(plan)
    size = sum(map(len, of_pools.values()))
    slots: dict[int, Slot] = {}
    taken: dict[str, int] = {}  # chips of each host that previous pools have
    for entry in plan["pools"]:
        pool, own, ranks = entry["pool"], hosts.get(entry["pool"], ()), of_pools[entry["pool"]]
        if len(ranks) != entry["chips"]:
            raise InputError(
                f"the plan gives {pool} {entry['chips']} chips but {len(ranks)} ranks (tensor or context "
                "parallelism, which this runtime does not have); make the plan with --framework motley"
            )
        even = len(ranks) % entry["chips_per_node"] == 0  # else some chips of every node stay idle
        each = entry["chips_per_node"] if even else math.ceil(len(ranks) / entry["nodes"])
        if len(own) * each < len(ranks):
            needed = math.ceil(len(ranks) / each)
            raise InputError(f"--hosts has {len(own)} for pool {pool}, whose {len(ranks)} ranks need {needed}")
        for number, host in enumerate(own):
            first = taken.get(host, 0)
            taken[host] = first + entry["chips_per_node"]
            for chip, rank in enumerate(ranks[number * each : (number + 1) * each]):
                slots[rank] = Slot(host, pool, first + chip)
    return [slots[rank] for rank in range(size)]


def nodes_of(slots: Sequence[Slot]) -> list[TorchrunNode]:
    """The nodes that torchrun is told of, in the order of ranks, all of the same size."""
    size = math.gcd(*(len(list(run)) for _, run in groupby(slots, key=lambda slot: slot.host)))
    return [
        TorchrunNode(range(first, first + size), tuple(slots[first : first + size]))
        for first in range(0, len(slots), size)
    ]


def torchrun_words(nodes: Sequence[TorchrunNode], config: LaunchConfig) -> list[list[str]]:
    """The command of each node. A rank sees only its own chip, whatever the chip's number on the host."""
    address = nodes[0].host.rpartition("@")[2]  # without the user that ssh logs in as
    on_host = Counter(node.host for node in nodes)
    commands = []
    for number, node in enumerate(nodes):
        variables = []
        if node.chips != list(range(len(node.chips))):  # else torchrun's default
            variables.append(f"CUDA_VISIBLE_DEVICES={','.join(map(str, node.chips))}")
        if on_host[node.host] > 1:  # torchrun sets this for several ranks; without it each would use all cores
            variables.append("OMP_NUM_THREADS=1")
        commands.append([
            *(["env", *variables] if variables else []),
            config.torchrun, f"--nnodes={len(nodes)}", f"--node-rank={number}",
            f"--nproc-per-node={len(node.ranks)}", f"--master-addr={address}", f"--master-port={config.port}",
            "--virtual-local-rank", "-m", "motley", *job_words(config.job, ["--plan"]), f"--plan={config.plan}",
        ])  # fmt: skip
    return commands


def tied_to_stdin(words: Sequence[str], folder: Path, host: str | None) -> list[str]:
    """The command that runs `words` in `folder` on `host` (None: here) until they end or its standard input closes.

    Standard input closes when this process exits or the connection breaks; nothing else would end a command over ssh.
    """
    script = (
        f"cd {shlex.quote(str(folder.resolve()))} || exit; exec 3<&0; {shlex.join(words)} 3<&- & work=$!; "
        "{ cat <&3; kill $work; } >/dev/null 2>&1 & watch=$!; exec 3<&-; "
        "wait $work; status=$?; kill $watch 2>/dev/null; exit $status"
    )
    command = ["sh", "-c", script]
    return command if host is None else [*SSH, host, shlex.join(command)]


Commands = Sequence[tuple[TorchrunNode, Sequence[str]]]


def run_with_restarts(commands: Callable[[int], Commands], restarts: int, kept: Collection[int] = ()) -> None:
    """Run all at the same time, and up to `restarts` times again when one of them fails.

    Args:
        commands: (start, counted from 0) → the commands.
        restarts: how often to start again.
        kept: open files that the processes inherit.
    """
    for start in range(restarts + 1):
        try:
            return run_together(commands(start), kept)
        except InputError as failed:
            if start == restarts:
                raise
            note(f"{failed}; starting all again ({restarts - start} more times at most)")


def run_together(commands: Commands, kept: Collection[int] = ()) -> None:
    """Run all at the same time and show their output behind the host's name; stop all when one fails or this process is
    stopped. Raises InputError naming the one that failed first."""
    ended: SimpleQueue[tuple[TorchrunNode, int]] = SimpleQueue()
    running: list[tuple[subprocess.Popen[str], threading.Thread]] = []
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        for node, command in commands:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                errors="replace", start_new_session=True, pass_fds=kept,
            )  # fmt: skip
            forward = threading.Thread(target=_forward, args=(node, process, ended), daemon=True)
            running.append((process, forward))
            forward.start()
        for _ in running:
            node, status = ended.get()
            if status:
                raise InputError(
                    f"{node.host} (rank {' '.join(map(str, node.ranks))}) exited with status {status}, so all were "
                    "stopped; see its output above and start again: training goes on from its newest checkpoint"
                )
    finally:
        _end(running)
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, _: object) -> None:
    raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")


def _forward(
    node: TorchrunNode, process: subprocess.Popen[str], ended: "SimpleQueue[tuple[TorchrunNode, int]]"
) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        note(f"{node.host}: {line.rstrip()}")
    ended.put((node, process.wait()))


def _end(running: Sequence[tuple[subprocess.Popen[str], threading.Thread]]) -> None:
    """Close the standard input of all, wait for their last output, and kill those that still run."""
    for process, _ in running:
        assert process.stdin is not None
        process.stdin.close()
    deadline = time.monotonic() + END_SECONDS
    for process, forward in running:
        forward.join(max(0.0, deadline - time.monotonic()))
        if forward.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
