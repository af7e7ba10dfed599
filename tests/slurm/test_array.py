"""tools/slurm/preprocess.sbatch: an array of which one task is killed and done again; and evaluate.sbatch."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slurm.private_cluster import ENDED

TASKS = 3


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    """Folders of captioned pictures, a shard each."""
    generator = np.random.default_rng(0)
    folders = [tmp_path / f"pictures{shard}" for shard in range(TASKS)]
    for folder in folders:
        folder.mkdir()
        for number in range(20):
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{number:03}.png")
            (folder / f"{number:03}.txt").write_text(f"picture {number} of {folder.name}")
    return folders


def bytes_of(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")]


def test_a_killed_task_is_done_again_and_the_merged_bytes_are_the_same(make_cluster, repository, tmp_path, pictures):
    cluster = make_cluster()
    tool = [sys.executable, repository / "tools/preprocess_data.py", "--input", *pictures, "--workers", "1"]
    whole, parts = tmp_path / "whole/train", tmp_path / "parts/train"
    fitted = ("--train-text-tokenizer", "300", "--image-size", "32", "--patch-size", "8", "--codebook-size", "64")
    subprocess.run([*tool, "--output-prefix", whole, *fitted], check=True, capture_output=True)
    files = ("--text-tokenizer", whole.parent / "text_tokenizer.json")
    files += ("--image-tokenizer", whole.parent / "image_tokenizer.safetensors")
    arguments = [str(word) for word in ("--input", *pictures, "--workers", "1", "--output-prefix", parts, *files)]
    (tmp_path / "logs").mkdir()
    script = str(repository / "tools/slurm/preprocess.sbatch")
    variables = {"CODE": str(repository), "SHARES": str(TASKS)}

    def submit(tasks: str) -> str:
        command = ("sbatch", "--parsable", f"--array={tasks}", "--cpus-per-task=1", script, *arguments)
        return cluster.run(*command, cwd=tmp_path, environment=variables)

    first = submit(f"0-{TASKS - 1}")
    cluster.wait_for(f"{first}_1", ("RUNNING",), 30)
    cluster.run("scancel", "--signal=KILL", f"{first}_1")
    states = [cluster.wait_for(f"{first}_{task}", ENDED, 120) for task in range(TASKS)]
    assert states == ["COMPLETED", "CANCELLED", "COMPLETED"]
    merge = [sys.executable, repository / "tools/merge_data.py", f"{parts}.shards", "--output-prefix", parts]
    assert subprocess.run(merge, capture_output=True).returncode  # the control: one share is missing
    again = submit("1")
    assert cluster.wait_for(f"{again}_1", ENDED, 120) == "COMPLETED"
    subprocess.run(merge, check=True, capture_output=True)
    assert bytes_of(parts) == bytes_of(whole)


def test_an_evaluation_runs_the_tool_that_is_named(make_cluster, repository, tmp_path):
    cluster = make_cluster()
    (tmp_path / "logs").mkdir()
    script = str(repository / "tools/slurm/evaluate.sbatch")
    command = ("sbatch", "--parsable", "--gpus-per-node=0", script, "tools/evaluate.py", "fid", "--help")
    job = cluster.run(*command, cwd=tmp_path, environment={"CODE": str(repository)})
    assert cluster.wait_for(job, ENDED, 90) == "COMPLETED"
    assert "--protocol" in (tmp_path / f"logs/evaluate-{job}.out").read_text()
