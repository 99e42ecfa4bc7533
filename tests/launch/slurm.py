"""A SLURM cluster on this machine, of Debian's own daemons: a controller, and a node for each pool of chips."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from motley.parallel.communicator import free_port

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo")


def lacking() -> str | None:
    """Why there can be no cluster here; None: there can."""
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        return f"there is no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client"
    return None if os.geteuid() == 0 else "a node of SLURM runs jobs as other users, so it takes root"


@contextmanager
def cluster(folder: Path, chips: Mapping[str, int]) -> Iterator[dict[str, str]]:
    """One node for each kind of chip, named after it, with so many; what a user's environment needs besides."""
    configuration = folder / "slurm.conf"
    nodes, lines = [], []
    for kind, count in chips.items():
        for number in range(count):
            (folder / f"{kind}-chip{number}").touch()  # SLURM counts devices; nobody opens them
        files = f"{folder}/{kind}-chip[0-{count - 1}]" if count > 1 else f"{folder}/{kind}-chip0"
        lines.append(f"NodeName={kind}-node Name=gpu Type={kind} File={files}")
        nodes.append(f"NodeName={kind}-node NodeAddr=127.0.0.1 Port={free_port()} CPUs=1 Gres=gpu:{kind}:{count}")
    (folder / "gres.conf").write_text("\n".join(lines) + "\n")
    settings = {
        "ClusterName": "lab", "SlurmctldHost": f"{socket.gethostname()}(127.0.0.1)", "SlurmctldPort": free_port(),
        "SlurmUser": "root", "AuthType": "auth/none", "CredType": "cred/none", "MpiDefault": "none",
        "StateSaveLocation": folder / "state", "SlurmctldPidFile": folder / "controller.pid",
        "SlurmdSpoolDir": folder / "spool-%n", "SlurmdPidFile": folder / "%n.pid",
        "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none", "GresTypes": "gpu",
        "SelectType": "select/cons_tres", "SchedulerParameters": "sched_interval=1,bf_interval=1",
    }  # fmt: skip
    named = "\n".join(f"{name}={value}" for name, value in settings.items())
    partition = "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO"
    configuration.write_text("\n".join([named, *nodes, partition]) + "\n")
    (folder / "state").mkdir()
    environment = {"SLURM_CONF": str(configuration)}
    daemons = []
    try:
        for words in (["slurmctld", "-D"], *(["slurmd", "-D", "-N", f"{kind}-node"] for kind in chips)):
            with (folder / f"{words[-1]}.log").open("w") as log:
                daemons.append(
                    subprocess.Popen(
                        words, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                    )
                )
        _all_idle(folder, len(chips), os.environ | environment)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=30)


def _all_idle(folder: Path, count: int, environment: Mapping[str, str]) -> None:
    """Wait until all nodes would take a job."""
    states = ""
    for _ in range(120):
        states = subprocess.run(["sinfo", "-hNo", "%t"], env=environment, capture_output=True, text=True).stdout
        if states.split() == ["idle"] * count:
            return
        time.sleep(0.5)
    logs = "\n".join(f"{log.name}: {log.read_text()[-500:]}" for log in folder.glob("*.log"))
    raise AssertionError(f"the nodes are {states.split()}, not idle:\n{logs}")
