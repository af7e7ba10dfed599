"""Submit a training run to SLURM: ``python tools/submit.py CONFIG --nodes N [section.key=value ...]``.

Writes the job script logs/NAME.sbatch and hands it to sbatch. The job runs one task for each GPU and goes on by itself
after a preemption, the time limit, a lost node or a crash, until the run is finished; two starts in a row without a new
checkpoint end it. Submitted again, it continues the run. --dry-run prints the script and the command, and does nothing.

Start it in the folder that the configuration's paths are relative to. SLURM_CONF, SBATCH_ACCOUNT, SBATCH_PARTITION and
the other variables of sbatch count.

    python tools/submit.py configs/mine.yaml --nodes 8 --account vision --partition gpu training.steps=20000
    python tools/submit.py configs/mine.yaml --nodes 8 --container megat2i.sqsh --mounts /data:/data
    scancel --signal=USR1 JOB         # save now, and go on in a new start
    touch runs/mine/triggers/exit     # save now, and end the job
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from megat2i import config, config_rules
from megat2i.config import Config, ConfigError
from megat2i.data.sizes import with_data_sizes
from megat2i.files import DataFileError, write_file
from megat2i.job_scripts import job_script
from megat2i.printable import ArgumentParser

ROOT = Path(__file__).resolve().parents[1]


class SubmitError(RuntimeError):
    """The job was not submitted; the message is one sentence for the user."""


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="set a field of the configuration")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=int, default=8, help="and tasks; 0: there are none (default: 8)")
    parser.add_argument("--tasks-per-node", type=int, help="where --gpus-per-node is 0 (default: 1)")
    parser.add_argument("--cpus-per-task", type=int)
    parser.add_argument("--time", default="24:00:00", metavar="LIMIT", help="of each start (default: 24:00:00)")
    parser.add_argument("--name", help="of the job (default: that of the run folder)")
    parser.add_argument("--account")
    parser.add_argument("--partition")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="of sbatch, such as --sbatch=--qos=high"
    )
    parser.add_argument("--container", metavar="IMAGE", help="run in this image, by pyxis: a .sqsh file or a reference")
    parser.add_argument("--mounts", metavar="FROM:TO[,...]", help="folders in the container; the current one is there")
    parser.add_argument(
        "--launcher",
        choices=("srun", "deepspeed"),
        default="srun",
        help="srun (default): a task for each GPU; deepspeed: DeepSpeed's launcher on each node",
    )
    parser.add_argument(
        "--chain", type=int, metavar="JOBS", help="submit so many jobs that follow each other, where none may requeue"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script and the command for sbatch")
    arguments = parser.parse_intermixed_args()
    if arguments.nodes < 1 or arguments.gpus_per_node < 0 or (arguments.chain or 1) < 1:
        parser.error("--nodes and --chain must be at least 1, --gpus-per-node at least 0")
    if arguments.gpus_per_node and arguments.tasks_per_node not in (None, arguments.gpus_per_node):
        parser.error("there is one task for each GPU: leave --tasks-per-node out")
    if arguments.mounts and not arguments.container:
        parser.error("--mounts needs a --container")
    arguments.tasks = arguments.gpus_per_node or arguments.tasks_per_node or 1
    return arguments


def training_script(arguments: argparse.Namespace, settings: Config, name: str) -> str:
    """The job script of a run."""
    options = {
        "job-name": name,
        "nodes": arguments.nodes,
        "ntasks-per-node": arguments.tasks,
        "gpus-per-node": arguments.gpus_per_node or None,
        "cpus-per-task": arguments.cpus_per_task,
        "time": arguments.time,
    }
    chosen = {
        "CONFIG": str(arguments.config),
        "RUN": settings.run.dir,
        "CODE": str(ROOT),
        "LAUNCHER": arguments.launcher,
        "CONTAINER": arguments.container or "",
        "MOUNTS": arguments.mounts or "",
        "CHAIN": f"{name}-{time.time_ns()}" if arguments.chain else "",
    }
    return job_script("pretrain", options, chosen, arguments.overrides)


def sbatch_command(arguments: argparse.Namespace, script: Path) -> list[str]:
    """How the script is submitted; what belongs to a person or a cluster stands here and in no file."""
    command = ["sbatch", "--parsable"]
    command += [f"--{key}={value}" for key in ("account", "partition") if (value := getattr(arguments, key))]
    command += ["--dependency=singleton"] if arguments.chain else []
    return [*command, *arguments.sbatch, str(script)]


def submit(command: list[str]) -> str:
    """The number of the new job; raises SubmitError."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise SubmitError("sbatch is not there: submit from a machine of a SLURM cluster") from error
    if done.returncode:
        raise SubmitError(f"{shlex.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def main() -> None:
    """Read the command line, check the configuration, write the script and submit it."""
    arguments = parse_arguments()
    settings = with_data_sizes(config.load(arguments.config, arguments.overrides))
    config_rules.validate(settings, arguments.nodes * arguments.tasks)
    name = arguments.name or Path(settings.run.dir).name
    path = Path("logs") / f"{name}.sbatch"
    script, command = training_script(arguments, settings, name), sbatch_command(arguments, path)
    if arguments.dry_run:
        print(f"{script}# {path}, submitted by: {shlex.join(command)}")
        return
    path.parent.mkdir(exist_ok=True)  # sbatch does not make the folder of --output, and the job would fail
    write_file(path, script.encode())
    for _ in range(arguments.chain or 1):
        print(f"job {submit(command)}: {path.parent}/{name}-%j.out, {settings.run.dir}")


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataFileError, SubmitError) as error:
        sys.exit(f"error: {error}")
