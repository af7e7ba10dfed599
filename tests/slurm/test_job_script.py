"""tools/slurm/pretrain.sbatch on a private cluster: what follows when a start of a run ends, whatever ended it.

A stand-in program keeps to what the script may rely on; the trainings themselves are in test_training.py.
"""

import json
import os
import time
from pathlib import Path

import pytest

from megat2i.job_scripts import job_script
from slurm.private_cluster import ENDED, PrivateCluster

STAND_IN = Path(__file__).parent / "stand_in"
HIGH = ("sbatch", "--parsable", "--partition=high", "--nodes=2", "--ntasks-per-node=8", "--output=/dev/null")


class Job:
    """pretrain.sbatch with the stand-in, 2 x 2 tasks, in the folder ``work``."""

    def __init__(self, cluster: PrivateCluster, script: Path, work: Path, *arguments: str, options=(), **variables):
        self.cluster, self.run_dir, self.work = cluster, work / "run", work
        (work / "logs").mkdir(parents=True, exist_ok=True)
        environment = {"CODE": str(STAND_IN), "CONFIG": "x.yaml", "RUN": str(self.run_dir)} | variables
        layout = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--time=10")
        command = ("sbatch", "--parsable", *layout, *options, str(script), *arguments)
        self.id = cluster.run(*command, cwd=work, environment=environment)

    def wait_until_running(self) -> None:
        """Until all four tasks make steps."""
        self.cluster.wait_for(self.id, ("RUNNING",), 30)
        deadline = time.monotonic() + 30
        while len(self.cluster.pids("python", "stand_in", "run.dir=")) < 5 and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)

    def end(self, seconds: float = 120) -> str:
        return self.cluster.wait_for(self.id, ENDED, seconds)

    @property
    def log(self) -> str:
        return (self.work / f"logs/megat2i-{self.id}.out").read_text()


@pytest.fixture
def cluster(make_cluster) -> PrivateCluster:
    return make_cluster()


@pytest.fixture
def work(tmp_path) -> Path:
    return tmp_path / "work"


def preempt(cluster: PrivateCluster) -> None:
    """A job of a higher partition takes all nodes for a second."""
    cluster.run(*HIGH, "--wrap=sleep 1")


def test_usr1_saves_and_the_job_starts_again_until_it_is_finished(cluster, script, work):
    job = Job(cluster, script, work, "steps=60")
    job.wait_until_running()
    cluster.run("scancel", "--signal=USR1", job.id)
    cluster.start_again(job.id)
    assert job.end() == "COMPLETED" and cluster.restarts(job.id) == 1
    assert '"reason": "SIGUSR1"' in job.log and job.log.rstrip().endswith("finished")
    assert f"job {job.id}, start 0" in job.log and f"job {job.id}, start 1" in job.log  # nothing was truncated


@pytest.mark.parametrize("user_signal", (True, False))
def test_a_preempted_job_starts_again(make_cluster, script, work, user_signal):
    cluster = make_cluster(user_signal=user_signal)
    job = Job(cluster, script, work, "steps=60")
    job.wait_until_running()
    preempt(cluster)
    cluster.start_again(job.id)
    assert job.end() == "COMPLETED" and cluster.restarts(job.id) == 1
    assert f'"reason": "{"SIGUSR1" if user_signal else "SIGTERM"}"' in job.log and "finished" in job.log


def test_the_time_limit_is_no_end(cluster, script, work):
    job = Job(cluster, script, work, "steps=450", options=("--time=1", "--signal=USR1@15"))
    cluster.wait_for(job.id, ("RUNNING",), 30)
    cluster.wait_for(job.id, ("PENDING",), 80)
    cluster.run("scontrol", "update", f"jobid={job.id}", "TimeLimit=10")
    cluster.start_again(job.id)
    assert job.end() == "COMPLETED" and cluster.restarts(job.id) == 1
    assert '"reason": "time limit"' in job.log or '"reason": "SIGUSR1"' in job.log


def test_a_lost_node_is_no_end(cluster, script, work):
    job = Job(cluster, script, work, "steps=60")
    job.wait_until_running()
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    cluster.wait_for(job.id, ("PENDING",), 30)
    cluster.run("scontrol", "update", "nodename=n2", "state=idle")
    cluster.wait_for_nodes()
    cluster.start_again(job.id)
    assert job.end() == "COMPLETED" and cluster.restarts(job.id) == 1


def test_two_starts_without_progress_end_the_job_with_a_verdict(cluster, script, work):
    job = Job(cluster, script, work, "steps=60", "crash_after=2")
    cluster.start_again(job.id)
    assert job.end() == "FAILED" and cluster.restarts(job.id) == 1
    assert "verdict: 2 starts in a row left no new checkpoint (newest: step 0)" in job.log


