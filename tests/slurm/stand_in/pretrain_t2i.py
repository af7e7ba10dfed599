"""What the job script sees of a training: arguments, signals, checkpoints and the files of the run folder.

Overrides: ``steps`` of the schedule, ``stop_at``; ``crash_after`` so many steps of a start rank 1 exits with 3;
``handlers=off`` leaves signals and the end of the job to themselves.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

STEP_S = 0.1
overrides = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
run, rank = Path(overrides["run.dir"]), int(os.environ["SLURM_PROCID"])
steps, stop_at = int(overrides.get("steps", 100)), int(overrides.get("stop_at", 10**9))
start = {"job": os.environ["SLURM_JOB_ID"], "restart": os.environ.get("SLURM_RESTART_COUNT", "0")}
crashed = run / "crashed-{job}-{restart}".format(**start)
signals = []
if overrides.get("handlers") != "off":
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(signal.Signals(number).name))


def write(name: str, content: dict) -> None:
    if rank == 0:
        (run / f"{name}.tmp").write_text(json.dumps(content, indent=1))
        (run / f"{name}.tmp").rename(run / name)


def seconds_left() -> float:
    """Of the job, where the job script has told it."""
    path = run / "triggers/job_end"
    if overrides.get("handlers") == "off" or not path.exists():
        return 1e9
    told = json.loads(path.read_text())
    return told["end"] - time.time() if told["job"] == start["job"] else 1e9


def reason() -> str | None:
    """Why to leave now; the first rank decides for all but signals, which each gets itself."""
    if signals:
        return signals[0]
    if rank:
        return "another rank left" if (run / "interrupted").exists() else None
    if (run / "triggers/exit").exists():
        (run / "triggers/exit").unlink()
        return "triggers/exit"
    return "time limit" if seconds_left() < 20 else None


def newest() -> int:
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)


(run / "checkpoints").mkdir(parents=True, exist_ok=True)
assert ("--resume" in sys.argv) == (run / "config.yaml").exists() or rank
write("config.yaml", {})
write(
    "environment.json",
    {"slurm": start | {"nodes": os.environ["SLURM_JOB_NODELIST"]}, "tasks": os.environ["SLURM_NTASKS"]},
)
first = step = newest()
while step < min(steps, stop_at):
    time.sleep(STEP_S)
    step += 1
    why = reason()
    if crashed.exists():  # there is no saving without all ranks
        sys.exit(1)
    if why:
        (run / f"checkpoints/step-{step}").mkdir(exist_ok=True)
        write("interrupted", {"step": step, "reason": why} | start)
        sys.exit(0)
    if rank == 1 and step - first == int(overrides.get("crash_after", -1)):
        crashed.touch()
        sys.exit(3)
if step >= steps:
    write("finished", {"step": step})
