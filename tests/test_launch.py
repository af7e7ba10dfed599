"""Who started this process, and where its ranks meet, by the launcher's environment variables."""

import pytest
from launched import SRUN

from megat2i.config import ConfigError
from megat2i.launch import ALONE, Launch
from megat2i.slurm import port

HOOK = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "61017"}


def test_srun_alone_says_where_the_ranks_meet(environment):
    environment(**SRUN)
    launch = Launch.here("runs/a")
    assert (launch.launcher, launch.host, launch.port) == ("slurm", "n1", port(17, 0, 0))
    assert (launch.name, launch.node) == ("SLURM step 17.0, restart 0", "n2")


def test_what_the_job_script_exports_wins(environment):
    environment(**SRUN, MASTER_ADDR="n1-ib", MASTER_PORT="29500")
    assert (Launch.here().host, Launch.here().port) == ("n1-ib", 29500)
    environment(**SRUN, MASTER_PORT="29500")
    assert (Launch.here().host, Launch.here().port) == ("n1", 29500)


def test_ranks_given_by_a_containers_hook_are_still_tasks_of_srun(environment):
    environment(**SRUN, **HOOK)
    launch = Launch.here()
    assert (launch.launcher, launch.rank, launch.local_rank, launch.port) == ("slurm", 3, 1, 61017)
    assert launch.step.ranks_here == [2, 3]


@pytest.mark.parametrize(("name", "launcher"), [("LOCAL_SIZE", "deepspeed"), ("LOCAL_WORLD_SIZE", "torchrun")])
def test_a_launcher_that_srun_started_is_the_launcher(environment, name, launcher):
    environment(**SRUN, **HOOK | {name: "2", "WORLD_SIZE": "8"})
    launch = Launch.here("runs/a")
    assert (launch.launcher, launch.world_size, launch.name) == (launcher, 8, "run.dir=runs/a")


def test_an_arbitrary_distribution_does_not_say_where_rank_0_is(environment):
    environment(**SRUN | {"SLURM_DISTRIBUTION": "arbitrary"})
    with pytest.raises(ConfigError, match="export MASTER_ADDR"):
        Launch.here()
    environment(**SRUN | {"SLURM_DISTRIBUTION": "arbitrary", "MASTER_ADDR": "n2"})
    assert Launch.here().host == "n2"


def test_nobody_and_a_single_task_are_one_process(environment):
    environment()
    assert Launch.here() == ALONE
    environment(**SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    assert Launch.here() == ALONE


@pytest.mark.parametrize("around", [{}, SRUN | {"SLURM_STEP_NUM_TASKS": "1"}])
def test_mpi_without_a_rank_is_refused(environment, around):
    """Otherwise every process would take itself for a run of one."""
    environment(**around, OMPI_COMM_WORLD_SIZE="4")
    with pytest.raises(ConfigError, match="MPI"):
        Launch.here()
    environment(**around, OMPI_COMM_WORLD_SIZE="1")
    assert Launch.here() == ALONE
