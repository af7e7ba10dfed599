"""A training that is asked to save, or to save and leave: on all ranks at the same boundary, and nothing is lost by it.

Each rank is a forked process that runs ``pretrain`` with the signals of a real launch; it asks itself or its peers.
"""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401 (optimizers load it when first used: here once instead of in every forked rank)
import torch.distributed as dist
from distributed import run_ranks

from megat2i import save_requests, trainer
from megat2i.checkpoint import committed
from megat2i.interrupt import SIGNALS, leave_on_interrupt, stopped
from megat2i.pretrain import pretrain
from megat2i.runtime import Backend
from megat2i.save_requests import REASONS, SaveRequests

STEPS = 6
TIMES = ("tokens_per_s", "step_s", "mfu")


@pytest.fixture
def launch(run_config, providers, monkeypatch):
    """Function of (run folder, ranks, hook, settings of training) -> what every rank got from ``pretrain``.

    ``hook(rank, step)`` is called on every rank before the batches of ``step`` are read.
    """
    monkeypatch.setattr(Backend, "start", lambda self, seed: None)  # the ranks have met

    def start(run_dir: Path, ranks: int, hook=lambda rank, step: None, **training):
        settings = run_config(run_dir)
        settings = replace(
            settings,
            training=replace(settings.training, steps=STEPS, warmup_steps=2, **training),
            optimizer=replace(settings.optimizer, engine="torch"),
            runtime=replace(settings.runtime, self_test=False, watchdog_s=0.0),
        )
        resume = (run_dir / "config.yaml").exists()

        def on_rank():
            rank = int(os.environ["RANK"])
            dist.destroy_process_group = lambda: None  # ``run_ranks`` does it
            leave_on_interrupt((lambda: stopped(run_dir)) if rank == 0 else None)

            def provide_data(*arguments):
                data = providers[1](*arguments)

                def micro_batches(number):
                    hook(rank, number + 1)
                    return data.micro_batches(number)

                return replace(data, micro_batches=micro_batches)

            _, request = pretrain(settings, resume, (providers[0], provide_data, providers[2]))
            return request and (request.reasons, request.exit_code)

        return run_ranks(ranks, on_rank, timeout=60)

    return start


def once(rank: int, step: int, action):
    """A hook that calls ``action`` on ``rank`` before ``step``, a single time."""
    done = []

    def hook(at_rank: int, at_step: int) -> None:
        if (at_rank, at_step) == (rank, step) and not done:
            done.append(action())

    return hook


def send(number: int):
    """A signal to this process, which has taken it on return."""

    def action() -> None:
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 10
        while number not in SIGNALS.asked and time.monotonic() < deadline:
            time.sleep(0.005)
        assert number in SIGNALS.asked

    return action


def record(run_dir: Path) -> list[dict]:
    """Every line of the record, without what no two runs share."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def saved(run_dir: Path) -> list[str]:
    return [path.name for path in committed(run_dir / "checkpoints")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Function of a launch and a number of ranks -> the record of a run that nobody asked for anything."""
    records = {}

    def get(launch, ranks: int) -> list[dict]:
        if ranks not in records:
            run = tmp_path_factory.mktemp("undisturbed") / "run"
            assert launch(run, ranks) == [None] * ranks
            assert json.loads((run / "finished").read_text()) == {"step": STEPS}
            records[ranks] = record(run)
        return records[ranks]

    return get


@pytest.mark.parametrize(
    ("name", "code", "background"),
    [("SIGINT", 130, False), ("SIGTERM", 0, True), ("SIGUSR1", 0, False)],
)
def test_a_signal_to_one_rank_saves_on_all_at_one_boundary(launch, undisturbed, tmp_path, name, code, background):
    run, number = tmp_path / "run", getattr(signal, name)
    options = {"checkpoint_every": 3, "asynchronous_checkpoints": background}
    assert launch(run, 2, once(1, 3, send(number)), **options) == [([name], code)] * 2
    assert saved(run) == ["step-2"] and record(run)[-1]["step"] == 2  # nothing of step 3 was computed
    told = {"step": 2, "reason": name, "job": None, "restart": None}
    assert json.loads((run / "interrupted").read_text()) == told and not (run / "finished").exists()
    assert launch(run, 2, **options) == [None, None]
    assert not (run / "interrupted").exists() and (run / "finished").exists()
    assert record(run) == undisturbed(launch, 2)


