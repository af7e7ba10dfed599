"""Predictions of published training runs, and the points themselves."""

from dataclasses import replace

import pytest

from megat2i.model import cost
from megat2i.planner.hardware import GPUS
from megat2i.planner.published import POINTS
from megat2i.planner.report import validation
from megat2i.planner.speed import step_time

HELD_OUT = [point for point in POINTS if not point.fitted]


def point(start: str):
    (found,) = [p for p in POINTS if p.name.startswith(start)]
    return found


def test_points_held_out_of_the_fit():
    errors = [abs(p.error()) for p in HELD_OUT]
    assert len(HELD_OUT) == 20 and len(POINTS) - len(HELD_OUT) == 3
    assert sum(errors) / len(errors) < 0.05 and max(errors) < 0.15


def test_the_fit_is_the_best_one():
    """Both constants are where the squared errors of their points are smallest, to half a percent of the peak."""
    for family in ("a100", "h100"):
        points = [p for p in POINTS if p.fitted and p.gpu.startswith(family)]

        def squares(matmul, points=points):
            total = 0.0
            for p in points:
                gpu = replace(GPUS[p.gpu], matmul=matmul)
                seconds = step_time(p.job, p.layout, p.system, gpu).seconds
                total += (p.job.tokens / seconds / p.layout.gpus / p.tokens - 1) ** 2
            return total

        chosen = GPUS[f"{family}-80"].matmul
        assert squares(chosen) < min(squares(chosen - 0.01), squares(chosen + 0.01))


@pytest.mark.parametrize(
    ("start", "billions"),
    [
        ("MPT-1B, 2,048, 8", 1.316), ("MPT-7B, 2,048, 8 x a100", 6.66), ("TinyLlama", 1.1), ("Megatron 1.7B", 1.7),
        ("Megatron 3.6B", 3.6), ("Megatron 7.5B", 7.5), ("Megatron 18.4B", 18.4), ("Megatron 22B", 22),
        ("Megatron 175B", 175), ("Megatron 530B", 530), ("Megatron 1T", 1008),
    ],
)  # fmt: skip
def test_shapes_have_the_published_number_of_parameters(start, billions):
    job = point(start).job
    tables = 2 if start.startswith("TinyLlama") else 1  # the others use one table for input and output
    parameters = job.shape.layers * cost.layer_parameters(job.shape) + tables * job.rows * job.shape.hidden
    assert parameters / 1e9 == pytest.approx(billions, rel=0.035)


def test_published_units_agree_where_a_run_states_two():
    """MPT-1B on 64 A100: 55.44% of the peak by llm-foundry's formula, which counts all keys, is 19,001 tokens/s/GPU."""
    shape = point("MPT-1B, 2,048, 64 x a100-40").job.shape
    flops = 6 * 1_315_950_592 + 12 * shape.layers * shape.hidden * 2048
    assert 0.5544 * 312e12 / flops == pytest.approx(19_001, rel=1e-3)
    # Megatron 22B: 1.10 s for 4 sequences on 8 GPUs is its 41.5%
    assert point("Megatron 22B").tokens == pytest.approx(4 * 2048 / 8 / 1.10, rel=0.01)


def test_the_printed_table():
    text = validation()
    assert len(text.splitlines()) == len(POINTS) + 2 and text.count("fitted") == 3
    assert "held out: mean error" in text
