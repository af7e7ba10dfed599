"""Jobs of commands that need each other: run side by side, shown in one progress view, gone on with after any stop."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megat2i.files import write_file
from megat2i.interrupt import INTERRUPTED, end_with_parent
from megat2i.progress import Progress

LAST_LINES = 12  # of a failed job's log in the error
POLL_S = 0.2


class JobError(RuntimeError):
    """A job that failed, or was done otherwise; the message says what to do."""


@dataclass(frozen=True)
class Job:
    """``command`` makes ``output``, a folder or file, from what ``needs`` made and from the files ``inputs``.

    ``steps``: of a training run, whose folder ``output`` is: it resumes where it was. ``goes_on``: the command itself
    goes on with what is there. Any other output is removed before the command starts, since it may be half of one.
    """

    name: str
    command: tuple[str, ...]
    output: Path
    needs: tuple[str, ...] = ()
    steps: int = 0
    inputs: tuple[Path, ...] = ()
    goes_on: bool = False

    def resumed_command(self) -> tuple[str, ...]:
        return (*self.command, "--resume") if self.steps and (self.output / "config.yaml").exists() else self.command

    def steps_done(self) -> int:
        """Steps that the run's record has; 0 for a job that is no training run."""
        record = self.output / "metrics.jsonl"
        if not self.steps or not record.exists():
            return 0
        with open(record, "rb") as file:
            file.seek(max(0, record.stat().st_size - 4096))
            lines = file.read().split(b"\n")[:-1]  # what follows the last newline is still being written
        try:
            return json.loads(lines[-1])["step"] if lines else 0
        except (ValueError, KeyError):  # a line longer than what was read
            return 0


def run_jobs(jobs: Sequence[Job], folder: Path, workers: int) -> None:
    """Run what is not done yet, ``workers`` at a time in the order given; logs and marks of completion in ``folder``.

    Every job gets its share of the cores. Raises JobError, after the jobs under way were stopped; they also end where
    this process is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = {job.name for job in jobs if _is_done(job, folder)}
    waiting = [job for job in jobs if job.name not in done]
    running: dict[str, tuple[Job, subprocess.Popen, float]] = {}
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    before = sum(job.steps for job in jobs if job.name in done)
    bar = Progress(sum(job.steps for job in jobs), "jobs", "steps", before)
    try:
        while waiting or running:
            for job in [job for job in waiting if done.issuperset(job.needs)][: workers - len(running)]:
                waiting.remove(job)
                running[job.name] = job, _start(job, folder, environment), time.monotonic()
            time.sleep(POLL_S)
            for job, process, began in list(running.values()):
                if process.poll() is None:
                    continue
                del running[job.name]
                if process.returncode:
                    raise JobError(_failure(job, process.returncode, folder))
                if job.steps and (job.output / INTERRUPTED).exists():  # saved and left, which is no failure of its own
                    raise JobError(
                        f"{job.name} was asked to end before its last step. The same command goes on from there"
                    )
                seconds = {"seconds": time.monotonic() - began}
                write_file(_mark(job, folder), json.dumps(_made_from(job, folder) | seconds).encode())
                done.add(job.name)
            steps = sum(job.steps if job.name in done else job.steps_done() for job in jobs)
            bar.what = f"{len(done)} of {len(jobs)} jobs"
            bar.note(", ".join(running))
            bar.update(steps - bar.done)
    finally:
        bar.close()
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()


def require_done(jobs: Sequence[Job], folder: Path) -> None:
    """Raises JobError where one of ``jobs`` was not finished by ``run_jobs``, or not as it stands here."""
    for job in jobs:
        if not _is_done(job, folder):
            raise JobError(f"{job.name} is not finished: run this experiment first")


def seconds_of(job: Job, folder: Path) -> float | None:
    """How long the launch that finished ``job`` took; None where it is not finished."""
    mark = _mark(job, folder)
    return json.loads(mark.read_text())["seconds"] if mark.exists() else None


def _start(job: Job, folder: Path, environment: dict) -> subprocess.Popen:
    if not job.steps and not job.goes_on and job.output.exists():
        shutil.rmtree(job.output) if job.output.is_dir() else job.output.unlink()
    with open(folder / f"{job.name}.log", "ab") as log:
        command = job.resumed_command()
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, preexec_fn=end_with_parent
        )


def _mark(job: Job, folder: Path) -> Path:
    return folder / f"{job.name}.done.json"


def _made_from(job: Job, folder: Path) -> dict:
    """All that decides what the job makes: its command, its inputs, and what those before it were made from."""
    inputs = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in job.inputs}
    before = {}
    for need in job.needs:
        mark = json.loads((folder / f"{need}.done.json").read_text())
        del mark["seconds"]
        before[need] = hashlib.sha256(json.dumps(mark).encode()).hexdigest()
    return {"command": list(job.command), "inputs": inputs, "needs": before}


def _is_done(job: Job, folder: Path) -> bool:
    mark = _mark(job, folder)
    if not mark.exists() or not all((folder / f"{need}.done.json").exists() for need in job.needs):
        return False
    made, now = json.loads(mark.read_text()), _made_from(job, folder)
    different = [key for key in now if made.get(key) != now[key]]
    if different:
        raise JobError(
            f"{mark}: {job.name} was done with other {', '.join(different)}; remove {folder.parent} to begin anew, or "
            "give the same options and files as before"
        )
    if not job.output.exists():
        raise JobError(f"{job.output}: made by {job.name} and gone since; remove {mark} to make it again")
    return True


def _failure(job: Job, code: int, folder: Path) -> str:
    log = folder / f"{job.name}.log"
    last = "\n  ".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
    return f"{job.name} ended with exit code {code}; {log} ends with\n  {last}\nThe same command goes on from there."
