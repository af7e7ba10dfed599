"""Trainings on a private cluster, 2 nodes x 2 ranks: what hits a job, one thing after the other, and what comes of it.

One run goes through all of it, since the start that follows one event is what the next one hits. At its end its record
equals that of a run that nobody touched.
"""

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megat2i.slurm import port
from slurm.private_cluster import ENDED, PrivateCluster
from slurm.training_job import TrainingJob, left, lines


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def cluster(short_folder):
    with PrivateCluster(short_folder(), grace=20) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def untouched(cluster, repository, work, write_config) -> Path:
    """The folder of a run that nobody touched, submitted as a user would do it."""
    run_dir = work / "untouched"
    config = write_config(work / "untouched.yaml", run_dir)
    command = [sys.executable, repository / "tools/submit.py", config, "--nodes=2", "--gpus-per-node=0"]
    command += ["--tasks-per-node=2", "--time=10"]
    done = subprocess.run(command, cwd=work, env=cluster.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[1].rstrip(":")
    log = work / f"logs/untouched-{job}.out"
    assert cluster.wait_for(job, ENDED, 300) == "COMPLETED", log.read_text()
    assert log.read_text().rstrip().endswith("finished")
    return run_dir


@pytest.fixture(scope="module")
def run_dir(work) -> Path:
    return work / "touched"


class Chain:
    """The job that is hit, and how often it has been requeued."""

    def __init__(self, submit):
        self.job, self.restarts = submit(), 0

    def go_on(self, seconds: float = 120) -> None:
        self.restarts += 1
        self.job.cluster.start_again(self.job.id, self.restarts, seconds)
        self.job.wait_for_steps()


@pytest.fixture(scope="module")
def submit(cluster, script, work, write_config, run_dir):
    config = write_config(work / "touched.yaml", run_dir)
    return lambda *options: TrainingJob(cluster, script, config, run_dir, *options)


def test_scancel_saves_and_ends_the_job(cluster, submit, run_dir):
    job = submit()
    step = job.wait_for_steps()
    cluster.run("scancel", job.id)
    assert job.end() == "CANCELLED"
    assert left(run_dir)["reason"] == "SIGTERM" and left(run_dir)["step"] >= step
    time.sleep(3)
    assert cluster.state(job.id) == "CANCELLED" and "requeues" not in job.log


@pytest.fixture(scope="module")
def chain(submit) -> Chain:
    """A new job goes on where the cancelled one left."""
    chain = Chain(submit)
    chain.job.wait_for_steps()
    return chain


def test_usr1(cluster, chain):
    assert "after step 0" not in chain.job.log
    step = chain.job.wait_for_steps(1)
    cluster.run("scancel", "--signal=USR1", chain.job.id)
    chain.go_on()
    saved = re.search(r'"step": (\d+), "reason": "SIGUSR1"', chain.job.log)
    assert saved and int(saved[1]) >= step


def test_preemption(cluster, chain):
    cluster.run(
        "sbatch", "--partition=high", "--nodes=2", "--ntasks-per-node=8", "--output=/dev/null", "--wrap=sleep 1"
    )
    chain.go_on()
    assert chain.job.log.count('"reason": "SIGUSR1"') == 2


def test_requeue_by_hand(cluster, chain):
    cluster.run("scontrol", "requeue", chain.job.id)
    chain.go_on()


def test_node_down(cluster, chain):
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    cluster.wait_for(chain.job.id, ("PENDING",), 90)
    cluster.run("scontrol", "update", "nodename=n2", "state=idle")
    cluster.wait_for_nodes()
    chain.go_on()


def test_one_rank_killed(cluster, chain):
    cluster.kill(chain.job.ranks()[3:])
    chain.go_on()


def test_one_rank_stopped(cluster, chain):
    """The watchdog names it and ends the start."""
    cluster.kill(chain.job.ranks()[2:3], signal.SIGSTOP)
    chain.go_on(180)
    assert "rank 2" in chain.job.log


def test_slurmstepd_killed(cluster, chain):
    """Nobody else could end that node's ranks, so they end by themselves; SLURM never learns of it."""
    cluster.kill(cluster.pids("slurmstepd", f"[{chain.job.id}.0]")[-1:])
    chain.go_on(240)


def test_a_second_job_on_the_folder_is_refused(cluster, chain, submit):
    second = submit("--no-requeue")
    second.end()
    assert "is in use by another launch" in second.log and "Traceback" not in second.log
    chain.job.wait_for_steps(1)


def test_a_strangers_port(cluster, chain):
    """Its owner is named, and the next start meets at another one."""
    chain.restarts += 1
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger.bind(("", port(int(chain.job.id), 0, chain.restarts)))
        stranger.listen()
        cluster.run("scancel", "--signal=USR1", chain.job.id)
        cluster.start_again(chain.job.id, chain.restarts)
        chain.go_on(180)
    assert f"port {port(int(chain.job.id), 0, chain.restarts - 1)}" in chain.job.log


def test_time_limit(cluster, chain, submit, run_dir):
    """The program leaves before the limit that the job script has told it of; the signal here only asks it to save."""
    cluster.run("scancel", chain.job.id)
    chain.job.end()
    chain.job, chain.restarts = submit("--time=1", "--signal=USR2@1"), 1
    chain.job.set_pace(1.5)  # the minute is over before the schedule is
    chain.job.wait_for_steps()
    cluster.wait_for(chain.job.id, ("PENDING",), 180)
    assert left(run_dir)["reason"] == "time limit"
    cluster.run("scontrol", "update", f"jobid={chain.job.id}", "TimeLimit=20")
    chain.job.set_pace(0)
    cluster.start_again(chain.job.id, chain.restarts)


def test_the_record_is_that_of_an_untouched_run(chain, run_dir, untouched):
    assert chain.job.end() == "COMPLETED"
    assert lines(run_dir) == lines(untouched)
    assert chain.job.log.rstrip().endswith("finished")
