"""Checkpoints: exact across layouts and engines; damage, full disks and kills never cost an acknowledged one."""

import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from safetensors import SafetensorError

from megat2i import checkpoint
from megat2i.checkpoint import CheckpointError
from megat2i.loss import ModalityLoss
from megat2i.optim.engine import KINDS, WEIGHT, Fragment
from megat2i.trainer import train_step

LOSS = ModalityLoss((1.0, 1.0, 1.0))


@pytest.fixture
def continue_run(make_training, make_batches, tiny_config):
    """Function of (engine, ranks, dtype, folder, first step or None, steps, save) -> merged state, losses, updates."""

    def on_rank(engine_name, dtype, folder, first, steps, save):
        config = replace(tiny_config, runtime=replace(tiny_config.runtime, dtype=dtype))
        model, engine, groups = make_training(engine_name, config)
        if first is not None:
            found = checkpoint.latest(folder, pytest.fail)
            assert found.step == first
            checkpoint.load_engine(found, engine)
        losses = []
        for step in range(first or 0, (first or 0) + steps):
            batches = make_batches(config, step, groups.data_rank, groups.data_size)
            metrics, norm = train_step(model, engine, batches, LOSS, groups, 1e-2 / (step + 1))
            losses.append((metrics.as_dict(), norm))
        if save:
            checkpoint.save(folder, (first or 0) + steps, engine, groups.layout(), keep=9)
        parts = [(p.kind, p.name, p.start, p.values.numpy().tobytes()) for p in engine.fragments()]
        weights = {name: p.detach().float().numpy().tobytes() for name, p in model.named_parameters()}
        return parts, weights, losses, engine.updates

    def run(engine, ranks, dtype, folder, first, steps, save=True):
        results = run_ranks(ranks, on_rank, engine, dtype, folder, first, steps, save)
        parts = sorted(part for result in results for part in result[0])
        state = {}
        for kind, name, start, data in parts:
            assert len(state.setdefault((kind, name), b"")) == 4 * start
            state[kind, name] += data
        for _, weights, _, updates in results:
            assert weights == results[0][1] and updates == results[0][3]
        return state, *results[0][1:]

    return run


CHAIN = [("deepspeed", 2), ("torch", 1), ("deepspeed", 1), ("torch", 2), ("deepspeed", 2)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_is_bit_equal_across_engines_and_ranks(continue_run, tmp_path, dtype):
    state, weights, _, updates = continue_run("deepspeed", 2, dtype, tmp_path, None, 2)
    assert any(np.frombuffer(values, np.float32).any() for (kind, _), values in state.items() if kind == "exp_avg_sq")
    for engine, ranks in CHAIN[1:]:
        loaded = continue_run(engine, ranks, dtype, tmp_path, 2, 0)  # loads step-2 and writes step-2 again
        assert loaded[0] == state and loaded[1] == weights and loaded[3] == updates == 2
        written_by = checkpoint.open_checkpoint(tmp_path / "step-2").manifest["written_by"]
        assert (written_by["ranks"], written_by["engine"].lower()) == (ranks, f"{engine}engine")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("engine", "ranks"), [("torch", 1), ("torch", 2), ("deepspeed", 1), ("deepspeed", 2)])
def test_a_resumed_run_equals_an_unbroken_one(continue_run, tmp_path, engine, ranks, dtype):
    unbroken = continue_run(engine, ranks, dtype, tmp_path / "a", None, 5, save=False)
    continue_run(engine, ranks, dtype, tmp_path / "b", None, 2)
    resumed = continue_run(engine, ranks, dtype, tmp_path / "b", 2, 3, save=False)
    assert resumed[0] == unbroken[0] and resumed[1] == unbroken[1] and resumed[3] == unbroken[3] == 5
    assert resumed[2] == unbroken[2][2:]
    if (engine, ranks, dtype) == ("torch", 1, "float32"):  # the comparison notices a lost optimizer step
        manifest = tmp_path / "b" / "step-2" / "manifest.json"
        rewrite_manifest(manifest, optimizer_updates=1)
        assert continue_run(engine, ranks, dtype, tmp_path / "b", 2, 3, save=False)[0] != unbroken[0]


def rewrite_manifest(path: Path, **changed) -> None:
    import hashlib

    text = json.dumps(json.loads(json.loads(path.read_text())["manifest"]) | changed)
    path.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": text}))


