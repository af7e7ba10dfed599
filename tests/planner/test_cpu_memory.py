"""The memory model against the resident memory of real training processes, by the benchmark's own measurement."""

import importlib.util
from dataclasses import replace

import pytest

from megat2i import config
from megat2i.config import ParallelConfig


@pytest.fixture(scope="module")
def benchmark(repository):
    spec = importlib.util.spec_from_file_location("bench_memory", repository / "benchmarks/bench_memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def settings(repository, benchmark):
    small = [
        "training.micro_batch_size=4", "training.global_batch_size=8", "runtime.dtype=float32", "vocab.image_codes=2000"
    ]  # fmt: skip
    return config.load(repository / "configs/openmoji_demo.yaml", benchmark.SHAPE + small)


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
