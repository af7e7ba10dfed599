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
from megat2i.experiments.arms import LANGUAGE_MODEL, PAPER, Arm, is_alignment, length
from megat2i.experiments.jobs import JobError
from megat2i.experiments.miniature import train_list
from megat2i.files import write_file
from megat2i.planner.hardware import GPUS
from megat2i.planner.layout import Job
from megat2i.planner.ranking import Planned, plan

NODES, GPUS_A_NODE, GPU = 8, 8, "a100-80"  # [paper] 64 A100-80GB
MARGIN = 1.25  # of the predicted time, for SLURM's limit
ALIGNMENT_CONFIG = "configs/paper/alignment.yaml"
STATED_KEYS = ("model.pretrained", "data.mode", "training.trainable", "training.global_batch_size")
STATED_VALUES = (
    ("optimizer.lr", "5e-05"), ("optimizer.lr", "0.0003"), ("training.steps", str(PAPER.steps)),
    ("training.warmup_steps", "2000"),
)  # fmt: skip
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


def write_jobs(arms: Sequence[Arm], folder: Path, data: Path, pretrained: str, dry_run: bool) -> str:
    """Write ``configs/NAME.yaml`` and ``jobs/NAME.sbatch`` of every run; returns what there is to know of them.

    ``data``: folder of the datasets train, valid and text_valid. Raises ConfigError where a run could not be trained.
    """
    lines = [f"{'run':44}{'tokens':>10}{'hours':>8}{'GPU hours':>11}  settings"]
    total = 0.0
    for name in () if dry_run else ("configs", "jobs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for arm in arms:
        settings, marked = settings_of(arm, folder, data, pretrained)
        config_rules.validate(settings, 1 if is_alignment(arm) else NODES * GPUS_A_NODE)
        base = ALIGNMENT_CONFIG if is_alignment(arm) else PAPER.config
        path = folder / "configs" / f"{arm.name}.yaml"
        head = "".join(f"# {one}\n" for one in (f"{arm.name}: {base} and", *marked))
        tokens = settings.training.steps * settings.training.global_batch_size * settings.data.sequence_length
        hours = 1.0 if is_alignment(arm) else tokens / _speed(settings) / 3600
        nodes, tasks = (1, 1) if is_alignment(arm) else (NODES, GPUS_A_NODE)
        total += hours * nodes * tasks
        script = SCRIPT.format(
            name=arm.name, nodes=nodes, tasks=tasks, limit=f"{int(hours * MARGIN) + 1}:00:00", folder=folder,
            run=shlex.quote(settings.run.dir), tool=arm.tool, config=shlex.quote(str(path)),
        )  # fmt: skip
        if not dry_run:
            write_file(path, (head + config.to_yaml(settings)).encode())
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
        f"  python tools/generate.py --run {folder}/runs/NAME --prompts-file prompts.txt "
        f"--output {folder}/samples/NAME",
        f"  python tools/evaluate.py fid --generated {folder}/samples/NAME --reference val2014 "
        "--protocol coco30k/gigagan --inception pt_inception-2015-12-05-6726825d.pth "
        f"--output {folder}/fid/NAME.json",
        "and at last the figures of the experiments that were run:",
        f"  python tools/reproduce_paper.py --scale paper --output {folder} --report --only fig3 fig4 fig6 fig7 sweep",
    ]
    return "\n".join(lines) + "\n"


def settings_of(arm: Arm, folder: Path, data: Path, pretrained: str) -> tuple[Config, list[str]]:
    """The configuration of a run at the paper's scale, and its own settings marked as stated or ours."""
    files = {"{pretrained}": pretrained}
    files |= {f"{{{need}}}": f"{folder}/runs/{need}/image_embeddings.safetensors" for need in arm.needs}
    own = {key: files.get(value, value) for key, value in (one.split("=", 1) for one in arm.settings)}
    shared = {"run.dir": f"{folder}/runs/{arm.name}", "data.train": train_list(data / "train")}
    shared |= {"data.valid": f"{data}/valid"}
    if is_alignment(arm):  # on one GPU, with all pairs at once
        own = {key: value for key, value in own.items() if "seed" in key or key == "model.pretrained"}
        own["training.micro_batch_size"] = "1024"
        return config.load(ALIGNMENT_CONFIG, [f"{k}={v}" for k, v in (shared | own).items()]), _marked(own)
    own |= length(arm, PAPER.steps, config.load(PAPER.config).training.warmup_steps)
    batch = int(own.get("training.global_batch_size", PAPER.batch))
    if batch // (NODES * GPUS_A_NODE) < 14:
        own["training.micro_batch_size"] = str(batch // (NODES * GPUS_A_NODE))
    shared["data.valid_text"] = f"{data}/text_valid"
    settings = config.load(PAPER.config, [f"{key}={value}" for key, value in (shared | own).items()])
    return settings, _marked(own)


def _marked(own: dict[str, str]) -> list[str]:
    return [
        f"{key}={value} [{'paper' if (key in STATED_KEYS or (key, value) in STATED_VALUES) else 'ours'}]"
        for key, value in own.items()
    ]


def submit(arms: Sequence[Arm], folder: Path) -> None:
    """Hand every script to sbatch, each to begin after the runs that it needs; raises JobError."""
    numbers: dict[str, str] = {}
    for arm in arms:
        queued = folder / "jobs" / f"{arm.name}.submitted"
        if queued.exists():
            numbers[arm.name] = queued.read_text()
            print(f"{arm.name}: job {numbers[arm.name]} already; to submit it again, remove {queued}")
            continue
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
        write_file(queued, numbers[arm.name].encode())
        print(f"{arm.name}: job {numbers[arm.name]}")


def _speed(settings: Config) -> float:
    """Predicted tokens a second of the fastest layout."""
    return _best(Job.of(settings)).tokens_per_s


@functools.lru_cache
def _best(job: Job) -> Planned:
    return plan(job, NODES * GPUS_A_NODE, GPUS[GPU])[0]
