"""examples/clusters: the real tools' validators accept the files, and what they start is the whole plan, once."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import slurm
import yaml
from plans import plan_of

from motley.cli import main
from motley.fleet.inventory import load_fleet

EXAMPLES = Path(__file__).parents[2] / "examples"
SBATCH, MANIFEST = EXAMPLES / "clusters/slurm.sbatch", EXAMPLES / "clusters/kubernetes.yaml"


def put(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first on PATH, with a torchrun that notes the rank of its node; the work folder is `tmp_path`."""
    folder = tmp_path / "tools"
    put(folder, "torchrun", f'echo "$*" >> {tmp_path}/started')
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.chdir(tmp_path)
    return folder


def started(tmp_path: Path) -> list[int]:
    """Ranks of torchrun's nodes, sorted; all of them name the first machine and the same job."""
    lines = (tmp_path / "started").read_text().splitlines()
    assert len({re.sub(r"--node-rank=\d+", "", line) for line in lines}) == 1
    assert all(line.endswith("-m motley pretrain --data data --out runs/base --plan=plan.json") for line in lines)
    return sorted(int(rank) for line in lines for rank in re.findall(r"--node-rank=(\d+)", line))


def test_bash_reads_the_slurm_script():
    done = subprocess.run(["bash", "-n", str(SBATCH)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_shellcheck_finds_nothing_in_the_slurm_script():
    if not shutil.which("shellcheck"):
        warnings.warn("shellcheck did NOT look at examples/clusters/slurm.sbatch: apt-get install shellcheck")
        pytest.skip("there is no shellcheck")
    done = subprocess.run(["shellcheck", str(SBATCH)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def lab_plan(tmp_path: Path) -> dict[str, tuple[int, int]]:
    """Nodes and chips of each pool of the lab, for which a plan lies in the work folder."""
    lab = {pool.name: (pool.nodes, pool.per_node) for pool in load_fleet(EXAMPLES / "fleets/lab.yaml").pools}
    plan = plan_of(lab, [(["a100", "v100", "v100", "v100", "v100", "rtx3090", "rtx3090"], 2, [6, 1, 1, 1, 1, 1, 1])])
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    return lab


@pytest.mark.slow(20)
def test_a_real_slurm_runs_the_script_on_the_nodes_of_the_lab_and_refuses_chips_that_it_lacks(
    tools: Path, tmp_path: Path
):
    if reason := slurm.lacking():
        warnings.warn(f"SLURM did NOT run examples/clusters/slurm.sbatch: {reason}")
        pytest.skip(reason)
    lab = lab_plan(tmp_path)
    wrong = SBATCH.read_text().replace("a100:2", "a100:3")
    # Not below tmp_path: SLURM's sockets lie there, and the path of a socket has at most 107 letters.
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as folder,
        slurm.cluster(Path(folder), {pool: chips for pool, (_, chips) in lab.items()}) as environment,
    ):

        def submit(*words: str, script: str | None = None) -> subprocess.CompletedProcess[str]:
            surroundings = os.environ | environment
            return subprocess.run(
                ["sbatch", *words], env=surroundings, input=script, capture_output=True, text=True, timeout=60
            )

        refused = submit("--test-only", script=wrong)
        assert refused.returncode != 0
        assert "Requested node configuration is not available" in refused.stderr
        done = submit("--wait", str(SBATCH))
    logs = "\n".join(log.read_text() for log in tmp_path.glob("motley-*.log"))
    assert done.returncode == 0, done.stderr + logs
    assert started(tmp_path) == list(range(14))


def test_the_slurm_job_starts_every_rank_of_the_lab_once(tools: Path, tmp_path: Path):
    """The script runs as it is; `srun` starts its command once for each node that `scontrol` knows."""
    lab = lab_plan(tmp_path)
    components = re.findall(r"--gpus-per-node=(\w+):(\d+)", SBATCH.read_text())
    assert {name: (1, int(chips)) for name, chips in components} == lab
    nodes = {f"SLURM_JOB_NODELIST_HET_GROUP_{number}": f"{name}-node" for number, (name, _) in enumerate(components)}
    put(tools, "scontrol", '[ "$1 $2" = "show hostnames" ] && echo "$3"')
    put(
        tools,
        "srun",
        'while [[ "$1" == --* ]]; do shift; done\n'
        + "\n".join(f'SLURMD_NODENAME={node} "$@" || exit' for node in nodes.values()),
    )
    done = subprocess.run(["bash", str(SBATCH)], env=os.environ | nodes, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert started(tmp_path) == list(range(14))


def manifest() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8")))


def test_kubernetes_accepts_the_manifest():
    for document in manifest():
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    wrong = copy.deepcopy(manifest()[1])
    wrong["spec"]["completion"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_the_pods_start_every_rank_once_under_names_that_the_service_gives_them(
    tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    service, *jobs = manifest()
    pools = {}
    for job in jobs:
        container = job["spec"]["template"]["spec"]["containers"][0]
        chips = container["resources"]["limits"]["nvidia.com/gpu"]
        pools[job["metadata"]["name"]] = (job["spec"]["completions"], chips)
    plan = plan_of(pools, [(["a100", "v100"], 2, [10, 2]), (["v100"], 14, [12])])
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    for job in jobs:
        pod = job["spec"]["template"]
        assert job["spec"]["parallelism"] == job["spec"]["completions"]
        assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
        assert pod["spec"]["subdomain"] == service["metadata"]["name"]
        for index in range(job["spec"]["completions"]):
            program, *arguments = pod["spec"]["containers"][0]["command"]
            assert program == "motley"
            arguments = [word.replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in arguments]
            assert f"--here={job['metadata']['name']}-{index}.{service['metadata']['name']}" in arguments
            assert main(arguments) == 0, capsys.readouterr().err
    assert started(tmp_path) == list(range(18))
