"""How this process was started: by which launcher, as which of how many ranks, and where the ranks meet."""

import os
from dataclasses import dataclass

from megat2i.config import ConfigError
from megat2i.slurm import Step, number


@dataclass(frozen=True)
class Launch:
    """``launcher``: deepspeed | torchrun | slurm | none (a single process).

    ``name`` is equal on all ranks and different between launches that may meet. Rank 0 is reached at ``host`` and
    ``port``; None where nobody said so. ``step`` is of a launch by srun.
    """

    launcher: str
    rank: int
    local_rank: int
    world_size: int
    name: str
    host: str | None = None
    port: int | None = None
    step: Step | None = None

    @staticmethod
    def here(run_dir: str = "") -> "Launch":
        """Read the launcher's environment variables; raises ConfigError where they are broken.

        Launchers other than srun give their launches no name: it is then ``run_dir``, in which only one launch works.
        """
        variables, step = os.environ, Step.here()
        if step and _started_by_srun(step):
            return _by_srun(step)
        if "RANK" in variables and "WORLD_SIZE" in variables:
            return Launch(
                # DeepSpeed's launcher names the number of local ranks LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
                launcher="deepspeed" if "LOCAL_SIZE" in variables else "torchrun",
                rank=number("RANK"),
                local_rank=number("LOCAL_RANK"),
                world_size=number("WORLD_SIZE"),
                name=f"run.dir={run_dir}",
                host=variables.get("MASTER_ADDR"),
                port=number("MASTER_PORT") if "MASTER_PORT" in variables else None,
            )
        for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            if int(variables.get(name, "1")) > 1:
                raise ConfigError(
                    f"started by MPI ({name}={variables[name]}), which sets no RANK: use deepspeed, torchrun or srun"
                )
        return ALONE

    @property
    def alone(self) -> bool:
        """Whether no launcher started this process, so that there is nobody to meet."""
        return self.launcher == "none"

    @property
    def node(self) -> str:
        """The name of this machine for people."""
        return self.step.node if self.step else os.uname().nodename


ALONE = Launch("none", rank=0, local_rank=0, world_size=1, name="")


def _started_by_srun(step: Step) -> bool:
    """Whether the tasks of ``step`` are the ranks; else each of them is another launcher, which starts the ranks.

    A hook of the container may give the tasks their RANK too; only other launchers say how many ranks a machine has.
    """
    variables = os.environ
    if "RANK" not in variables or "WORLD_SIZE" not in variables:
        return True
    same = variables["RANK"] == str(step.rank) and variables["WORLD_SIZE"] == str(step.size)
    return same and not {"LOCAL_SIZE", "LOCAL_WORLD_SIZE"} & variables.keys()


def _by_srun(step: Step) -> Launch:
    variables = os.environ
    if step.arbitrary and "MASTER_ADDR" not in variables:
        raise ConfigError(
            "srun --distribution=arbitrary does not say where rank 0 is: export MASTER_ADDR in the job script, the "
            "node of the first line of SLURM_HOSTFILE"
        )
    return Launch(
        launcher="slurm",
        rank=step.rank,
        local_rank=step.local_rank,
        world_size=step.size,
        name=f"SLURM step {step.name}, restart {step.restart}",
        host=variables.get("MASTER_ADDR") or step.nodes[0],
        port=number("MASTER_PORT") if variables.get("MASTER_PORT") else step.port,
        step=step,
    )
