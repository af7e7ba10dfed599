"""Other processes of this machine: whether one still lives, and which of them started this one.

A number alone does not name a process, since numbers are given again: the time of its start goes with it.
"""

import os
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("deepspeed", "ds", "torchrun")
REMOTE_SHELL = "sshd"
SLURM_STEP_DAEMON = "slurmstepd"  # starts the tasks of one machine, and is the only one to end them
DEEPSPEED_LAUNCH = "deepspeed.launcher.launch"  # starts the ranks of one machine
MODULES = (DEEPSPEED_LAUNCH, "deepspeed.launcher.runner", "torch.distributed.run", "torch.distributed.launch")
ENDED = ("Z", "X")  # states in proc(5); the parent may not have asked for the exit code yet


@dataclass(frozen=True)
class Process:
    """A process by its ``pid`` and the clock tick since boot at which it ``started``."""

    pid: int
    started: int

    @staticmethod
    def of(pid: int) -> "Process | None":
        """The process that has the number ``pid`` now; None where there is none, or one that has ended."""
        fields = _stat(pid)
        return None if fields is None or fields[0] in ENDED else Process(pid, int(fields[19]))

    @property
    def alive(self) -> bool:
        return Process.of(self.pid) == self

    @property
    def parent(self) -> "Process | None":
        """None where it has none, or has ended itself."""
        fields = _stat(self.pid)
        return Process.of(int(fields[1])) if fields else None

    @property
    def command(self) -> list[str]:
        try:
            return Path(f"/proc/{self.pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            return []

    @property
    def module(self) -> str | None:
        """What ``python -m`` runs."""
        words = self.command[:5]
        return words[words.index("-m") + 1] if "-m" in words[:4] else None

    @property
    def is_launcher(self) -> bool:
        """Whether it is DeepSpeed's launcher or torchrun: the script itself, or its interpreter and then the script."""
        return self.module in MODULES or any(Path(word).name in PROGRAMS for word in self.command[:2])

    @property
    def is_orphan(self) -> bool:
        """Whether its parent ended before it: the system then gives it another one, of another session."""
        fields, parent = _stat(self.pid), self.parent
        if fields is None or parent is None:
            return fields is None or fields[1] != "0"  # 0: the first process of a container has none that it sees
        above = _stat(parent.pid)
        return above is None or fields[3] not in (str(self.pid), above[3])

    @property
    def has_terminal(self) -> bool:
        fields = _stat(self.pid)
        return fields is not None and fields[4] != "0"


def launchers_above() -> list[Process] | None:
    """The processes that a launch of several ranks stands or falls with, the nearest first.

    Empty where neither DeepSpeed, torchrun nor SLURM started this process; None where DeepSpeed's launcher or torchrun
    has ended already.
    """
    if not {"LOCAL_SIZE", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        return _slurm_step_daemon()
    myself = Process.of(os.getpid())
    ancestors = _ancestors(myself)
    # The parent is one whatever its command line says: these variables are of ranks alone.
    last = max((number for number, ancestor in enumerate(ancestors) if ancestor.is_launcher), default=0)
    chain = ancestors[: last + 1]
    afar = bool(chain) and chain[-1].module == DEEPSPEED_LAUNCH and not chain[-1].has_terminal
    if any(process.is_orphan for process in (myself, *(chain if afar else chain[:-1]))):
        return None
    if afar:  # by a remote shell, which ends with the connection
        shells = [number for number, one in enumerate(ancestors) if one.command[0].startswith(REMOTE_SHELL)]
        chain = ancestors[: shells[0] + 1] if shells else chain
    return chain


def _ancestors(process: Process) -> list[Process]:
    """The processes above ``process``, its parent first."""
    ancestors = []
    parent = process.parent
    while parent is not None:
        ancestors.append(parent)
        parent = parent.parent
    return ancestors


def _slurm_step_daemon() -> list[Process]:
    """The slurmstepd above a task of srun, alone in a list; empty where there is none or it cannot be seen."""
    if "SLURM_PROCID" not in os.environ:
        return []
    ancestors = _ancestors(Process.of(os.getpid()))
    return [ancestor for ancestor in ancestors if " ".join(ancestor.command).startswith(SLURM_STEP_DAEMON)][:1]


def missing_siblings() -> bool:
    """Whether a rank that the same launcher started on this machine has ended; False where that cannot be told."""
    size = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1"
    parent = os.getppid()
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:
        return False
    launched = str(os.getpid()) in children and size.isdecimal()  # else the launcher itself has ended
    return launched and sum(Process.of(int(child)) is not None for child in children) < int(size)


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on; None where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()  # the name before it may hold anything
