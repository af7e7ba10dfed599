"""The plan: its order, its figures against each other, and what it says of layouts that do not fit."""

from dataclasses import replace

import pytest

from megat2i.config import ModelConfig
from megat2i.model import cost
from megat2i.planner.hardware import GPUS
from megat2i.planner.layout import Job
from megat2i.planner.ranking import plan
from megat2i.planner.report import report

JOB = Job(ModelConfig(), 66_816, 66_668, 1152, 896)
LARGE = replace(JOB, shape=ModelConfig(hidden=5120, layers=40, heads=40))


@pytest.fixture(scope="module")
def planned():
    return plan(LARGE, 16, GPUS["a100-40"])


def test_what_fits_comes_first_and_the_fastest_of_it_before_all(planned):
    fits = [p.fits for p in planned]
    count = sum(fits)
    assert fits == [True] * count + [False] * (len(fits) - count) and 0 < count < len(fits)
    speeds = [p.tokens_per_s for p in planned[:count]]
    sizes = [p.memory.total for p in planned[count:]]
    assert speeds == sorted(speeds, reverse=True) and sizes == sorted(sizes)
    assert all((p.memory.total <= 40e9) == p.fits for p in planned)


def test_figures_agree_with_each_other(planned):
    for p in planned[:: len(planned) // 50]:
        entry = p.as_dict()
        assert entry["tokens_per_s"] == pytest.approx(16 * entry["tokens_per_s_per_gpu"], rel=1e-3)
        assert entry["step_s"] == pytest.approx(LARGE.tokens / p.tokens_per_s, abs=1e-4)
        assert entry["hours_for_100b_tokens"] == pytest.approx(100e9 / p.tokens_per_s / 3600, abs=0.01)
        flops = cost.flops_per_token(LARGE.shape, LARGE.columns, LARGE.sequence_length)
        assert entry["mfu"] == pytest.approx(p.tokens_per_s_per_gpu * flops / 312e12, abs=1e-4)
        assert sum(entry["share_of_step"].values()) == pytest.approx(1, abs=2e-3)
        assert sum(entry["memory_parts_gb"].values()) == pytest.approx(entry["memory_gb"], abs=5e-3)
        assert 0 < entry["mfu"] < 0.8


def test_more_memory_lets_more_fit_and_a_faster_gpu_is_faster(planned):
    larger = plan(LARGE, 16, GPUS["a100-80"])
    assert sum(p.fits for p in larger) > sum(p.fits for p in planned)
    assert plan(LARGE, 16, GPUS["h100-80"])[0].tokens_per_s > 1.5 * larger[0].tokens_per_s


def test_near_one_billion_data_parallelism_alone_is_best():
    best = plan(JOB, 64, GPUS["a100-80"])[0].layout
    assert (best.tensor, best.pipeline, best.data) == (1, 1, 64)


def test_the_report_says_why_something_does_not_fit(planned):
    text = report(planned)
    assert "1.1.16: none fits; the smallest needs" in text and "of gradients" in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_nothing_fits():
    planned = plan(LARGE, 1, GPUS["a100-40"])
    assert not any(p.fits for p in planned)
    assert "0 of" in report(planned) and "best" not in report(planned)


def test_a_batch_that_does_not_divide_is_one_clear_error():
    with pytest.raises(ValueError, match="896 sequences does not divide over 37 GPUs"):
        plan(JOB, 37, GPUS["a100-80"])
