"""Trainings whose ranks do not reach each other, and trainings under DeepSpeed's launcher."""

import time
from pathlib import Path

import pytest

from slurm.training_job import TrainingJob, left, lines


@pytest.fixture
def work(tmp_path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_a_pulled_cable(make_cluster, script, work, write_config):
    """The ranks on the lost node end by themselves, and the run goes on where the newest checkpoint is."""
    cluster = make_cluster(wires=True)
    job = TrainingJob(cluster, script, write_config(work / "run.yaml", work / "run"), work / "run")
    job.wait_for_steps(12)
    lost = job.ranks()[2:]
    assert len(lost) == 2
    cluster.cable("n2", "down")
    cluster.wait_for(job.id, ("PENDING",), 180)
    deadline = time.monotonic() + 180
    while any(Path(f"/proc/{pid}/root").exists() for pid in lost) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_text() for pid in lost)
    cluster.cable("n2", "up")
    cluster.wait_for_nodes()
    # What started the lost ranks still tries to report their end, and then takes the step of this name with it.
    while cluster.pids("slurmstepd", f"[{job.id}.0]") and time.monotonic() < deadline:
        time.sleep(0.5)
    cluster.start_again(job.id)
    job.wait_for_steps()
    assert "after step 0" in job.log and "start 1" in job.log
    steps = [line["step"] for line in lines(work / "run") if "split" not in line]
    assert steps == list(range(1, len(steps) + 1))  # nothing twice, nothing left out
    (work / "run/triggers/exit").touch()
    assert job.end() == "FAILED" and left(work / "run")["reason"] == "triggers/exit"


def test_a_missing_rank_is_named(make_cluster, script, work, write_config):
    cluster = make_cluster()
    (work / "absent").write_text("3")
    job = TrainingJob(cluster, script, write_config(work / "run.yaml", work / "run"), work / "run", "--no-requeue")
    assert job.end() == "FAILED"
    assert "rank 3 on n2 is missing" in job.log and "Traceback" not in job.log


def test_deepspeeds_launcher_on_each_node(make_cluster, script, work, write_config):
    """No ssh; the launchers outlive the signal that their ranks save on."""
    cluster, run = make_cluster(), work / "run"
    job = TrainingJob(cluster, script, write_config(work / "run.yaml", run), run, pace_s=0.1, LAUNCHER="deepspeed")
    job.wait_for_steps()
    cluster.run("scancel", "--signal=USR1", job.id)
    cluster.start_again(job.id)
    assert left(run)["reason"] == "SIGUSR1"
    assert job.end() == "COMPLETED" and job.log.rstrip().endswith("finished")
    steps = [line["step"] for line in lines(run) if "split" not in line]
    assert steps == list(range(1, len(steps) + 1))
    assert "engine=deepspeed" in job.log and "ranks=4" in job.log
