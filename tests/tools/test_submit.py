"""tools/submit.py: the script and the command that it makes, what it refuses, and the scripts of tools/slurm."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megat2i.job_scripts import FOLDER, job_script

CONFIG = "configs/t2i_7b.yaml"


@pytest.fixture
def submit(repository, tmp_path):
    """Calls the tool in ``tmp_path``, with an ``sbatch`` on the PATH that writes down what it is given."""
    stand_in = tmp_path / "bin/sbatch"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/queue\nwc -l < {tmp_path}/queue\n')
    stand_in.chmod(0o755)

    def call(*words: str, path: str = f"{stand_in.parent}:/usr/bin:/bin") -> subprocess.CompletedProcess:
        command = [sys.executable, repository / "tools/submit.py", repository / CONFIG, *words]
        environment = os.environ | {"PATH": path}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)

    return call


def test_a_dry_run_prints_a_whole_script_for_64_gpus_and_submits_nothing(submit, tmp_path, repository):
    done = submit("--nodes=8", "--dry-run", "--account=vision", "run.dir=runs/a b", "training.seed=1")
    assert done.returncode == 1 and "training.seed" in done.stderr  # every key is checked before anything is queued
    done = submit("--nodes=8", "--dry-run", "--account=vision", "--partition=gpu", "run.dir=runs/a b", "data.seed=1")
    assert done.returncode == 0, done.stderr
    for line in ("--nodes=8", "--ntasks-per-node=8", "--gpus-per-node=8", "--open-mode=append", "--requeue"):
        assert f"#SBATCH {line}\n" in done.stdout
    assert "RUN='runs/a b'\n" in done.stdout and "set -- 'run.dir=runs/a b' data.seed=1\n" in done.stdout
    script, _, command = done.stdout.rpartition("# ")
    assert "vision" not in script and command.endswith(
        "submitted by: sbatch --parsable --account=vision --partition=gpu 'logs/a b.sbatch'\n"
    )
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
    assert not (tmp_path / "queue").exists() and not (tmp_path / "logs").exists()


def test_a_chain_is_submitted_as_so_many_jobs_of_one_script(submit, tmp_path):
    done = submit(
        "--nodes=8", "--chain=3", "--name=long", "--sbatch=--qos=high", "--container=a.sqsh", "--mounts=/d:/d"
    )
    assert done.returncode == 0, done.stderr
    line = "--parsable --dependency=singleton --qos=high logs/long.sbatch"
    assert (tmp_path / "queue").read_text().splitlines() == [line] * 3
    assert [row.split(":")[0] for row in done.stdout.splitlines()] == ["job 1", "job 2", "job 3"]
    text = (tmp_path / "logs/long.sbatch").read_text()
    assert "CONTAINER=a.sqsh\nMOUNTS=/d:/d\nCHAIN=long-" in text


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--nodes=7",), "is not a multiple of micro_batch_size x data-parallel ranks"),
        (("--nodes=8", "--tasks-per-node=4"), "one task for each GPU"),
        (("--nodes=8", "--mounts=/d:/d"), "--mounts needs a --container"),
    ],
)
def test_what_could_not_run_is_refused_before_it_waits_in_a_queue(submit, tmp_path, words, problem):
    done = submit(*words)
    assert done.returncode and problem in done.stderr.replace("\n", " ") and "Traceback" not in done.stderr
    assert not (tmp_path / "queue").exists()


def test_without_slurm_it_is_one_error(submit, tmp_path):
    done = submit("--nodes=8", path=str(tmp_path))
    assert done.returncode == 1 and done.stderr.endswith("submit from a machine of a SLURM cluster\n")


def test_an_option_is_replaced_added_or_left_out():
    text = job_script("pretrain", {"nodes": 3, "gpus-per-node": None, "exclusive": ""}, {"RUN": "a b"}, ["x=y z"])
    head = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --nodes=3" in head and "#SBATCH --exclusive" in head and "#SBATCH --requeue" in head
    assert not any("gpus" in line for line in head) and "RUN='a b'\nset -- 'x=y z'\n" in text


def test_in_a_container_the_images_code_runs_with_the_folder_mounted(tmp_path):
    """The script itself, with stand-ins for SLURM's commands: pyxis is on no machine that runs this."""
    for name in ("srun", "squeue", "scontrol"):
        stand_in = tmp_path / "bin" / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text(f'#!/bin/sh\nprintf "%s\\n" "$MEGAT2I_IMAGE" "$@" > {tmp_path}/{name}\n')
        stand_in.chmod(0o755)
    settings = {"CONFIG": "c.yaml", "RUN": "run", "CONTAINER": "a.sqsh", "MOUNTS": "/d:/d"}
    script = job_script("pretrain", {}, settings, ["data.seed=1"])
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    log = tmp_path / "log"  # not a pipe, which the script's last "sleep" would hold open
    with open(log, "w") as output:
        done = subprocess.run(
            ["bash"], input=script, text=True, cwd=tmp_path, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    assert done.returncode == 0, log.read_text()  # it ended with 0 and left nothing: as with stop_at
    image, *words = (tmp_path / "srun").read_text().splitlines()
    assert image == "a.sqsh" and "--kill-on-bad-exit=1" in words and "--no-container-mount-home" in words
    assert f"--container-mounts={tmp_path}:{tmp_path},/d:/d" in words and f"--container-workdir={tmp_path}" in words
    program = ["python", "/opt/megat2i/pretrain_t2i.py", "--config", "c.yaml", "run.dir=run", "data.seed=1"]
    assert words[-len(program) :] == program


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_the_scripts_are_clean_for_shellcheck():
    files = sorted(FOLDER.glob("*.sbatch"))
    assert [Path(file).stem for file in files] == ["evaluate", "preprocess", "pretrain"]
    done = subprocess.run(["shellcheck", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    filled = job_script("pretrain", {}, {"RUN": shlex.quote("x")})
    assert subprocess.run(["shellcheck", "-"], input=filled, text=True, capture_output=True).returncode == 0
