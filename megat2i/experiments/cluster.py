"""The experiments at the paper's scale: a configuration and a SLURM script for every run, with predicted GPU hours.

Settings that the paper states are marked [paper], the others [ours] (see configs/open_lm_1b_t2i.yaml, which all runs
share). What follows the training (pictures, FID, text probes) is a script on one GPU each.
"""

import functools
import hashlib
import json
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megat2i import config, config_rules
from megat2i.config import Config
from megat2i.data import wordnet
from megat2i.experiments import alignment, jobs
from megat2i.experiments.arms import EXPERIMENTS, LANGUAGE_MODEL, PAPER, Arm, arms_of, is_alignment, length, twins
from megat2i.experiments.evaluations import picture_jobs, probe_job, reference
from megat2i.experiments.miniature import train_list
from megat2i.files import write_file
from megat2i.job_scripts import job_script
from megat2i.planner.hardware import GPUS
from megat2i.planner.layout import Job
from megat2i.planner.ranking import Planned, plan

NODES, GPUS_A_NODE, GPU = 8, 8, "a100-80"  # [paper] 64 A100-80GB
MARGIN = 1.25  # of the predicted time, for SLURM's limit
GUESSED = {"alignment": 1.0, "samples": 4.0, "fid": 1.0, "probe": 1.0}  # hours of what the planner does not know
QUESTIONS = 1000  # of the few-shot probe
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
ALIGNMENT_CONFIG = "configs/paper/alignment.yaml"
STATED_KEYS = ("model.pretrained", "data.mode", "training.trainable", "training.global_batch_size")
STATED_VALUES = (
    ("optimizer.lr", "5e-05"), ("optimizer.lr", "0.0003"), ("training.steps", str(PAPER.steps)),
    ("training.warmup_steps", "2000"),
)  # fmt: skip


@dataclass(frozen=True)
class Files:
    """``folder``: of what comes out; ``data``: of the datasets; ``pretrained``: the converted language model."""

    folder: Path
    data: Path
    pretrained: Path

    def needed(self, experiments: Sequence[str]) -> dict[Path, str]:
        """What must be there before the jobs are, and where it comes from."""
        found = {
            self.pretrained: "tools/convert_checkpoint.py --from open_lm",
            self.data / "train.json": "tools/preprocess_data.py",
            self.data / "valid.json": "tools/preprocess_data.py",
            self.data / "text_valid.idx": "tools/preprocess_text.py, or Megatron's tool",
        }
        if "fig5" in experiments:
            found |= {
                reference(self.folder): 'a line {"prompt", "file"} for each of the 30,000 captions and its picture',
                self.data / "val2014": "the pictures of MS-COCO's validation set of 2014",
                self.data / INCEPTION: "the weights that FID is defined with",
            }
        if "table1" in experiments:
            found[self.data / "wordnet"] = "made by --submit where the package index can be reached"
        return found


@dataclass(frozen=True)
class ClusterJob:
    """One sbatch script, which runs after the jobs ``needs``, on ``nodes`` with ``tasks`` GPUs each, for ``hours``.

    ``template``: of tools/slurm, with its ``variables`` and ``arguments``. ``tokens``, ``settings`` beyond the shared
    configuration with their marks, and ``config``, the file: of training.
    """

    name: str
    template: str
    variables: dict[str, str]
    arguments: tuple[str, ...]
    needs: tuple[str, ...]
    hours: float
    nodes: int = 1
    tasks: int = 1
    tokens: int = 0
    settings: tuple[str, ...] = ()
    config: str = ""

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.nodes * self.tasks

    def script(self, folder: Path) -> str:
        options = {
            "job-name": self.name,
            "nodes": self.nodes,
            "ntasks-per-node": self.tasks,
            "gpus-per-node": self.tasks,
            "time": f"{int(self.hours * MARGIN) + 1}:00:00",
            "output": f"{folder}/jobs/%x-%j.log",
        }
        return job_script(self.template, options, self.variables, self.arguments)

    def digest(self, folder: Path) -> str:
        """Of all that decides what the job does."""
        return hashlib.sha256((self.script(folder) + self.config).encode()).hexdigest()


