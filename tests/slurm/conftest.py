"""Clusters and jobs for the tests of this folder."""

import os

import pytest

from slurm.private_cluster import PrivateCluster, missing


@pytest.fixture(scope="session", autouse=True)
def slurm_is_here() -> None:
    problem = missing()
    if problem and os.environ.get("CI"):
        pytest.fail(problem)
    if problem:
        pytest.skip(problem)


@pytest.fixture
def make_cluster(tmp_path):
    """Function of PrivateCluster's options -> the cluster, which ends with the test."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(PrivateCluster(tmp_path / "cluster", **options))
