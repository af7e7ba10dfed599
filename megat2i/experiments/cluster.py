"""The experiments at the paper's scale: a configuration and a SLURM script for every run, with predicted GPU hours.

Settings that the paper states are marked [paper], the others [ours] (see configs/open_lm_1b_t2i.yaml, which all runs
share). What follows the training (pictures, FID, text probes) is printed as commands.
"""

import functools
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megat2i import config, config_rules
from megat2i.config import Config
from megat2i.experiments.arms import ALIGNMENT, LANGUAGE_MODEL, PAPER, Arm
from megat2i.experiments.jobs import JobError
from megat2i.files import write_file
from megat2i.planner.hardware import GPUS
from megat2i.planner.layout import Job
from megat2i.planner.ranking import Planned, plan

NODES, GPUS_A_NODE, GPU = 8, 8, "a100-80"  # [paper] 64 A100-80GB
MARGIN = 1.25  # of the predicted time, for SLURM's limit
ALIGNMENT_CONFIG = "configs/paper/alignment.yaml"
STATED = ("model.pretrained", "data.mode", "training.trainable", "training.global_batch_size", "optimizer.lr")
SCRIPT = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={tasks}
#SBATCH --gpus-per-node={tasks}
#SBATCH --time={limit}
#SBATCH --output={folder}/jobs/%x-%j.log
set -euo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=29500
resume=()
if [ -e {run}/config.yaml ]; then resume=(--resume); fi
srun python {tool} --config {config} "${{resume[@]}}"
"""


def write_jobs(arms: Sequence[Arm], folder: Path, data: Path, pretrained: str) -> str:
    """Write ``configs/NAME.yaml`` and ``jobs/NAME.sbatch`` of every run; returns what there is to know of them.

    ``data``: folder of the datasets train, valid and text_valid. Raises ConfigError where a run could not be trained.
    """
    lines = [f"{'run':44}{'tokens':>10}{'hours':>8}{'GPU hours':>11}  settings"]
    total = 0.0
    for name in ("configs", "jobs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for arm in arms:
        settings, marked = settings_of(arm, folder, data, pretrained)
        config_rules.validate(settings, NODES * GPUS_A_NODE if arm.name != ALIGNMENT else 1)
        base = ALIGNMENT_CONFIG if arm.name == ALIGNMENT else PAPER.config
        path = folder / "configs" / f"{arm.name}.yaml"
        head = "".join(f"# {one}\n" for one in (f"{arm.name}: {base} and", *marked))
        write_file(path, (head + config.to_yaml(settings)).encode())
        tokens = settings.training.steps * settings.training.global_batch_size * settings.data.sequence_length
        hours = 1.0 if arm.name == ALIGNMENT else tokens / _speed(settings) / 3600
        nodes, tasks = (1, 1) if arm.name == ALIGNMENT else (NODES, GPUS_A_NODE)
        total += hours * nodes * tasks
        script = SCRIPT.format(
            name=arm.name, nodes=nodes, tasks=tasks, limit=f"{int(hours * MARGIN) + 1}:00:00", folder=folder,
            run=settings.run.dir, tool=arm.tool, config=path,
        )  # fmt: skip
        write_file(folder / "jobs" / f"{arm.name}.sbatch", script.encode())
        shown = f"{arm.name:44}{tokens / 1e9:9.1f}B{hours:8.1f}{hours * nodes * tasks:11,.0f}"
        lines.append(f"{shown}  {', '.join(marked)}")
    lines += [
        "",
        f"{total:,.0f} GPU hours in all on {NODES * GPUS_A_NODE} x {GPU}, by the planner's prediction of the fastest "
        "layout (tools/plan.py); the alignment's hour is a guess",
        f"configurations: {folder}/configs, SLURM scripts: {folder}/jobs; by hand, for each of them:",
        f"  deepspeed --hostfile HOSTS pretrain_t2i.py --config {folder}/configs/NAME.yaml",
        "then, for each twin and for prompts.txt of the 30,000 captions:",
        f"  python tools/generate.py --run {folder}/runs/NAME --prompts-file prompts.txt --output samples/NAME",
        "  python tools/evaluate.py fid --generated samples/NAME --reference val2014 --protocol coco30k/gigagan "
        "--inception pt_inception-2015-12-05-6726825d.pth --output fid/NAME.json",
    ]
    return "\n".join(lines) + "\n"


def settings_of(arm: Arm, folder: Path, data: Path, pretrained: str) -> tuple[Config, list[str]]:
    """The configuration of a run at the paper's scale, and its own settings marked as stated or ours."""
    files = {"{pretrained}": pretrained, "{aligned}": f"{folder}/runs/{ALIGNMENT}/image_embeddings.safetensors"}
    own = {key: files.get(value, value) for key, value in (one.split("=", 1) for one in arm.settings)}
    shared = {"run.dir": f"{folder}/runs/{arm.name}", "data.train": f"[{{prefix: {data}/train}}]"}
    shared |= {"data.valid": f"{data}/valid"}
    if arm.name == ALIGNMENT:  # on one GPU, with all pairs at once
        own = {"model.pretrained": pretrained, "training.micro_batch_size": "1024"}
        return config.load(ALIGNMENT_CONFIG, [f"{k}={v}" for k, v in (shared | own).items()]), _marked(own)
    own["training.steps"] = str(round(PAPER.steps * arm.share))
    batch = int(own.get("training.global_batch_size", PAPER.batch))
    if batch // (NODES * GPUS_A_NODE) < 14:
        own["training.micro_batch_size"] = str(batch // (NODES * GPUS_A_NODE))
    shared["data.valid_text"] = f"{data}/text_valid"
    settings = config.load(PAPER.config, [f"{key}={value}" for key, value in (shared | own).items()])
    return settings, _marked(own)


def _marked(own: dict[str, str]) -> list[str]:
    return [f"{key}={value} [{'paper' if key in STATED else 'ours'}]" for key, value in own.items()]


def submit(arms: Sequence[Arm], folder: Path) -> None:
    """Hand every script to sbatch, each to begin after the runs that it needs; raises JobError."""
    numbers: dict[str, str] = {}
    for arm in arms:
        needed = [numbers[need] for need in arm.needs if need != LANGUAGE_MODEL]
        command = ["sbatch", "--parsable", *([f"--dependency=afterok:{':'.join(needed)}"] if needed else [])]
        command.append(str(folder / "jobs" / f"{arm.name}.sbatch"))
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise JobError("sbatch is not there: submit from a machine of a SLURM cluster") from error
        if done.returncode:
            raise JobError(f"{shlex.join(command)}: {done.stderr.strip()}")
        numbers[arm.name] = done.stdout.strip().split(";")[0]
        print(f"{arm.name}: job {numbers[arm.name]}")


def _speed(settings: Config) -> float:
    """Predicted tokens a second of the fastest layout."""
    return _best(Job.of(settings)).tokens_per_s


@functools.lru_cache
def _best(job: Job) -> Planned:
    return plan(job, NODES * GPUS_A_NODE, GPUS[GPU])[0]
