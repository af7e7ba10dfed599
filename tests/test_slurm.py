"""Node lists as ``scontrol show hostnames`` expands them, and what a step says of its tasks."""

import pytest
from launched import SRUN

from megat2i.config import ConfigError
from megat2i.slurm import FIRST_PORT, PORTS, Step, job_record, node_names, port

# Printed by scontrol 22.05.8; those with text behind the last brackets, which it refuses, follow the same rule.
EXPANDED = {
    "n1": "n1",
    "n[1-2]": "n1 n2",
    "n[5]": "n5",
    "n[9-11]": "n9 n10 n11",
    "n[09-11]": "n09 n10 n11",
    "n[099-101]": "n099 n100 n101",
    "n[0008-0010]": "n0008 n0009 n0010",
    "n[01-03,7],m3": "n01 n02 n03 n7 m3",
    "n[01-2]": "n01 n02",
    "n[1-02]": "n1 n2",
    "n1,n1,n0": "n1 n1 n0",
    "a,b[1-2],c": "a b1 b2 c",
    "n1-2": "n1-2",
    "a[1-2]b[3-4]": "a1b3 a1b4 a2b3 a2b4",
    "n[1-2][3-4]": "n13 n14 n23 n24",
    "n[1,3-4,10]-r[2-3],login": "n1-r2 n1-r3 n3-r2 n3-r3 n4-r2 n4-r3 n10-r2 n10-r3 login",
    "10.0.0.[1-2]": "10.0.0.1 10.0.0.2",
    "n[1-2,5].cluster": "n1.cluster n2.cluster n5.cluster",
    "r[1-2]n[01-02]-ib,x": "r1n01-ib r1n02-ib r2n01-ib r2n02-ib x",
}


@pytest.mark.parametrize("node_list", EXPANDED)
def test_node_lists_are_expanded_as_scontrol_does(node_list):
    assert node_names(node_list) == EXPANDED[node_list].split()


@pytest.mark.parametrize(
    "broken", ["", "n[1-2", "n1]", "n[]", "n[a-b]", "n[1-a]", "n[2-1]", "n1,", ",n1", "n[1-2-3]", "n 1"]
)
def test_a_broken_node_list_is_one_sentence(broken):
    with pytest.raises(ConfigError, match="SLURM_STEP_NODELIST is .* expected a list of nodes"):
        node_names(broken)


def test_ports_are_outside_those_of_outgoing_connections_and_differ_between_neighbors():
    """Also where the same node is given to jobs that follow each other, and where a job is requeued."""
    places = [(job, step, restart) for job in range(4000, 4140) for step in range(4) for restart in range(8)]
    ports = [port(*place) for place in places]
    assert len(set(ports)) == len(places)
    assert all(61000 == FIRST_PORT <= number < FIRST_PORT + PORTS == 65536 for number in ports)
    assert port(10**9, 4294967290, 10**6) in range(FIRST_PORT, FIRST_PORT + PORTS)


def test_a_step_that_was_requeued(environment):
    environment(**SRUN, SLURM_RESTART_COUNT="2")
    step = Step.here()
    assert (step.name, step.restart, step.port) == ("17.0", 2, port(17, 0, 2))
    assert (step.nodes, step.node, step.ranks_here) == (["n1", "n2"], "n2", [2, 3])
    assert (step.rank, step.local_rank, step.size) == (3, 1, 4)


@pytest.mark.parametrize("change", [{"SLURM_STEP_ID": None}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_a_batch_script_and_a_single_task_are_no_step(environment, change):
    environment(**{name: value for name, value in (SRUN | change).items() if value})
    assert Step.here() is None


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"])
@pytest.mark.parametrize("value", ["x", "", "-1", "٣"])
def test_a_broken_variable_is_named(environment, name, value):
    environment(**SRUN | {name: value})
    with pytest.raises(ConfigError, match=f"{name} is '{value}', expected a number"):
        Step.here()


def test_the_record_of_a_job(environment):
    environment()
    assert job_record() is None
    environment(**SRUN, SLURM_RESTART_COUNT="1")
    assert job_record() == {"job": "17", "step": "0", "restart": "1", "nodes": "n[1-2]"}
    environment(SLURM_JOB_ID="17", SLURM_JOB_NODELIST="n[1-4]")  # a batch script without srun
    assert job_record() == {"job": "17", "step": None, "restart": "0", "nodes": "n[1-4]"}
