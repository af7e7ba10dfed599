"""A rank that dies is named once with its last words, and the ranks that lose it say nothing of that."""

import multiprocessing
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace

import pytest
from launched import free_port, wait_for_step
from test_watchdog import rank_one

from megat2i import last_words
from megat2i.pretrain import pretrain as pretrain_here

pytestmark = pytest.mark.slow


def raise_error() -> None:
    raise ValueError("row 7 is gone")


def segmentation_fault() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def hurt(run_config, providers, tmp_path):
    """Function of (fault, watchdog's limit) -> (all that two forked ranks say, exit codes).

    Rank 1 meets the ``fault`` when it reads its third batch.
    """
    import torch._dynamo  # noqa: F401 (slow; here once instead of in every rank)

    settings, port = run_config(tmp_path / "run"), free_port()

    def faulty(fault):
        def provide(config, backend, groups):
            data = providers[1](config, backend, groups)

            def micro_batches(step):
                if step == 2 and backend.rank == 1:
                    fault()
                return data.micro_batches(step)

            return replace(data, micro_batches=micro_batches)

        return provide

    def rank(number: int, fault, limit: float) -> None:
        os.dup2(os.open(tmp_path / "log", os.O_CREAT | os.O_APPEND | os.O_WRONLY), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        runtime = replace(settings.runtime, watchdog_s=limit, self_test=False)
        try:
            pretrain_here(replace(settings, runtime=runtime), False, (providers[0], faulty(fault), providers[2]))
        except BaseException as error:  # as the interpreter does outside of multiprocessing
            sys.excepthook(type(error), error, error.__traceback__)
            os._exit(1)

    def run(fault, limit: float = 60.0) -> tuple[str, list[int]]:
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=rank, args=(number, fault, limit)) for number in range(2)]
        for process in processes:
            process.start()
        try:
            deadline = time.monotonic() + 60
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            time.sleep(0.5)  # the speaker is a process of its own
            return (tmp_path / "log").read_text(), [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()

    return run


@pytest.mark.parametrize(
    ("fault", "how", "code"),
    [
        (raise_error, "ValueError: row 7 is gone", 1),
        (segmentation_fault, "killed by a fault (Segmentation fault), its last calls were", -signal.SIGSEGV),
        (killed, "killed by SIGKILL", -signal.SIGKILL),
    ],
)
def test_a_rank_that_dies_is_named_once_and_last(hurt, tmp_path, fault, how, code):
    said, codes = hurt(fault)
    lines = said.splitlines()
    sentence = f"rank 1 on {os.uname().nodename} has ended, step 3, reading data: "
    (place,) = [number for number, line in enumerate(lines) if line.startswith(sentence)]
    known = how if fault is not killed or "left no word" not in lines[place] else "it left no word, as after SIGKILL"
    assert lines[place] == f"{sentence}{known}. --resume continues from the last checkpoint"
    assert codes == [1, code] and "closed by peer" not in said
    assert said.count("Traceback") == int(fault is raise_error)
    assert all(line.startswith("  ") for line in lines[place + 1 :])
    if fault is segmentation_fault:
        assert any("in segmentation_fault" in line for line in lines[place + 1 :])
    if fault is raise_error:
        assert lines[-1] == "  ValueError: row 7 is gone"
    (record,) = (tmp_path / "run").glob("hang/*-ended.txt")
    assert record.read_text().splitlines() == lines[place:]


def test_without_it_the_others_say_that_they_lost_a_peer(hurt):
    """The control: what the sentence stands for."""
    said, _ = hurt(killed, limit=0.0)
    assert last_words.LOST_PEER.search(said) and "Traceback" in said and "has ended" not in said


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_under_a_launcher_the_sentence_is_the_last_line(pretrain, tmp_path, launcher):
    number = {"deepspeed": "--num_accelerators", "torchrun": "--nproc-per-node"}[launcher]
    command = (launcher, number, "2", "--master_port", str(free_port()))
    settings = ("training.steps=100000", "runtime.self_test=false", "optimizer.engine=torch")
    process = pretrain(tmp_path / "run", *settings, launcher=command)
    try:
        wait_for_step(tmp_path / "run", 5, process)
        os.kill(rank_one(process.pid), signal.SIGKILL)
        output, errors = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    sentence = f"rank 1 on {os.uname().nodename} has ended, step "
    assert errors.splitlines()[-1].startswith(sentence) and (output + errors).count(sentence) == 1
    assert "closed by peer" not in output + errors
