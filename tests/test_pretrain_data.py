"""Data that changes between two launches, or under a running training, ends the run on all ranks by one sentence."""

import multiprocessing
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megat2i import checkpoint
from megat2i.config import Config, DatasetConfig
from megat2i.data import verification
from megat2i.data.indexed import IndexedDataset
from megat2i.files import DataFileError
from megat2i.pretrain import pretrain
from megat2i.trainer import RunError

STOP, STEPS = 3, 6


@pytest.fixture
def settings(run_config, tiny_store, text_store, tmp_path) -> Config:
    """A run of STEPS steps on a copy of the tiny store, with a held-out one and one of text alone."""
    shutil.copytree(tiny_store, tmp_path / "data")
    config = run_config(tmp_path / "run")
    held_out = {"valid": str(tmp_path / "data/valid"), "valid_text": str(tmp_path / "data/prose/valid")}
    return replace(
        config,
        data=replace(config.data, train=[DatasetConfig(str(tmp_path / "data/train"))], **held_out),
        training=replace(config.training, steps=STEPS, evaluate_every=0),
        optimizer=replace(config.optimizer, engine="torch"),
        runtime=replace(config.runtime, self_test=False),
    )


@pytest.fixture
def launch(providers):
    """Function of (ranks, settings, resume, before a step) -> what ended each rank: "" or its one sentence."""

    def run(ranks: int, settings: Config, resume: bool = False, before: Callable[[int], None] = lambda step: None):
        context, port = multiprocessing.get_context("fork"), free_port()
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        arguments = [(rank, ranks, port, pipes[rank][1], settings, resume, providers, before) for rank in range(ranks)]
        processes = [context.Process(target=one_rank, args=each) for each in arguments]
        for process in processes:
            process.start()
        said = [reader.recv() if reader.poll(100) else "nothing" for reader, _ in pipes]
        for process in processes:
            process.join(20)
            process.kill()
        return said

    return run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def one_rank(rank, ranks, port, writer, settings, resume, providers, before) -> None:
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    model, provide_data, loss = providers

    def data(*arguments):
        given = provide_data(*arguments)

        def micro_batches(step):
            before(step + 1)
            return given.micro_batches(step)

        return replace(given, micro_batches=micro_batches)

    try:
        pretrain(settings, resume, (model, data, loss))
        writer.send("")
    except (DataFileError, RunError) as error:  # what the command line turns into one line
        writer.send(str(error))


def stopped(settings: Config) -> Config:
    return replace(settings, training=replace(settings.training, stop_at=STOP))


def other_codes(prefix: Path) -> None:
    """Every image code, or every id of a text, becomes another of the vocabulary."""
    store = IndexedDataset(prefix)
    tokens, is_code = store.read(0, store.token_count), np.ones(store.token_count, bool)
    if store.modes is not None:
        is_code = np.repeat(store.modes == 1, store.lengths)
    tokens[is_code] = (tokens[is_code] + 7) % 40
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())


def assert_refused(said: list[str], file: str) -> None:
    assert len(set(said)) == 1, said
    assert said[0].startswith(f"{file}: ") and "\n" not in said[0] and "--resume" in said[0], said


@pytest.mark.parametrize(
    ("ranks", "split", "manifest"),
    [
        (2, "train", True),
        (2, "train", False),
        (1, "prose/valid", False),
        pytest.param(1, "train", True, marks=pytest.mark.full),
        pytest.param(1, "valid", True, marks=pytest.mark.full),
    ],
)
def test_a_resumed_run_refuses_other_tokens_of_the_same_size(launch, settings, tmp_path, ranks, split, manifest):
    prefix = tmp_path / "data" / split
    if not manifest:
        Path(f"{prefix}.json").unlink()
    assert launch(ranks, stopped(settings)) == [""] * ranks
    other_codes(prefix)
    assert_refused(launch(ranks, settings, resume=True), f"{prefix}.bin")
    assert [path.name for path in checkpoint.committed(tmp_path / "run/checkpoints")] == [f"step-{STOP}"]
    if (split, manifest) == ("train", False):  # on other ranks too, and the way out works
        assert_refused(launch(1, settings, resume=True), f"{prefix}.bin")
        shutil.rmtree(tmp_path / "run" / verification.FOLDER)
        assert launch(ranks, settings, resume=True) == [""] * ranks


def test_damaged_tokens_are_refused_before_the_first_step(launch, settings, tmp_path):
    other_codes(tmp_path / "data/train")
    assert_refused(launch(2, settings), f"{tmp_path / 'data/train'}.bin")
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize(("ranks", "size"), [(2, 100), *(pytest.param(n, 0, marks=pytest.mark.full) for n in (1, 2))])
def test_tokens_that_are_cut_off_under_a_running_training(launch, settings, tmp_path, ranks, size):
    path = tmp_path / "data/train.bin"
    original = path.read_bytes()

    def cut(step: int) -> None:
        if step == STOP + 1 and os.environ.get("RANK", "0") == "0":
            os.truncate(path, size)

    settings = replace(settings, training=replace(settings.training, steps=2000, checkpoint_every=STOP))
    said = launch(ranks, settings, before=cut)
    assert_refused(said, str(path))
    assert f"{size} bytes, {len(original)} when it was opened" in said[0]
    path.write_bytes(original)
    settings = replace(settings, training=replace(settings.training, stop_at=STOP + 2))
    assert launch(ranks, settings, resume=True) == [""] * ranks


def test_tokens_that_are_overwritten_under_a_running_training(launch, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "LOOK_EVERY", 0.01)

    def overwrite(step: int) -> None:
        if step == 2 and os.environ["RANK"] == "1":
            other_codes(tmp_path / "data/train")

    settings = replace(settings, training=replace(settings.training, steps=5000))
    said = launch(2, settings, before=overwrite)
    assert_refused(said, f"{tmp_path / 'data/train'}.bin")
    assert "differ from the manifest's digest" in said[0] and "Checkpoints after step 0 may have been" in said[0]


def test_an_id_that_one_rank_alone_cannot_use_ends_all(launch, settings, tmp_path):
    """Its file has no manifest and was never sound, so the digests have nothing to say."""
    prefix = tmp_path / "data/train"
    Path(f"{prefix}.json").unlink()
    store = IndexedDataset(prefix)
    tokens = store.read(0, store.token_count)
    tokens[-1] = 60_000
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    said = launch(2, settings)
    assert len(set(said)) == 1 and "image codes from" in said[0] and "to 60000" in said[0], said