def test_usr2_saves_and_goes_on(launch, undisturbed, tmp_path):
    run = tmp_path / "run"
    assert launch(run, 2, once(1, 3, send(signal.SIGUSR2)), keep_checkpoints=9) == [None, None]
    assert saved(run) == ["step-6", "step-2"] and record(run) == undisturbed(launch, 2)
    assert not (run / "interrupted").exists()


def test_trigger_files_are_taken_and_removed(launch, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(save_requests, "LOOK_EVERY_S", 0.0)
    run = tmp_path / "run"

    def touch(name: str):
        def action() -> None:
            (run / "triggers").mkdir(exist_ok=True)
            (run / "triggers" / name).touch()

        return action

    hooks = once(0, 2, touch("save")), once(0, 4, touch("exit"))
    assert (
        launch(run, 2, lambda *place: [hook(*place) for hook in hooks], keep_checkpoints=9)
        == [(["triggers/exit"], 0)] * 2
    )
    assert saved(run) == ["step-3", "step-1"] and list((run / "triggers").iterdir()) == []
    assert json.loads((run / "interrupted").read_text())["reason"] == "triggers/exit"
    assert launch(run, 2) == [None, None]
    assert record(run) == undisturbed(launch, 2)


def test_the_end_of_the_job_is_foreseen(launch, undisturbed, tmp_path, monkeypatch, capfd):
    """By the job script's word on this job alone, and for the first time before anything was measured."""
    monkeypatch.setattr(save_requests, "LOOK_EVERY_S", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    run = tmp_path / "run"
    path = run / "triggers" / "job_end"
    path.parent.mkdir(parents=True)

    def hook(rank: int, step: int) -> None:
        if rank == 0:
            left = {1: 3600.0, 2: 60.0, 3: 6.0}[step]  # the guess for two saves of a tiny state is 10 s
            path.write_text("{" if step == 2 else json.dumps({"job": "17", "restart": "2", "end": time.time() + left}))

    assert launch(run, 2, hook) == [(["time limit"], 0)] * 2
    assert json.loads((run / "interrupted").read_text()) == {
        "step": 2,
        "reason": "time limit",
        "job": "17",
        "restart": "2",
    }
    assert f"{path}: not readable as JSON" in capfd.readouterr().out
    path.write_text(json.dumps({"job": "16", "restart": "0", "end": 0}))  # of another job
    assert launch(run, 2) == [None, None]
    assert record(run) == undisturbed(launch, 2)


def test_a_state_that_is_saved_already_is_not_written_again(launch, tmp_path, monkeypatch):
    """In the background too: it is committed before the launch says so."""
    run = tmp_path / "run"
    write_file = save_requests.write_file

    def told(path: Path, content: bytes) -> None:
        assert saved(run) == ["step-2"]
        write_file(path, content)

    def save_once(*arguments, save=trainer.checkpoint.save, **options):
        assert not (run / "checkpoints").exists()
        return save(*arguments, **options)

    monkeypatch.setattr(save_requests, "write_file", told)
    monkeypatch.setattr(trainer.checkpoint, "save", save_once)
    options = {"checkpoint_every": 2, "asynchronous_checkpoints": True}
    assert launch(run, 1, once(0, 3, send(signal.SIGTERM)), **options) == [(["SIGTERM"], 0)]
    assert (run / "interrupted").exists()


def test_a_signal_before_the_first_step_is_computed_leaves_nothing_to_save(launch, undisturbed, tmp_path):
    run = tmp_path / "run"
    assert launch(run, 1, once(0, 1, send(signal.SIGUSR1))) == [(["SIGUSR1"], 0)]
    assert saved(run) == [] and json.loads((run / "interrupted").read_text())["step"] == 0
    assert launch(run, 1) == [None]
    assert record(run) == undisturbed(launch, 1)


def test_reserve_is_two_steps_and_two_saves(monkeypatch):
    now, slowest = [100.0], [0.0]
    monkeypatch.setattr(save_requests.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(save_requests, "longest_save", lambda: slowest[0])
    requests = SaveRequests(state_bytes=int(2e9))
    assert requests.reserve_s == 2 * (5 + 10)  # guessed
    assert requests.flags() == [0] * len(REASONS)
    for seconds, expected in ((50.0, 50.0), (2.0, 2.0), (3.0, 3.0), (1.0, 3.0)):  # the first step is slow
        now[0] += seconds
        requests.flags()
        assert requests.reserve_s == pytest.approx(2 * (expected + 15))
    slowest[0] = 7.0
    now[0] += 8.0
    requests.saved(5, 7.0)  # no part of the step
    requests.flags()
    assert requests.reserve_s == pytest.approx(2 * (3 + 7))
