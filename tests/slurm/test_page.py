"""The commands of docs/on-slurm.md, given to a real SLURM: 8 nodes with 8 pretended GPUs each.

What is submitted is held, so that nothing trains here: what the jobs then do is in the other tests of this folder.
"""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megat2i.config import to_yaml
from slurm.private_cluster import PrivateCluster


def page_lines(page: str) -> list[str]:
    """The lines for a cluster in the page's shell blocks, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = [line.partition("  #")[0].rstrip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(SHARES=\d+ )?sbatch |scancel |mkdir |python tools/submit.py ", line)]


@pytest.fixture
def cluster(make_cluster) -> PrivateCluster:
    return make_cluster(nodes=8, cpus=8, gpus=8)


@pytest.fixture
def project(tmp_path, repository, run_config) -> Path:
    """A folder with the checkout's tools and a configuration of 64 ranks."""
    (tmp_path / "tools").symlink_to(repository / "tools")
    (tmp_path / "configs").mkdir()
    config = run_config(Path("runs/mine"))
    training = replace(config.training, global_batch_size=128)
    (tmp_path / "configs/mine.yaml").write_text(to_yaml(replace(config, training=training)))
    return tmp_path


def test_slurm_accepts_every_command(cluster, repository, project):
    lines = page_lines((repository / "docs/on-slurm.md").read_text())
    assert len(lines) >= 9
    job = cluster.run("sbatch", "--parsable", "--output=/dev/null", "--wrap=trap : USR1; sleep 100", cwd=project)
    cluster.wait_for(job, ("RUNNING",), 30)
    for line in lines:
        held = line.replace("sbatch ", "sbatch --hold ", 1)
        if line.startswith("python tools/submit.py"):
            held = f"{sys.executable}{line.removeprefix('python')} --sbatch=--hold"
        command = held.replace("JOB", job).replace("--partition gpu", "--partition low")
        done = subprocess.run(
            ["bash", "-c", command], cwd=project, env=cluster.environment, text=True, capture_output=True
        )
        assert done.returncode == 0 and "error" not in done.stderr, (line, done.stdout, done.stderr)
    states = cluster.run("squeue", "--noheader", "--states=PENDING", "--format=%j %r").splitlines()
    assert len(states) >= 5 and all("JobHeldUser" in state or "Dependency" in state for state in states), states


def test_a_wrong_option_is_noticed(cluster, repository, project):
    """The control of the test above."""
    script = str(repository / "tools/slurm/evaluate.sbatch")
    command = ["sbatch", "--hold", "--partition=other", script, "x.py"]
    assert subprocess.run(command, cwd=project, env=cluster.environment, capture_output=True).returncode
