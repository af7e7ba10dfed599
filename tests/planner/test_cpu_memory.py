"""The CPU's memory model: what autograd keeps, and the resident memory of real training processes."""

import importlib
from dataclasses import replace

import pytest
import torch
from meta_block import BATCH, LENGTH, SHAPE, TOKENS, saved_bytes

from megat2i import config
from megat2i.config import ModelConfig, ParallelConfig
from megat2i.kernels import choose_ops
from megat2i.model.gpt import GPT
from megat2i.model.part import Part
from megat2i.model.partition import StageLayers
from megat2i.planner.cpu_memory import SIZES, layer_kept
from megat2i.planner.layout import Job, Layout
from megat2i.runtime import DTYPES


@pytest.fixture(scope="module")
def benchmark(repository):
    with pytest.MonkeyPatch.context() as patch:  # on the path, so that the processes it spawns find it too
        patch.syspath_prepend(repository / "benchmarks")
        yield importlib.import_module("bench_memory")


@pytest.fixture(scope="module")
def settings(repository, benchmark):
    small = [
        "training.micro_batch_size=4", "training.global_batch_size=8", "runtime.dtype=float32", "vocab.image_codes=2000"
    ]  # fmt: skip
    return config.load(repository / "configs/openmoji_demo.yaml", benchmark.SHAPE + small)


def cpu_model(shape: ModelConfig, dtype: torch.dtype) -> GPT:
    stage = StageLayers(0, shape.layers, embedding=True, head=False)
    model = GPT(shape, 256, ((0, 256),), choose_ops(torch.device("cpu"), dtype), part=Part(stages=(stage,))).to(dtype)
    model.initialise(0)
    return model


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"positions": "rotary"},
        {"qk_norm": True},
        {"positions": "rotary", "qk_norm": True},
        {"feed_forward": "gelu"},
    ],
    ids=str,
)
def test_a_layer_keeps_what_autograd_saves(change, dtype):
    shape = replace(SHAPE, **change)
    one, two = (saved_bytes(cpu_model(replace(shape, layers=layers), DTYPES[dtype])) for layers in (1, 2))
    job = Job(shape, 256, 256, LENGTH, BATCH)
    predicted = TOKENS * layer_kept(job, Layout(1, 1, 1, BATCH), SIZES[dtype])
    assert two - one == pytest.approx(predicted, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(),
        ParallelConfig(recompute="full"),
        ParallelConfig(tensor=2, sequence=True),
        ParallelConfig(pipeline=2),
    ],
    ids=str,
)
def test_the_peak_is_within_ten_percent(benchmark, settings, parallel):
    settings = replace(settings, parallel=parallel)
    rows = [benchmark.compared(settings, rank, measured) for rank, measured in enumerate(benchmark.measure(settings))]
    assert len(rows) == parallel.tensor * parallel.pipeline
    for row in rows:
        assert abs(row["error"]) < 0.10, benchmark.line(row)


@pytest.mark.slow
def test_the_measurement_notices_another_layout(benchmark, settings):
    """Negative control: the prediction for recomputation is far from what a run without it takes."""
    (measured,) = benchmark.measure(settings)
    other = replace(settings, parallel=ParallelConfig(recompute="full"))
    assert benchmark.compared(other, 0, measured)["error"] < -0.15
