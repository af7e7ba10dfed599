"""The pipeline at work: what it holds in flight, evaluation, sampling over ranks, frozen parameters."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import RankError, run_ranks
from torch.multiprocessing.reductions import StorageWeakRef

from megat2i import pipeline as pipeline_module
from megat2i.config import Config, ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megat2i.loss import ModalityLoss, count_tokens
from megat2i.pipeline_order import peak_in_flight, training_order
from megat2i.trainer import evaluate, train_step

LOSS = ModalityLoss((0.5, 2.0, 1.0), 1e-3)
MODEL = ModelConfig(hidden=32, layers=8, heads=4, ffn=64, qk_norm=True, positions="rotary")


@pytest.fixture(scope="module")
def configure(tiny_config):
    """Function of (micro-batches, axes of ParallelConfig) -> Config in float32; micro-batches of one sequence."""

    def make(micro_batches: int = 4, **parallel) -> Config:
        return replace(
            tiny_config,
            vocab=replace(tiny_config.vocab, text_tokens=500, image_codes=250),
            model=MODEL,
            training=TrainingConfig(global_batch_size=micro_batches, micro_batch_size=1),
            optimizer=OptimizerConfig(clip=0.0, beta1=0.0),
            parallel=ParallelConfig(**parallel),
        )

    return make


class LiveBytes:
    """Bytes of what autograd keeps for backward passes (weights apart), now and at most."""

    def __init__(self, model: torch.nn.Module):
        self.weights = {p.data_ptr() for p in model.parameters()}
        self.now = self.most = 0

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept.tensor)

    def _keep(self, tensor: torch.Tensor) -> "Kept":
        kept = Kept(self, tensor, 0 if tensor.data_ptr() in self.weights else tensor.nbytes)
        self.most = max(self.most, self.now)
        return kept


class Kept:
    """A saved tensor that is counted as long as it lives."""

    def __init__(self, live: LiveBytes, tensor: torch.Tensor, size: int):
        self.live, self.tensor, self.size = live, tensor, size
        live.now += size

    def __del__(self):
        self.live.now -= self.size


SCHEDULES = {
    "1f1b": {"schedule": "1f1b"},
    "interleaved": {"schedule": "interleaved", "virtual_stages": 2},
    "zero_bubble": {"schedule": "zero_bubble"},
    "zero_bubble, virtual": {"schedule": "zero_bubble", "virtual_stages": 2},
}


@pytest.fixture(scope="module")
def in_flight(make_training, make_batches, configure):
    """Function of (schedule's name, micro-batches) -> per rank (promised peak, measured peak, most bytes kept)."""

    def on_rank(config: Config):
        pipeline, engine, groups = make_training("torch", config)
        batches = make_batches(config, 0)
        counts = count_tokens([b.modality for b in batches])
        live = LiveBytes(pipeline.model)
        with live.hooks():
            pipeline.run_schedule(batches, LOSS, counts, 1.0)
        engine.step(1e-3)
        parallel = config.parallel
        orders = training_order(parallel.schedule, groups.pipeline_size, parallel.virtual_stages, len(batches))
        assert live.now == 0, f"{live.now} bytes are kept after the step"
        return peak_in_flight(orders[groups.pipeline_rank]), pipeline.peak_in_flight, live.most

    return lambda name, micro_batches: run_ranks(2, on_rank, configure(micro_batches, pipeline=2, **SCHEDULES[name]))


@pytest.mark.parametrize("name", SCHEDULES)
def test_in_flight_is_what_the_schedule_promises(in_flight, name):
    """... however many micro-batches a step has, in their number and in what autograd keeps."""
    few, many = in_flight(name, 4), in_flight(name, 12)
    for rank in range(2):
        promised, measured, kept = few[rank]
        assert promised == measured
        assert many[rank][:2] == few[rank][:2]
        assert 0 < many[rank][2] <= 1.01 * kept, rank
    if name == "1f1b":
        assert [measured for _, measured, _ in many] == [2, 1]


def test_the_memory_check_notices_graphs_that_are_kept(in_flight, monkeypatch):
    held, forward, backward = [], pipeline_module._Step._forward, torch.autograd.backward

    def hoarding(self, stage, micro_batch):
        forward(self, stage, micro_batch)
        held.append(self.held[stage, micro_batch])

    monkeypatch.setattr(pipeline_module._Step, "_forward", hoarding)
    monkeypatch.setattr(torch.autograd, "backward", partial(backward, retain_graph=True))
    with pytest.raises(RankError, match="bytes are kept after the step"):
        in_flight("1f1b", 4)


def test_what_was_sent_is_freed(make_training, make_batches, configure):
    """A stage keeps the graph of what it handed on, but not the tensor."""

    def on_rank(hoard: bool) -> int:
        config = configure(8, pipeline=2)
        pipeline, _, _ = make_training("torch", config)
        batches = make_batches(config, 0)
        storages, alive, kept, send = [], [], [], pipeline_module._Step._send

        def watching(self, what, direction, stage, micro_batch):
            tensor = self.leaving[what, stage, micro_batch]
            storages.append(StorageWeakRef(tensor.untyped_storage()))
            kept.extend([tensor] * hoard)
            del tensor
            send(self, what, direction, stage, micro_batch)
            alive.append(sum(not storage.expired() for storage in storages))

        pipeline_module._Step._send = watching
        pipeline.run_schedule(batches, LOSS, count_tokens([b.modality for b in batches]), 1.0)
        assert len(storages) == 8
        return max(alive)

    assert max(run_ranks(2, on_rank, False)) == 1
    assert max(run_ranks(2, on_rank, True)) == 8


LAYOUTS = {
    "1.1": {},
    "2.1": {"pipeline": 2},
    "1.2": {"tensor": 2},
    "2.2": {"pipeline": 2, "tensor": 2},
    "2.2 sequence": {"pipeline": 2, "tensor": 2, "sequence": True},
    "2.2 interleaved": {"pipeline": 2, "tensor": 2, "schedule": "interleaved", "virtual_stages": 2},
    "4.1 zero bubble": {"pipeline": 4, "schedule": "zero_bubble", "virtual_stages": 2},
}


def ranks_of(layout: dict) -> int:
    return layout.get("pipeline", 1) * layout.get("tensor", 1)


@pytest.mark.parametrize("name", list(LAYOUTS)[3:])
def test_evaluation_equals_the_loss_of_a_step_and_leaves_nothing(make_training, make_batches, configure, name):
    def on_rank():
        config = configure(4, **LAYOUTS[name])
        pipeline, engine, groups = make_training("torch", config)
        batches = make_batches(config, 0)
        live = LiveBytes(pipeline.model)
        with live.hooks():
            evaluated = evaluate(pipeline, batches, LOSS, groups)
        assert live.most == 0 and all(p.grad is None for p in pipeline.model.parameters())
        assert all((gradient == 0).all() for gradient in engine.gradients.values())
        trained, _ = train_step(pipeline, engine, batches, LOSS, groups, 1e-2)
        after = evaluate(pipeline, batches, LOSS, groups)
        return [torch.stack([m.nll, m.correct, m.off_range, m.counts.double()]) for m in (evaluated, trained, after)]

    for evaluated, trained, after in run_ranks(ranks_of(LAYOUTS[name]), on_rank):
        torch.testing.assert_close(evaluated, trained, rtol=1e-6, atol=1e-9)
        assert (after[0] - evaluated[0]).abs().max() > 1e-3  # another loss would show


def sample(make_training, config: Config, columns: slice) -> np.ndarray:
    """Logits of a left-padded batch of prompts, and of three tokens after them, one at a time."""
    pipeline, _, _ = make_training(None, config)
    generator = torch.Generator().manual_seed(0)
    first = torch.tensor([0, 3, 5, 2])
    tokens = torch.randint(0, 500, (4, 11), generator=generator)
    tokens[:, :8][torch.arange(8)[None, :] < first[:, None]] = config.vocab_layout.special("<pad>")
    cache = pipeline.new_cache(4, 11, first)
    steps = [pipeline.next_logits(tokens[:, :8], cache, columns)]
    steps += [pipeline.next_logits(tokens[:, at : at + 1], cache, columns) for at in range(8, 11)]
    assert cache.position.item() == 11
    return torch.stack(steps).numpy()


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_sampling_over_ranks(make_training, configure, name):
    """Every rank gets the logits of the one-process model, whose own cache and padding test_gpt.py checks."""
    columns = slice(512, 762)

    def whole_model():
        pipeline, _, _ = make_training(None, configure())
        model = pipeline.model
        pipeline.next_logits = lambda tokens, cache, columns: model.next_logits(tokens, cache, columns)
        return sample(lambda *_: (pipeline, None, None), configure(), columns)

    with torch.no_grad():
        (expected,) = run_ranks(1, whole_model)
    for found in run_ranks(ranks_of(LAYOUTS[name]), sample, make_training, configure(**LAYOUTS[name]), columns):
        assert found.shape == expected.shape == (4, 4, 250)
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 0.1


def gradients(make_training, make_batches, config: Config, frozen: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Of every trained parameter of this rank; ``frozen``: beginnings of names."""
    pipeline, _, groups = make_training(None, config)
    for name, parameter in pipeline.model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    batches = make_batches(config, 0)
    pipeline.run_schedule(batches, LOSS, count_tokens([b.modality for b in batches]), 1.0)
    for name, parameter in pipeline.model.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name
    return {n: p.grad.numpy() for n, p in pipeline.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    "frozen",
    [
        ("tok_embeddings",),
        ("tok_embeddings", "layers.0.attention"),  # the first trained matrix sees an input without gradient
        ("layers.1.", "layers.5.feed_forward", "output"),
        ("norm",),
    ],
    ids=str,
)
def test_frozen_parameters_have_no_gradient_and_the_others_theirs(make_training, make_batches, configure, name, frozen):
    """... with recomputation too, which must not lose a layer whose input needs no gradient."""
    (expected,) = run_ranks(1, gradients, make_training, make_batches, configure(), frozen)
    recompute = {"1f1b": "none", "interleaved": "full", "zero_bubble": "none", "zero_bubble, virtual": "selective"}[
        name
    ]
    config = configure(pipeline=2, recompute=recompute, **SCHEDULES[name])
    found = {}
    for part in run_ranks(2, gradients, make_training, make_batches, config, frozen):
        assert not found.keys() & part.keys()
        found |= part
    assert found.keys() == expected.keys()
    for parameter, values in expected.items():
        error = np.linalg.norm(found[parameter] - values) / np.linalg.norm(values)
        assert error < 1e-5, f"{parameter}: {error:.1e}"


def test_a_second_step_starts_from_nothing(make_training, make_batches, configure):
    """Nothing that one step left in flight or deferred reaches the next: two steps give twice one step's gradient."""

    def on_rank(steps):
        config = configure(pipeline=2, schedule="zero_bubble")
        pipeline, _, _ = make_training(None, config)
        batches = make_batches(config, 0)
        for _ in range(steps):
            pipeline.run_schedule(batches, LOSS, count_tokens([b.modality for b in batches]), 1.0)
            assert not pipeline.model.weight_gradients.pending and not pipeline.model.weight_gradients.deferring
        return {n: p.grad.numpy() for n, p in pipeline.model.named_parameters()}

    for once, twice in zip(run_ranks(2, on_rank, 1), run_ranks(2, on_rank, 2), strict=True):
        for name, values in once.items():
            np.testing.assert_allclose(twice[name], 2 * values, rtol=1e-5, atol=1e-7)


def test_no_process_group_is_left():
    assert not dist.is_initialized()
