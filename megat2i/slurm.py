"""What SLURM tells a process through its environment variables: its job, and its place in a step that srun started."""

import itertools
import os
import re
from dataclasses import dataclass

from megat2i.config import ConfigError

# Above IANA's registered ports and above the ports that Linux gives to outgoing connections (32768 to 60999 unless an
# administrator changes it). Every rank must come to the same port, so no node's own setting decides.
FIRST_PORT, PORTS = 61000, 4536
NODE_LIST = re.compile(r"GROUP(,GROUP)*".replace("GROUP", r"([^\s,\[\]]+|\[[^\s\[\]]+\])+"))
RANGE = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)


@dataclass(frozen=True)
class Step:
    """The task ``rank`` of a job step, on one of its ``nodes``. ``name``: as SLURM writes it, JOB.STEP.

    ``restart``: how often the job was requeued. ``port``: where the ranks meet. ``ranks_here``: all tasks on this node.
    """

    name: str
    restart: int
    port: int
    nodes: list[str]
    node: str
    rank: int
    local_rank: int
    size: int
    ranks_here: list[int]

    @staticmethod
    def here() -> "Step | None":
        """The step of this process; None outside of one with several tasks. Raises ConfigError for broken variables."""
        if "SLURM_STEP_ID" not in os.environ or os.environ.get("SLURM_STEP_NUM_TASKS") == "1":
            return None
        job, step, rank, local_rank = (number(f"SLURM_{name}") for name in ("JOB_ID", "STEP_ID", "PROCID", "LOCALID"))
        restart = number("SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in os.environ else 0
        nodes = node_names(os.environ.get("SLURM_STEP_NODELIST", ""))
        ranks_here = os.environ.get("SLURM_GTIDS", "")
        return Step(
            name=f"{job}.{step}",
            restart=restart,
            port=port(job, step, restart),
            nodes=nodes,
            node=os.environ.get("SLURMD_NODENAME", nodes[0]),
            rank=rank,
            local_rank=local_rank,
            size=number("SLURM_STEP_NUM_TASKS"),
            ranks_here=[int(text) for text in ranks_here.split(",") if text.isdecimal()],
        )

    @property
    def arbitrary(self) -> bool:
        """Whether the first task may be on any node of the list, not only on its first one."""
        return os.environ.get("SLURM_DISTRIBUTION", "").startswith("arbitrary")


def port(job: int, step: int, restart: int) -> int:
    """The port at which the ranks meet: for any 140 successive jobs, 4 steps and 8 restarts all differ."""
    return FIRST_PORT + (job + 1135 * step + 1559 * restart) % PORTS


def node_names(node_list: str) -> list[str]:
    """``n[08-10],m[1,3]-ib`` -> n08, n09, n10, m1-ib, m3-ib, as ``scontrol show hostnames`` does it."""
    if not NODE_LIST.fullmatch(node_list):
        raise _no_list(node_list)
    names = []
    for group in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", node_list):
        pieces = re.split(r"\[([^\]]*)\]", group)  # text, ranges, text, ranges, ..., text
        choices = [_numbers(piece, node_list) if odd % 2 else [piece] for odd, piece in enumerate(pieces)]
        names += ["".join(choice) for choice in itertools.product(*choices)]
    return names


def _numbers(ranges: str, node_list: str) -> list[str]:
    """``08-10,3`` -> 08, 09, 10, 3."""
    numbers = []
    for part in ranges.split(","):
        limits = RANGE.fullmatch(part)
        if not limits or int(limits[2] or limits[1]) < int(limits[1]):
            raise _no_list(node_list)
        values = range(int(limits[1]), int(limits[2] or limits[1]) + 1)
        numbers += [str(value).zfill(len(limits[1])) for value in values]
    return numbers


def _no_list(node_list: str) -> ConfigError:
    return ConfigError(
        f"SLURM_STEP_NODELIST is {node_list!r}, expected a list of nodes such as n[01-16]: leave the SLURM_* variables "
        "as srun sets them"
    )


def number(name: str) -> int:
    """The value of an environment variable that a launcher sets; raises ConfigError where it is no number."""
    value = os.environ.get(name)
    if value is None or not re.fullmatch(r"\d+", value, re.ASCII):
        raise ConfigError(f"the launcher's environment variable {name} is {value!r}, expected a number")
    return int(value)


def job_record() -> dict | None:
    """What ``environment.json`` says of the job, in SLURM's own words; None outside of one."""
    variables = os.environ
    if "SLURM_JOB_ID" not in variables:
        return None
    return {
        "job": variables["SLURM_JOB_ID"],
        "step": variables.get("SLURM_STEP_ID"),
        "restart": variables.get("SLURM_RESTART_COUNT", "0"),
        "nodes": variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST"),
    }
