"""Real engines: state is bit-equal after other engines and numbers of ranks, and training goes on as if unbroken."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from distributed import run_ranks
from numbered_engine import rewrite_manifest

from megat2i import checkpoint
from megat2i.loss import ModalityLoss
from megat2i.trainer import train_step

LOSS = ModalityLoss((1.0, 1.0, 1.0))


@pytest.fixture
def continue_run(make_training, make_batches, tiny_config):
    """Function of (engine, ranks, dtype, folder, first step or None, steps, save) -> merged state, losses, updates."""

    def on_rank(engine_name, dtype, folder, first, steps, save):
        config = replace(tiny_config, runtime=replace(tiny_config.runtime, dtype=dtype))
        pipeline, engine, groups = make_training(engine_name, config)
        if first is not None:
            found = checkpoint.latest(folder, pytest.fail)
            assert found.step == first
            checkpoint.load_engine(found, engine)
        losses = []
        for step in range(first or 0, (first or 0) + steps):
            batches = make_batches(config, step, groups.data_rank, groups.data_size)
            metrics, norm = train_step(pipeline, engine, batches, LOSS, groups, 1e-2 / (step + 1))
            losses.append((metrics.as_dict(), norm))
        if save:
            checkpoint.save(folder, (first or 0) + steps, engine, groups.layout(), keep=9)
        written = [part for part in engine.fragments() if part.written]
        parts = [(part.kind, part.name, part.start, part.values.numpy().tobytes()) for part in written]
        weights = {name: p.detach().float().numpy().tobytes() for name, p in pipeline.model.named_parameters()}
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


def test_weights_for_sampling_are_the_rounded_masters(make_training, make_batches, tiny_config, tmp_path):
    def run():
        pipeline, engine, groups = make_training("torch", tiny_config)
        train_step(pipeline, engine, make_batches(tiny_config, 0), LOSS, groups, 1e-2)
        path = checkpoint.save(tmp_path, 1, engine, groups.layout(), keep=1).path
        narrow = replace(tiny_config, runtime=replace(tiny_config.runtime, dtype="bfloat16"))
        other = make_training(None, replace(narrow, model=replace(narrow.model, seed=9)))[0].model
        checkpoint.load_weights(checkpoint.open_checkpoint(path), other)
        expected = dict(pipeline.model.named_parameters())
        return all(torch.equal(p, expected[name].bfloat16()) for name, p in other.named_parameters())

    assert run_ranks(1, run) == [True]
