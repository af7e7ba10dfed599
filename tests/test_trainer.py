"""A training step is the same whatever the number of ranks, micro-batches and engine; the loop around it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from megat2i import trainer
from megat2i.config import LossConfig
from megat2i.files import DataFileError
from megat2i.loss import ModalityLoss, count_tokens
from megat2i.optim.engine import EXP_AVG
from megat2i.runtime import Backend
from megat2i.trainer import Data, Run, evaluate, train_step
from megat2i.vocab import IGNORE, TEXT

# (engine, ranks, micro-batch): the first is the oracle, one process with one big batch
ORACLE = ("torch", 1, 8)
LAYOUTS = [
    ("torch", 1, 2),
    ("torch", 2, 2),
    ("torch", 2, 4),
    ("deepspeed", 1, 2),
    ("deepspeed", 2, 2),
    ("deepspeed", 2, 4),
]
STEPS = 3


@pytest.fixture(scope="module")
def configure(tiny_config):
    """Function of (micro-batch, dtype) -> Config. Adam's eps is large so that updates are smooth in the gradient:

    with 1e-8 the sign of a gradient that is rounding noise decides an update, and no bound would be tight.
    """

    def make(micro, dtype="float32", weights=(1.0, 1.0, 1.0), clip=0.5):
        return replace(
            tiny_config,
            training=replace(tiny_config.training, micro_batch_size=micro),
            optimizer=replace(tiny_config.optimizer, eps=1e-3, clip=clip),
            runtime=replace(tiny_config.runtime, dtype=dtype),
            loss=LossConfig(*weights, z_loss=1e-3),
        )

    return make


@pytest.fixture(scope="module")
def run_steps(make_training, make_batches):
    """Function of (layout, Config) -> record of three steps: metrics, gradient norms, parameters, first gradients."""

    def steps(engine_name, config, step_function):
        pipeline, engine, groups = make_training(engine_name, config)
        loss = ModalityLoss((config.loss.text, config.loss.image, config.loss.special), config.loss.z_loss)
        record = {"metrics": [], "grad_norm": []}
        for step in range(STEPS):
            batches = make_batches(config, step, groups.data_rank, groups.data_size)
            metrics, norm = step_function(pipeline, engine, batches, loss, groups, lr=1e-2)
            record["metrics"].append(metrics.as_dict())
            record["grad_norm"].append(norm)
            if step == 0:  # Adam's first moment is (1 - beta1) times the gradient
                record["fragments"] = [
                    (part.name, part.shard.shape, part.start, part.values.numpy().copy())
                    for part in engine.fragments()
                    if part.kind == EXP_AVG and part.written
                ]
        record["parameters"] = {name: p.detach().float().numpy() for name, p in pipeline.model.named_parameters()}
        return record

    def run(layout, config, step_function=train_step):
        records = run_ranks(layout[1], steps, layout[0], config, step_function)
        for record in records[1:]:
            assert record["metrics"] == records[0]["metrics"] and record["grad_norm"] == records[0]["grad_norm"]
            for name, values in record["parameters"].items():
                assert np.array_equal(values, records[0]["parameters"][name]), f"{name} differs between ranks"
        moments = {}
        for record in records:
            for name, shape, start, values in record.pop("fragments"):
                moments.setdefault(name, np.zeros(int(np.prod(shape))))[start : start + len(values)] += values
        return records[0] | {"moments": moments}

    return run


def relative(found, expected) -> float:
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-12))


def assert_same_training(found, expected, bounds) -> None:
    """``bounds``: largest relative error of (metrics, gradient norm, first gradient, parameters after three steps)."""
    metrics, norm, gradient, parameters = bounds
    for a, b in zip(found["metrics"], expected["metrics"], strict=True):
        assert a.keys() == b.keys()
        for key, value in b.items():
            if key.startswith("tokens/"):
                assert a[key] == value
            elif not key.startswith(("accuracy/", "ppl/")):  # a near tie may go either way; ppl is exp(loss)
                assert a[key] == pytest.approx(value, rel=metrics), key
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=norm)
    for name, values in expected["moments"].items():
        assert relative(found["moments"][name], values) < gradient, f"gradient of {name}"
    for name, values in expected["parameters"].items():
        assert relative(found["parameters"][name], values) < parameters, name


FLOAT32 = (1e-5, 1e-5, 1e-5, 1e-5)
# bfloat16: activations carry 8 bits; micro-batches are rounded alike, so what differs are sums over rows and ranks.
# Measured: gradients of norm gains and biases up to 1.3e-2, parameters after three steps up to 1e-2 (small biases).
BFLOAT16 = (1e-3, 4e-3, 2e-2, 2e-2)


@pytest.fixture(scope="module")
def oracle(run_steps, configure):
    records = {}

    def get(dtype, weights=(1.0, 1.0, 1.0)):
        if (dtype, weights) not in records:
            records[dtype, weights] = run_steps(ORACLE, configure(ORACLE[2], dtype, weights))
        return records[dtype, weights]

    return get


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_layout_trains_alike(run_steps, configure, oracle, layout, dtype):
    expected = oracle(dtype)
    shares = [expected["metrics"][0][f"tokens/{modality}"] for modality in ("text", "image", "special")]
    assert min(shares) > 0
    assert all(norm > 0.5 for norm in expected["grad_norm"]), "clipping must be at work"
    found = run_steps(layout, configure(layout[2], dtype))
    assert_same_training(found, expected, FLOAT32 if dtype == "float32" else BFLOAT16)


@pytest.mark.parametrize("layout", [("torch", 2, 2), ("deepspeed", 2, 4)], ids=str)
def test_weighted_modalities_train_alike(run_steps, configure, oracle, layout):
    weights = (0.3, 2.0, 0.0)
    expected = oracle("float32", weights)
    found = run_steps(layout, configure(layout[2], weights=weights))
    assert_same_training(found, expected, FLOAT32)
    first = expected["metrics"][0]
    counts = [first[f"tokens/{m}"] for m in ("text", "image", "special")]
    losses = [first[f"loss/{m}"] for m in ("text", "image", "special")]
    objective = sum(w * n * x for w, n, x in zip(weights, counts, losses, strict=True))
    assert first["objective"] == pytest.approx(objective / (0.3 * counts[0] + 2.0 * counts[1]))
    mean = sum(n * x for n, x in zip(counts, losses, strict=True)) / sum(counts)
    assert first["loss"] == pytest.approx(mean)
    assert "objective" not in oracle("float32")["metrics"][0]
    with pytest.raises(AssertionError):
        assert_same_training(found, oracle("float32"), FLOAT32)


def mean_of_means_step(pipeline, engine, batches, loss, groups, lr):
    """The mistake: every micro-batch is normalised by its own counts, and the means are averaged."""
    counts = count_tokens([batch.modality for batch in batches])
    for batch in batches:
        own = count_tokens([batch.modality])
        pipeline.run_schedule([batch], loss, own, engine.loss_scale / len(batches) / groups.data_size)
    dist.all_reduce(counts)
    sums = trainer._summed(pipeline.run_forward(batches), groups.data)
    return trainer.StepMetrics(*sums, counts, loss.weights), engine.step(lr)


def test_a_mean_of_means_is_noticed(run_steps, configure, oracle):
    found = run_steps(("torch", 2, 2), configure(2), mean_of_means_step)
    with pytest.raises(AssertionError):
        assert_same_training(found, oracle("float32"), FLOAT32)
    narrow = run_steps(("torch", 2, 2), configure(2, "bfloat16"), mean_of_means_step)
    with pytest.raises(AssertionError):
        assert_same_training(narrow, oracle("bfloat16"), BFLOAT16)
    first, expected = found["metrics"][0], oracle("float32")["metrics"][0]
    assert first["loss"] == pytest.approx(expected["loss"], rel=1e-5)  # of the same weights: the gradient tells


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_a_wrong_loss_scale_is_noticed(run_steps, configure, oracle, engine):
    def doubled(pipeline, engine, batches, loss, groups, lr):
        engine.loss_scale *= 2
        result = train_step(pipeline, engine, batches, loss, groups, lr)
        engine.loss_scale /= 2
        return result

    with pytest.raises(AssertionError):
        assert_same_training(run_steps((engine, 2, 2), configure(2), doubled), oracle("float32"), FLOAT32)


def test_the_step_draws_no_random_numbers(run_steps, configure):
    def noisy(*arguments, lr):
        before = torch.random.get_rng_state()
        result = train_step(*arguments, lr=lr)
        assert torch.equal(before, torch.random.get_rng_state())
        return result

    run_steps(("torch", 1, 4), configure(4), noisy)


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluation_equals_the_loss_of_a_step_and_leaves_no_gradient(
    make_training, make_batches, configure, oracle, ranks
):
    def run():
        config = configure(2)
        pipeline, _, groups = make_training("torch", config)
        batches = make_batches(config, 0, groups.data_rank, groups.data_size)
        metrics = evaluate(pipeline, batches, ModalityLoss((1.0, 1.0, 1.0)), groups)
        return metrics.as_dict(), all(p.grad is None for p in pipeline.model.parameters())

    for metrics, clean in run_ranks(ranks, run):
        assert clean
        for key, value in oracle("float32")["metrics"][0].items():
            assert metrics[key] == pytest.approx(value, rel=1e-5), key


def test_a_batch_without_positions_of_weight_is_an_error(make_training, make_batches, configure):
    def run():
        config = configure(2)
        pipeline, engine, groups = make_training("torch", config)
        batches = make_batches(config, 0)
        empty = [replace(batch, modality=torch.full_like(batch.modality, -1)) for batch in batches]
        with pytest.raises(ValueError, match="no position"):
            train_step(pipeline, engine, empty, ModalityLoss((1.0, 1.0, 1.0)), groups, lr=1e-2)

    run_ranks(1, run)


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 2), (1, 2, 1)])
def test_data_that_one_rank_cannot_read_end_the_step_on_all(make_training, make_batches, configure, tmp_path, layout):
    """Before anything is computed, whatever the rank: also one whose rows others count."""
    config = configure(2)
    tensor, pipeline, data = layout
    config = replace(config, parallel=replace(config.parallel, tensor=tensor, pipeline=pipeline))
    ranks, loss = tensor * pipeline * data, ModalityLoss((1.0, 1.0, 1.0))

    def run():
        stage, engine, groups = make_training("torch", config)
        before = [p.detach().clone() for p in stage.model.parameters()]
        fault = DataFileError(tmp_path / "train.bin", "bytes 0 to 99 differ", "Copy the file again")
        raised = []
        for failing in range(ranks):
            batches = make_batches(config, 0, groups.data_rank, groups.data_size)
            problem = fault if dist.get_rank() == failing else None
            with pytest.raises(DataFileError if ranks == 1 else trainer.RunError) as error:
                train_step(stage, engine, [] if problem else batches, loss, groups, 1e-2, problem=problem)
            raised.append(str(error.value))
        assert all(torch.equal(a, b) for a, b in zip(before, stage.model.parameters(), strict=True))
        batches = make_batches(config, 0, groups.data_rank, groups.data_size)
        counts = trainer._global_counts(batches, groups, None)
        assert torch.equal(counts, trainer._summed(count_tokens([b.modality for b in batches]), groups.data))
        return raised

    expected = f"{tmp_path / 'train.bin'}: bytes 0 to 99 differ. Copy the file again"
    assert run_ranks(ranks, run) == [[expected] * ranks] * ranks


def run_loop(make_training, make_batches, config, draw=None, engine="torch"):
    """``trainer.train`` over random batches from step 0, with one validation batch, and one with its text alone."""
    pipeline, engine, groups = make_training(engine, config)
    batch = make_batches(config, 99)[0]
    labels = torch.where(batch.modality == TEXT, batch.labels, IGNORE)
    text = replace(batch, labels=labels, modality=torch.where(labels == IGNORE, -1, batch.modality))
    data = Data(lambda step: make_batches(config, step), {"valid": [batch], "valid_text": [text]})
    loss = ModalityLoss((1.0, 1.0, 1.0))
    trainer.train(Run(config, pipeline, engine, data, loss, groups, Backend.resolve(config), draw), 0)


def loop_config(configure, tmp_path, **training):
    config = configure(2)
    return replace(
        config,
        run=replace(config.run, dir=str(tmp_path)),
        training=replace(config.training, **training),
        sampling=replace(config.sampling, prompts=["a hut"]),
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_loop_does_what_is_due(make_training, make_batches, configure, tmp_path):
    drawn = []

    def draw():
        drawn.append(None)
        return np.zeros((1, 3, 4, 4), np.uint8)

    def run():
        config = loop_config(configure, tmp_path, evaluate_every=4, checkpoint_every=2, sample_every=5)
        run_loop(make_training, make_batches, config, draw)
        return len(drawn)

    assert run_ranks(1, run) == [2]  # at 5 and at the end
    entries = lines(tmp_path)
    assert [entry["step"] for entry in entries if "split" not in entry] == [1, 2, 3, 4, 5, 6]
    valid, text = ([entry for entry in entries if entry.get("split") == split] for split in ("valid", "valid_text"))
    assert [entry["step"] for entry in valid] == [entry["step"] for entry in text] == [4, 6]
    for entry, other in zip(text, valid, strict=True):
        assert entry["loss"] == entry["loss/text"] == pytest.approx(other["loss/text"]) != pytest.approx(other["loss"])
        assert entry["tokens/text"] == other["tokens/text"] > 0 == entry["tokens/image"]
        assert entry["ppl/image"] is entry["loss/image"] is entry["loss/special"] is None
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-4", "step-6"]
    assert entries[0]["lr"] == pytest.approx(0.5e-2)


def test_stopping_early_leaves_a_checkpoint_and_no_validation(make_training, make_batches, configure, tmp_path):
    config = loop_config(configure, tmp_path, stop_at=3)
    run_ranks(1, lambda: run_loop(make_training, make_batches, config))
    assert [(entry["step"], entry.get("split")) for entry in lines(tmp_path)] == [(1, None), (2, None), (3, None)]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-3"]
