"""Node lists by the hundred against SLURM's own reading of them."""

import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megat2i.slurm import node_names

CONFIGURATION = "ClusterName=x\nSlurmctldHost=localhost\nNodeName=n1\nPartitionName=p Nodes=ALL\n"

numbers = st.integers(0, 120)
names = st.from_regex(r"[a-z]([a-z0-9.-]{0,3}[a-z.-])?", fullmatch=True)


@st.composite
def ranges(draw) -> str:
    """Such as ``[1-2,07,0008-0010]``: single numbers and ranges, each with its own leading zeros."""
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        first, count, width = draw(numbers), draw(st.integers(0, 12)), draw(st.integers(1, 5))
        part = f"{first:0{width}}"
        parts.append(f"{part}-{first + count:0{width}}" if count else part)
    return f"[{','.join(parts)}]"


@st.composite
def node_lists(draw) -> str:
    """Several groups of up to two bracketed parts; this scontrol knows no text behind the last brackets."""
    groups = []
    for _ in range(draw(st.integers(1, 4))):
        pieces = [draw(names)]
        for number in range(draw(st.integers(0, 2))):
            pieces += [draw(st.sampled_from(["", "-r", "x"])) if number else "", draw(ranges())]
        groups.append("".join(pieces))
    return ",".join(groups)


@pytest.fixture(scope="module")
def scontrol(tmp_path_factory):
    """Function of (what to show, list) -> what ``scontrol`` prints; it asks no daemon."""
    if not shutil.which("scontrol"):
        pytest.skip("scontrol is not installed (Debian: slurm-client)")
    configuration = tmp_path_factory.mktemp("slurm") / "slurm.conf"
    configuration.write_text(CONFIGURATION)

    def show(what: str, text: str) -> list[str]:
        command = ["scontrol", "show", what, text]
        return subprocess.check_output(command, text=True, env={"SLURM_CONF": str(configuration)}).split()

    return show


def test_generated_lists_are_read_as_scontrol_reads_them(scontrol):
    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(node_lists())
    def compare(node_list):
        assert node_names(node_list) == scontrol("hostnames", node_list)

    compare()


def test_lists_that_slurm_writes_are_read_back(scontrol):
    """As in SLURM_STEP_NODELIST: names of nodes, folded by SLURM itself."""

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(node_lists())
    def compare(node_list):
        nodes = node_names(node_list)
        [folded] = scontrol("hostlist", ",".join(nodes))
        assert node_names(folded) == scontrol("hostnames", folded)
        assert sorted(node_names(folded)) == sorted(nodes)

    compare()
