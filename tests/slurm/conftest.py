"""Clusters and configurations for the tests of this folder."""

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from megat2i.config import to_yaml
from slurm.private_cluster import PrivateCluster, missing

STEPS = 160


@pytest.fixture(scope="session", autouse=True)
def slurm_is_here() -> None:
    problem = missing()
    if problem and os.environ.get("CI"):
        pytest.fail(problem)
    if problem:
        pytest.skip(problem)


@pytest.fixture(scope="module")
def short_folder():
    """Function that makes a folder: SLURM's sockets have room for 108 characters, and pytest's folders are deep."""
    with ExitStack() as stack:
        yield lambda: Path(stack.enter_context(TemporaryDirectory(prefix="slurm-")))


@pytest.fixture
def make_cluster(short_folder):
    """Function of PrivateCluster's options -> the cluster, which ends with the test."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(PrivateCluster(short_folder(), **options))


@pytest.fixture(scope="session")
def script(repository) -> Path:
    return repository / "tools/slurm/pretrain.sbatch"


@pytest.fixture(scope="session")
def write_config(run_config):
    """Function of (path, run folder) that writes the configuration of a tiny run of STEPS steps."""

    def write(path: Path, run_dir: Path) -> Path:
        settings = run_config(run_dir)
        training = replace(settings.training, steps=STEPS, checkpoint_every=2, evaluate_every=50)
        runtime = replace(settings.runtime, watchdog_s=20.0, self_test=False)
        path.write_text(to_yaml(replace(settings, training=training, runtime=runtime)))
        return path

    return write