class FewTensors:
    """Stands for an engine of little state, split over ranks; ``step`` changes all of it."""

    parameters = ("w",)

    def __init__(self, size: int = 300):
        share = size // dist.get_world_size()
        self.size, self.start, self.updates = size, share * dist.get_rank(), 0
        self.values = {kind: torch.zeros(share) for kind in KINDS}

    def expected(self, number: int) -> list[torch.Tensor]:
        places = torch.arange(self.start, self.start + len(self.values[WEIGHT]))
        return [places * 0.5 + number + 1000 * kind for kind in range(len(KINDS))]

    def step(self, number: int) -> None:
        self.updates = number
        for values, new in zip(self.values.values(), self.expected(number), strict=True):
            values.copy_(new)

    def fragments(self):
        return [Fragment("w", kind, (self.size,), self.start, values) for kind, values in self.values.items()]

    def loaded(self, updates: int) -> None:
        for values, new in zip(self.values.values(), self.expected(updates), strict=True):
            assert torch.equal(values, new)


def save_steps(folder: Path, *steps: int, keep: int = 9) -> None:
    engine = FewTensors()
    for step in steps:
        engine.step(step)
        checkpoint.save(folder, step, engine, "1.1.1", keep)


def newest(folder: Path) -> tuple[int | None, list[str]]:
    """Step that ``latest`` gives (its state is loaded and checked), and what it reported."""
    lines: list[str] = []
    found = checkpoint.latest(folder, lines.append)
    if found:
        checkpoint.load_engine(found, FewTensors())
    return found.step if found else None, lines


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_flipped_bit_anywhere_is_noticed(tmp_path, ranks):
    def run():
        save_steps(tmp_path, 2, 4)
        files = sorted((tmp_path / "step-4").iterdir())
        assert len(files) == ranks + 1
        generator = random.Random(0)
        for number in range(60 * len(files)):
            path = files[number % len(files)]
            content = path.read_bytes()
            bit = generator.randrange(8 * len(content))
            dist.barrier()
            if dist.get_rank() == 0:
                damaged = bytearray(content)
                damaged[bit // 8] ^= 1 << bit % 8
                path.write_bytes(damaged)
            dist.barrier()
            step, lines = newest(tmp_path)
            assert step == 2, f"bit {bit} of {path.name} went unnoticed"
            assert len(lines) == 1 and "step-4" in lines[0]
            dist.barrier()
            if dist.get_rank() == 0:
                path.write_bytes(content)
            dist.barrier()
        assert newest(tmp_path) == (4, [])

    run_ranks(ranks, run)


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "longer"])
@pytest.mark.parametrize("file", ["manifest.json", "rank-00000.safetensors"])
def test_a_damaged_file_means_the_checkpoint_before(tmp_path, damage, file):
    def run():
        save_steps(tmp_path, 2, 10)
        path = tmp_path / "step-10" / file
        content = path.read_bytes()
        path.unlink()
        if damage != "missing":
            path.write_bytes({"truncated": content[:-1], "empty": b"", "longer": content + b"x"}[damage])
        step, lines = newest(tmp_path)
        assert step == 2 and str(path.parent) in lines[0]
        shutil.rmtree(tmp_path / "step-2")
        assert newest(tmp_path)[0] is None
        with pytest.raises(CheckpointError, match="step-10"):
            checkpoint.verify(checkpoint.open_checkpoint(tmp_path / "step-10"))

    run_ranks(1, run)


def test_unfinished_folders_and_strangers_are_ignored(tmp_path):
    def run():
        save_steps(tmp_path, 3)
        shutil.copytree(tmp_path / "step-3", tmp_path / "step-9.writing")
        (tmp_path / "step-old").mkdir()
        (tmp_path / "notes.txt").write_text("step-77")
        assert newest(tmp_path) == (3, [])
        save_steps(tmp_path, 9)  # over the half-written one
        assert newest(tmp_path) == (9, []) and not (tmp_path / "step-9.writing").exists()
        assert newest(tmp_path / "nowhere") == (None, [])

    run_ranks(1, run)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    def run():
        save_steps(tmp_path, 3)
        with pytest.raises(CheckpointError, match="shape"):
            checkpoint.load_engine(checkpoint.open_checkpoint(tmp_path / "step-3"), FewTensors(200))
        wider = FewTensors()
        wider.fragments = lambda: [Fragment("v", WEIGHT, (300,), 0, wider.values[WEIGHT])]
        with pytest.raises(CheckpointError, match="elements 0 to 300 of v"):
            checkpoint.load_engine(checkpoint.open_checkpoint(tmp_path / "step-3"), wider)
        rewrite_manifest(tmp_path / "step-3" / "manifest.json", format=2)
        with pytest.raises(CheckpointError, match="format 2"):
            checkpoint.open_checkpoint(tmp_path / "step-3")

    run_ranks(1, run)


