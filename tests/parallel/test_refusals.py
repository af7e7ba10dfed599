"""Layouts that cannot run, as a user meets them: one sentence, and nothing has started."""

import os
import signal
import socket
import subprocess
from contextlib import suppress

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def refusal(pretrain, tmp_path):
    """Function of (ranks, settings) -> the one sentence with which ``pretrain_t2i.py`` declines to start."""

    def refuse(ranks: int, *arguments: str) -> str:
        options = {}
        if ranks > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            options["launcher"] = ("deepspeed", "--num_accelerators", str(ranks), "--master_port", port)
        process = pretrain(tmp_path / "run", *arguments, **options)
        try:
            output, errors = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
        assert process.returncode != 0, output
        assert "Traceback" not in output + errors
        sentences = {line for line in (output + errors).splitlines() if line.startswith("error: ")}
        assert len(sentences) == 1, output + errors
        assert not (tmp_path / "run").exists()
        return sentences.pop()

    return refuse


def test_a_mesh_for_more_processes_than_there_are(refusal):
    found = refusal(1, "parallel.tensor=2", "parallel.pipeline=2")
    assert found == (
        "error: 1 processes do not divide into parallel.tensor x parallel.pipeline = 2 x 2; start a multiple of 4"
    )


def test_heads_that_do_not_divide(refusal):
    found = refusal(2, "parallel.tensor=2", "model.heads=1")
    assert found == "error: model.heads=1 is not divisible by parallel.tensor=2"


def test_micro_batches_that_do_not_fill_the_virtual_stages(refusal):
    layout = ("parallel.pipeline=2", "parallel.schedule=zero_bubble", "parallel.virtual_stages=2", "model.layers=4")
    found = refusal(2, *layout, "training.global_batch_size=6")
    assert "3 micro-batches a step are not a multiple of parallel.pipeline=2" in found