def test_a_cancelled_job_stays_cancelled(cluster, script, work):
    job = Job(cluster, script, work, "steps=600")
    job.wait_until_running()
    cluster.run("scancel", job.id)
    assert job.end() == "CANCELLED"
    time.sleep(3)
    assert cluster.state(job.id) == "CANCELLED" and "requeues" not in job.log


def test_a_requeued_job_goes_on(cluster, script, work):
    job = Job(cluster, script, work, "steps=60")
    job.wait_until_running()
    cluster.run("scontrol", "requeue", job.id)
    cluster.start_again(job.id)
    assert job.end() == "COMPLETED" and cluster.restarts(job.id) == 1


@pytest.mark.parametrize("end", ("triggers/exit", "stop_at"))
def test_a_run_that_leaves_as_asked_is_not_started_again(cluster, script, work, end):
    job = Job(cluster, script, work, "steps=600", *(["stop_at=30"] if end == "stop_at" else []))
    job.wait_until_running()
    if end == "triggers/exit":
        (job.run_dir / "triggers/exit").touch()
    assert job.end() == ("COMPLETED" if end == "stop_at" else "FAILED") and cluster.restarts(job.id) == 0
    assert ("stopped as asked" if end == "triggers/exit" else "training.stop_at") in job.log


def test_one_crashed_task_ends_the_others_and_the_job_starts_again(cluster, script, work):
    job = Job(cluster, script, work, "steps=60")
    job.wait_until_running()
    began = time.monotonic()
    cluster.kill(cluster.pids("python", "stand_in", "run.dir=")[-1:])
    cluster.start_again(job.id)
    assert time.monotonic() - began < 40
    assert job.end() == "COMPLETED" and cluster.restarts(job.id) == 1


def test_a_chain_of_jobs_needs_no_requeue(cluster, script, work):
    options = ("--dependency=singleton", "--no-requeue")
    jobs = [Job(cluster, script, work, "steps=60", options=options, CHAIN="c") for _ in range(3)]
    jobs[0].wait_until_running()
    cluster.run("scancel", "--signal=USR1", jobs[0].id)
    assert [job.end() for job in jobs] == ["COMPLETED"] * 3
    assert "the next job of the chain goes on" in jobs[0].log and "finished" in jobs[1].log
    assert "an earlier job of the chain has finished" in jobs[2].log


def test_a_chain_without_progress_ends_with_a_verdict(cluster, script, work):
    options = ("--dependency=singleton", "--no-requeue")
    jobs = [Job(cluster, script, work, "crash_after=2", options=options, CHAIN="c") for _ in range(3)]
    assert [job.end() for job in jobs] == ["COMPLETED", "FAILED", "FAILED"]
    assert "verdict" in jobs[1].log and "verdict" in jobs[2].log and "srun" not in jobs[2].log
    assert os.listdir(work / "run/checkpoints") == []


def test_without_its_handlers_a_program_loses_its_steps(cluster, script, work):
    """The control of the tests above: they would see a program that does not answer."""
    job = Job(cluster, script, work, "steps=60", "handlers=off")
    job.wait_until_running()
    cluster.run("scancel", "--signal=USR1", job.id)
    cluster.start_again(job.id)
    assert job.end() == "COMPLETED"
    assert "reason" not in job.log and job.log.count("after step 0") == 4  # twice at each start


def test_without_kill_on_bad_exit_the_other_tasks_run_on(cluster, script, work):
    """The control of the killed task."""
    other = work.parent / "other.sbatch"
    other.write_text(script.read_text().replace("--kill-on-bad-exit=1 --wait=60", ""))
    job = Job(cluster, other, work, "steps=600")
    job.wait_until_running()
    cluster.kill(cluster.pids("python", "stand_in", "run.dir=")[-1:])
    time.sleep(8)
    assert cluster.state(job.id) == "RUNNING" and len(cluster.pids("python", "stand_in", "run.dir=")) >= 3


def test_the_papers_layout_of_8_nodes_with_8_gpus(make_cluster, repository, work):
    """The script as tools/submit.py makes it for 64 GPUs, which are pretended ones: a task for each."""
    cluster = make_cluster(nodes=8, cpus=8, gpus=8)
    (work / "logs").mkdir(parents=True)
    settings = {"CODE": str(STAND_IN), "CONFIG": "x.yaml", "RUN": str(work / "run")}
    (work / "job.sbatch").write_text(job_script("pretrain", {"nodes": 8}, settings, ["steps=20"]))
    job = cluster.run("sbatch", "--parsable", "job.sbatch", cwd=work)
    assert cluster.wait_for(job, ENDED, 120) == "COMPLETED"
    record = json.loads((work / "run/environment.json").read_text())
    assert record["slurm"]["nodes"] == "n[1-8]" and record["tasks"] == "64"