@pytest.mark.parametrize(
    ("function", "failing"),  # only the first rank makes the folder
    [("_prepare", 0), *((function, rank) for function in ("save_file", "_write_json", "fsync") for rank in (0, 1))],
)
def test_a_rank_that_cannot_write_fails_all_and_loses_nothing(tmp_path, monkeypatch, function, failing):
    """A full disk, as the writer sees it."""

    def run():
        save_steps(tmp_path, 2)
        before = {path: path.read_bytes() for path in (tmp_path / "step-2").iterdir()}

        def full(*_):
            if function == "save_file":
                raise SafetensorError("I/O error: No space left on device")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            if dist.get_rank() == failing:
                patch.setattr(checkpoint.os if function == "fsync" else checkpoint, function, full)
            with pytest.raises(
                CheckpointError, match="No space left" if dist.get_rank() == failing else "another rank"
            ):
                save_steps(tmp_path, 4)
        dist.barrier()
        assert {path: path.read_bytes() for path in before} == before
        assert newest(tmp_path)[0] == 2
        dist.barrier()
        save_steps(tmp_path, 4)  # the disk has room again
        assert newest(tmp_path) == (4, [])

    run_ranks(2, run, timeout=60)


def test_a_really_full_disk(tmp_path):
    """A file size limit stops the write as a full disk does: in the middle of the file, by the kernel."""

    def run():
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        save_steps(tmp_path, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        with pytest.raises(CheckpointError, match="step-4.writing"):
            save_steps(tmp_path, 4)
        assert newest(tmp_path)[0] == 2

    run_ranks(1, run)


def test_kills_while_saving_never_cost_an_acknowledged_checkpoint(tmp_path):
    acknowledged, generator = tmp_path / "acknowledged", random.Random(1)
    folder, kills, step = tmp_path / "checkpoints", 0, 0

    def saver(first):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        engine = FewTensors(30_000)
        for number in range(first, first + 1000):
            engine.step(number)
            checkpoint.save(folder, number, engine, "1.1.1", keep=2)
            with open(acknowledged, "w") as file:
                file.write(f"{number}.")

    def check(promised):
        lines = []
        found = checkpoint.latest(folder, lines.append)
        assert found is not None and found.step >= promised and lines == []
        for path in checkpoint.committed(folder)[:2]:  # a third one is on its way out
            checkpoint.verify(checkpoint.open_checkpoint(path))
        return found.step

    while kills < 30:
        process = os.fork()
        if process == 0:
            try:
                saver(step + 1)
            finally:
                os._exit(1)
        time.sleep(generator.uniform(0.02, 0.15))
        os.kill(process, signal.SIGKILL)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL, "the saver ended by itself"
        kills += 1
        text = acknowledged.read_text() if acknowledged.exists() else ""
        promised = int(text.removesuffix(".")) if text.endswith(".") else step
        if promised:
            step = run_ranks(1, check, promised)[0]
    assert step > 30, "too few saves between the kills to mean anything"


@pytest.mark.parametrize("keep", [1, 3])
def test_retention_keeps_the_newest(tmp_path, keep):
    def run():
        save_steps(tmp_path, 2, 9, 10, 100, 101, keep=keep)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {f"step-{step}" for step in (10, 100, 101)[3 - keep :]}

    run_ranks(1, run)


def test_retention_never_drops_what_was_just_written_for_a_damaged_one(tmp_path):
    """After a newer checkpoint turned out damaged and the run went on from an older one."""

    def run():
        save_steps(tmp_path, 4, 8)
        (tmp_path / "step-8" / "manifest.json").unlink()
        assert newest(tmp_path)[0] == 4
        save_steps(tmp_path, 5, keep=1)
        assert newest(tmp_path)[0] == 5

    run_ranks(1, run)


def test_loading_unpickles_nothing(tmp_path):
    def run():
        save_steps(tmp_path, 2)
        events = []
        sys.addaudithook(lambda name, _: events.append(name) if name == "pickle.find_class" else None)
        assert newest(tmp_path) == (2, [])
        assert events == []
        import pickle

        pickle.loads(pickle.dumps(Path("x")))
        assert events, "the hook sees nothing"

    run_ranks(1, run)


def test_weights_for_sampling_are_the_rounded_masters(make_training, make_batches, tiny_config, tmp_path):
    def run():
        model, engine, groups = make_training("torch", tiny_config)
        train_step(model, engine, make_batches(tiny_config, 0), LOSS, groups, 1e-2)
        path = checkpoint.save(tmp_path, 1, engine, groups.layout(), keep=1)
        narrow = replace(tiny_config, runtime=replace(tiny_config.runtime, dtype="bfloat16"))
        other, *_ = make_training(None, replace(narrow, model=replace(narrow.model, seed=9)))
        checkpoint.load_weights(checkpoint.open_checkpoint(path), other)
        expected = dict(model.named_parameters())
        return all(torch.equal(p, expected[name].bfloat16()) for name, p in other.named_parameters())

    assert run_ranks(1, run) == [True]