def write_jobs(experiments: Sequence[str], files: Files, dry_run: bool) -> tuple[list[ClusterJob], str]:
    """Write ``configs/NAME.yaml`` of every run and ``jobs/NAME.sbatch`` of every job; returns the jobs and a summary.

    Raises ConfigError where a run could not be trained, JobError where a submitted job would become another.
    """
    folder = files.folder
    found = [_training(arm, files) for arm in arms_of(PAPER, list(experiments))]
    found += [_evaluation(job) for job in _evaluations(experiments, files)]
    if not dry_run:
        for job in found:
            mark = _mark(job, folder)
            if mark.exists() and json.loads(mark.read_text())["digest"] != job.digest(folder):
                raise jobs.JobError(f"{mark}: was submitted with other settings; scancel that job and remove this file")
        for name in ("configs", "jobs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for job in found:
            write_file(folder / "jobs" / f"{job.name}.sbatch", job.script(folder).encode())
            if job.config:
                write_file(_config_path(job.name, folder), job.config.encode())
    return found, _summary(found, experiments, files)


def _summary(found: Sequence[ClusterJob], experiments: Sequence[str], files: Files) -> str:
    folder = files.folder
    lines = [f"{'job':44}{'tokens':>10}{'hours':>8}{'GPU hours':>11}  settings"]
    for job in found:
        tokens = f"{job.tokens / 1e9:.1f}B" if job.tokens else ""
        lines.append(f"{job.name:44}{tokens:>10}{job.hours:8.1f}{job.gpu_hours:11,.0f}  {', '.join(job.settings)}")
    chosen = "" if set(experiments) == set(EXPERIMENTS) else f" --only {' '.join(experiments)}"
    lines += [
        "",
        f"{sum(job.gpu_hours for job in found):,.0f} GPU hours in all; training on {NODES * GPUS_A_NODE} x {GPU}, by "
        f"the planner's prediction of the fastest layout (tools/plan.py); hours of {', '.join(GUESSED)} are guesses",
        f"configurations: {folder}/configs, SLURM scripts: {folder}/jobs; a run by hand:",
        f"  deepspeed --hostfile HOSTS pretrain_t2i.py --config {folder}/configs/NAME.yaml",
        "what must be there first:",
        *(f"  {path}: {origin}" for path, origin in files.needed(experiments).items()),
        "and at last the figures and the report:",
        f"  python tools/reproduce_paper.py --scale paper --output {folder} --data {files.data} "
        f"--pretrained {files.pretrained} --report{chosen}",
    ]
    return "\n".join(lines) + "\n"


def require_files(experiments: Sequence[str], files: Files) -> None:
    """Raises JobError where something is missing that the jobs need; fetches what the package index has."""
    if "table1" in experiments:
        wordnet.download(files.data / "wordnet")  # compute nodes may not reach the index
    missing = [f"{path} ({origin})" for path, origin in files.needed(experiments).items() if not path.exists()]
    if missing:
        raise jobs.JobError(f"nothing was submitted; missing: {', '.join(missing)}")


def _training(arm: Arm, files: Files) -> ClusterJob:
    settings, marked = settings_of(arm, files)
    nodes, tasks = (1, 1) if is_alignment(arm) else (NODES, GPUS_A_NODE)
    config_rules.validate(settings, nodes * tasks)
    if is_alignment(arm):
        alignment.require(settings, nodes * tasks)
    base = ALIGNMENT_CONFIG if is_alignment(arm) else PAPER.config
    head = "".join(f"# {one}\n" for one in (f"{arm.name}: {base} and", *marked))
    tokens = settings.training.steps * settings.training.global_batch_size * settings.data.sequence_length
    hours = GUESSED["alignment"] if is_alignment(arm) else tokens / _speed(settings) / 3600
    path = str(_config_path(arm.name, files.folder))
    variables = {"CONFIG": path, "RUN": settings.run.dir, "PROGRAM": arm.tool}
    needs = tuple(need for need in arm.needs if need != LANGUAGE_MODEL)  # that is the user's file
    return ClusterJob(
        arm.name,
        "pretrain",
        variables,
        (),
        needs,
        hours,
        nodes,
        tasks,
        tokens,
        tuple(marked),
        head + config.to_yaml(settings),
    )


def _config_path(name: str, folder: Path) -> Path:
    return folder / "configs" / f"{name}.yaml"


def _evaluations(experiments: Sequence[str], files: Files) -> list[jobs.Job]:
    """What follows the training of the twins."""
    found = []
    if "fig5" in experiments:
        protocol = ("--protocol", "coco30k/gigagan", "--inception", files.data / INCEPTION)
        for arm in twins(PAPER):
            found += picture_jobs(arm, files.folder, files.data / "val2014", *protocol)
    if "table1" in experiments:
        found.append(probe_job(twins(PAPER), files.folder, files.pretrained, files.data, QUESTIONS))
    return found


def _evaluation(job: jobs.Job) -> ClusterJob:
    command = tuple(str(word) for word in job.command[1:])  # the cluster's interpreter, whichever prints this
    return ClusterJob(job.name, "evaluate", {}, command, job.needs, GUESSED[job.name.partition("-")[0]])


def settings_of(arm: Arm, files: Files) -> tuple[Config, list[str]]:
    """The configuration of a run at the paper's scale, and its own settings marked as stated or ours."""
    folder, data = files.folder, files.data
    names = {"{pretrained}": str(files.pretrained)}
    names |= {f"{{{need}}}": f"{folder}/runs/{need}/image_embeddings.safetensors" for need in arm.needs}
    own = {key: names.get(value, value) for key, value in (one.split("=", 1) for one in arm.settings)}
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
    shared |= {"data.valid_text": f"{data}/text_valid", "optimizer.engine": "deepspeed"}  # which srun does not imply
    settings = config.load(PAPER.config, [f"{key}={value}" for key, value in (shared | own).items()])
    return settings, _marked(own)


def _marked(own: dict[str, str]) -> list[str]:
    return [
        f"{key}={value} [{'paper' if (key in STATED_KEYS or (key, value) in STATED_VALUES) else 'ours'}]"
        for key, value in own.items()
    ]


def submit(found: Sequence[ClusterJob], folder: Path) -> None:
    """Hand every script to sbatch, each to begin after the jobs that it needs; raises JobError.

    A job that was handed in before is so again only where one that it needs was: it would wait for that one for ever.
    """
    numbers: dict[str, str] = {}
    for job in found:
        needed, mark = [numbers[need] for need in job.needs], _mark(job, folder)
        before = json.loads(mark.read_text()) if mark.exists() else None
        if before and before["needs"] == needed:
            numbers[job.name] = before["job"]
            print(f"{job.name}: job {before['job']} already; to submit it again, remove {mark}")
            continue
        command = ["sbatch", "--parsable", *([f"--dependency=afterok:{':'.join(needed)}"] if needed else [])]
        command.append(str(folder / "jobs" / f"{job.name}.sbatch"))
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise jobs.JobError("sbatch is not there: submit from a machine of a SLURM cluster") from error
        if done.returncode:
            raise jobs.JobError(f"{shlex.join(command)}: {done.stderr.strip()}")
        numbers[job.name] = done.stdout.strip().split(";")[0]
        content = {"job": numbers[job.name], "needs": needed, "digest": job.digest(folder)}
        write_file(mark, json.dumps(content).encode())
        again = f"; scancel {before['job']}, which waits for a job that is gone" if before else ""
        print(f"{job.name}: job {numbers[job.name]}{again}")


def _mark(job: ClusterJob, folder: Path) -> Path:
    return folder / "jobs" / f"{job.name}.submitted.json"


def _speed(settings: Config) -> float:
    """Predicted tokens a second of the fastest layout."""
    return _best(Job.of(settings)).tokens_per_s


@functools.lru_cache
def _best(job: Job) -> Planned:
    return plan(job, NODES * GPUS_A_NODE, GPUS[GPU])[0]
