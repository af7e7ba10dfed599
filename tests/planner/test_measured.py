"""Coefficients from a record: what was measured comes out again, and a record that is none is refused."""

import json
from dataclasses import replace

import pytest

from megat2i import config
from megat2i.files import DataFileError
from megat2i.planner.hardware import GPUS, matmul_seconds, memory_seconds
from megat2i.planner.layout import Job, Layout
from megat2i.planner.measured import PRODUCTS, Measured
from megat2i.planner.speed import step_time
from megat2i.planner.system import ours

GPU, SIZES = GPUS["h200-141"], [36_864, 2_048, 66_816]
TRUE = replace(GPU, bandwidth=4.1e12, matmul=0.71)


@pytest.fixture
def settings(repository):
    return config.load(repository / "configs/open_lm_1b_t2i.yaml")


def write(path, settings, slower=1.0):
    """The record of a machine that is ``TRUE``; its step takes ``slower`` times the prediction."""
    products = 3000 * matmul_seconds(TRUE, *SIZES)
    copied = 2e9 / memory_seconds(TRUE, 1e9) / 1e9  # of which kernels reach half
    seconds = step_time(replace(Job.of(settings), global_batch=16), Layout(1, 1, 1, 16), ours(settings.model, 1), TRUE)
    step = {"ms": 1000 * slower * seconds.seconds, "ours": True, "micro_batch": 16, "recompute": "none"}
    sections = {
        "head": {"flat": {PRODUCTS: {"ms": products, "sizes": SIZES}, "Liger": {"error": "no"}}},
        "block": {"copy": {"device": {"gb_per_s": copied}}, "norm": {"ours": {"ms": 1.0, "of_copy": 0.4}},
                  "rope": {"ours": {"ms": 1.0, "of_copy": 0.6}, "Liger": {"ms": 1.0, "of_copy": 0.1}}},
        "step": {"16 rows": {"ours": step, "Liger": {"skipped": "not installed"}}},
    }  # fmt: skip
    path.write_text(json.dumps({"device": "X"} | {name: {"sections": s} for name, s in sections.items()}))
    return path


def test_what_was_measured_comes_out_again(settings, tmp_path):
    found = Measured.read(write(tmp_path / "a.json", settings)).calibrated(GPU)
    assert found.bandwidth == pytest.approx(TRUE.bandwidth) and found.matmul == pytest.approx(TRUE.matmul)
    assert replace(found, bandwidth=GPU.bandwidth, matmul=GPU.matmul) == GPU


def test_the_step_is_shown_with_the_predictions_error(settings, tmp_path):
    measured = Measured.read(write(tmp_path / "a.json", settings, slower=1.25))
    lines = measured.report(settings, measured.calibrated(GPU)).splitlines()
    assert len(lines) == 3 and lines[-1].split()[-1] == "-20.0%"


def test_without_figures_the_gpu_stays_as_it_is(tmp_path, settings):
    (tmp_path / "a.json").write_text('{"device": "X", "head": {"sections": {"flat": {"ours": {"error": "no"}}}}}')
    measured = Measured.read(tmp_path / "a.json")
    assert measured.calibrated(GPU) == GPU and len(measured.report(settings, GPU).splitlines()) == 2


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"device": "X", "head": 3}'])
def test_what_is_no_record_is_one_clear_error(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataFileError, match=r"a\.json: is no record"):
        Measured.read(tmp_path / "a.json")
