"""A training of a tiny model as a SLURM job of 2 nodes x 2 ranks, and what its folder says."""

import json
import os
import time
from pathlib import Path

from slurm.private_cluster import ENDED, ClusterError, PrivateCluster

PACED = Path(__file__).parent / "paced"
TIMES = ("tokens_per_s", "step_s", "mfu")


class TrainingJob:
    """tools/slurm/pretrain.sbatch with the real program, whose steps take ``pace_s`` longer (see ``set_pace``)."""

    def __init__(
        self,
        cluster: PrivateCluster,
        script: Path,
        config: Path,
        run_dir: Path,
        *options: str,
        pace_s: float = 0.3,
        **variables: str,
    ):
        self.cluster, self.run_dir, self.work = cluster, run_dir, config.parent
        (self.work / "logs").mkdir(exist_ok=True)
        self.set_pace(pace_s)
        environment = {"CODE": str(PACED), "CONFIG": str(config), "RUN": str(run_dir), "PACE": str(self.work / "pace")}
        environment |= {"ABSENT": str(self.work / "absent")} | variables
        layout = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--time=20", "--signal=USR1@5")
        command = ("sbatch", "--parsable", *layout, *options, str(script))
        self.id = cluster.run(*command, cwd=self.work, environment=environment)

    def set_pace(self, seconds: float) -> None:
        """From the next step on, steps take ``seconds`` longer."""
        new = self.work / "pace.new"
        new.write_text(str(seconds))
        os.replace(new, self.work / "pace")

    def wait_for_steps(self, number: int = 3, seconds: float = 300) -> int:
        """Until this start has made ``number`` steps; the last step."""
        deadline, first = time.monotonic() + seconds, None
        while time.monotonic() < deadline:
            if self.cluster.state(self.id) in ENDED:
                raise ClusterError(f"the job has ended\n{self.log}")
            if self.is_this_start():
                steps = [line["step"] for line in lines(self.run_dir)]
                first = (steps[-1] if steps else 0) if first is None else first
                if steps and steps[-1] >= first + number:
                    return steps[-1]
            time.sleep(0.1)
        raise ClusterError(f"no {number} steps within {seconds} s\n{self.log}")

    def is_this_start(self) -> bool:
        """Whether the newest launch in the run folder is the present start of this job."""
        path = self.run_dir / "environment.json"
        record = json.loads(path.read_text())["slurm"] if path.exists() else {"job": None, "restart": "0"}
        return (record["job"], int(record["restart"])) == (self.id, self.cluster.restarts(self.id))

    def end(self, seconds: float = 300) -> str:
        return self.cluster.wait_for(self.id, ENDED, seconds)

    def ranks(self) -> list[int]:
        """Processes of the ranks, by rank."""
        numbers = {}
        for pid in self.cluster.pids("python", "pretrain_t2i.py", f"run.dir={self.run_dir}"):
            variables = dict(
                entry.split("=", 1) for entry in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in entry
            )
            executable = Path(f"/proc/{pid}/exe").resolve().name
            if executable.startswith("python") and "SLURM_PROCID" in variables and _is_task(pid):
                numbers[int(variables["SLURM_PROCID"])] = pid
        return [numbers[rank] for rank in sorted(numbers)]

    @property
    def log(self) -> str:
        paths = sorted((self.work / "logs").glob(f"*-{self.id}.out"))
        return paths[0].read_text(errors="replace") if paths else ""


def _is_task(pid: int) -> bool:
    """Whether slurmstepd started the process: not a watchdog beside a rank."""
    parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    return "slurmstepd" in Path(f"/proc/{parent}/cmdline").read_text()


def lines(run_dir: Path) -> list[dict]:
    """The record without the times; not a line that is being written."""
    path = run_dir / "metrics.jsonl"
    whole = (
        [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    )
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in whole]


def left(run_dir: Path) -> dict:
    """What the last start left as its reason to leave."""
    return json.loads((run_dir / "interrupted").read_text())
