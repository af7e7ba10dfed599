"""The record of a run: its keys, its numbers, what remains of it after a kill, the same on TensorBoard."""

import json
import math
import resource
import shutil
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megat2i.files import DataFileError
from megat2i.metrics import MetricsLog, StepMetrics, peak_flops

STEP_KEYS = [
    "step",
    "lr",
    "loss",
    "loss/text",
    "loss/image",
    "loss/special",
    "ppl/text",
    "ppl/image",
    "tokens/text",
    "tokens/image",
    "grad_norm",
    "tokens_per_s",
    "step_s",
    "mfu",
]


def measured(nll=(10.0, 60.0, 3.0), correct=(1, 5, 3), counts=(5, 20, 3), weights=(1.0, 1.0, 1.0)):
    off_range = torch.tensor(correct) / 100
    return StepMetrics(torch.tensor(nll), torch.tensor(correct), off_range, torch.tensor(counts), weights)


def test_numbers_by_hand():
    found = measured().as_dict()
    assert found == {
        "loss": pytest.approx(73 / 28),
        "loss/text": 2.0,
        "ppl/text": pytest.approx(math.e**2),
        "accuracy/text": pytest.approx(0.2),
        "off_range/text": pytest.approx(0.002),
        "tokens/text": 5,
        "loss/image": 3.0,
        "ppl/image": pytest.approx(math.e**3),
        "accuracy/image": 0.25,
        "off_range/image": pytest.approx(0.0025),
        "tokens/image": 20,
        "loss/special": 1.0,
        "tokens/special": 3,
    }


def test_the_objective_stands_beside_the_loss_where_weights_differ():
    found = measured(weights=(0.5, 2.0, 0.0)).as_dict()
    assert found["objective"] == pytest.approx((0.5 * 10 + 2 * 60) / (0.5 * 5 + 2 * 20))
    assert found["loss"] == pytest.approx(73 / 28)
    assert "objective" not in measured(weights=(2.0, 2.0, 2.0)).as_dict()


def test_a_modality_without_positions_is_null():
    found = measured((10.0, 0.0, 3.0), (1, 0, 3), (5, 0, 3)).as_dict()
    assert [found[f"{key}/image"] for key in ("loss", "ppl", "accuracy", "tokens")] == [None, None, None, 0]
    assert found["loss"] == pytest.approx(13 / 8)


def test_a_batch_without_weighted_positions_still_reports():
    """Validation text of a run that trains on images alone."""
    found = measured((10.0, 0.0, 0.0), (1, 0, 0), (5, 0, 0), (0.0, 1.0, 0.0)).as_dict()
    assert found["loss"] == 2.0 and found["objective"] is None


def read(path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def write_steps(folder, steps, resume_step=0):
    log = MetricsLog(folder, resume_step)
    for step in steps:
        log.write({"step": step, "lr": step / 10, **measured().as_dict(), "mfu": None})
        if step % 2 == 0:
            log.write({"step": step, "split": "valid", **measured().as_dict()})
    return log


def test_resuming_drops_later_steps_and_a_torn_line(tmp_path):
    write_steps(tmp_path, range(1, 6)).close()
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    kept = "".join(line + "\n" for line in whole.splitlines() if json.loads(line)["step"] <= 4)
    for torn in ('{"step": 6, "lo', '{"step"', "{", '{"step": 6, "loss/text": 2.0', "\x00" * 50):
        path.write_text(whole + torn)
        write_steps(tmp_path, [], resume_step=4).close()
        assert path.read_text() == kept
    write_steps(tmp_path, range(5, 7), resume_step=4).close()
    (tmp_path / "unbroken").mkdir()
    write_steps(tmp_path / "unbroken", range(1, 7)).close()
    assert path.read_bytes() == (tmp_path / "unbroken" / "metrics.jsonl").read_bytes()


def test_a_torn_line_of_a_kept_step_does_not_merge_with_the_next(tmp_path):
    write_steps(tmp_path, range(1, 4)).close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "split": "val')
    write_steps(tmp_path, [4], resume_step=3).close()
    assert [entry["step"] for entry in read(tmp_path / "metrics.jsonl")] == [1, 2, 2, 3, 4, 4]


def test_lines_are_there_at_once(tmp_path):
    log = write_steps(tmp_path, [1])
    assert len(read(tmp_path / "metrics.jsonl")) == 1
    log.close()


def test_numbers_that_are_not_finite_stay_json(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 1, **measured((math.nan, math.inf, 3.0)).as_dict(), "grad_norm": math.inf})
    log.close()
    entry = read(tmp_path / "metrics.jsonl")[0]
    assert (entry["loss"], entry["loss/image"], entry["grad_norm"]) == ("nan", "inf", "inf")


def test_tensorboard_has_the_same_keys_and_numbers(tmp_path):
    log = write_steps(tmp_path, range(1, 4))
    log.images(3, np.full((2, 3, 4, 4), 7, np.uint8), ["a hut", "a moon"])
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    expected = {}
    for entry in read(tmp_path / "metrics.jsonl"):
        prefix = entry.pop("split") + "/" if "split" in entry else ""
        step = entry.pop("step")
        for key, value in entry.items():
            if value is not None:
                expected.setdefault(prefix + key, []).append((step, pytest.approx(value)))
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == expected
    assert sorted(events.Tags()["images"]) == ["samples/a hut", "samples/a moon"]


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path):
    write_steps(tmp_path, range(1, 6)).close()
    write_steps(tmp_path, range(4, 8), resume_step=3).close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("lr")] == list(range(1, 8))


def test_the_peak_of_a_cpu_is_not_known():
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


@contextmanager
def files_up_to(size):
    """No file of this process may become longer than ``size`` bytes: a disk that is full, for everybody but root."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def said(monkeypatch):
    """What is said; the limit on files would hold for a captured output too."""
    lines = []
    for module in ("metrics", "record_file"):
        monkeypatch.setattr(f"megat2i.{module}.say", lines.append)
    return lines


def test_a_full_disk_does_not_end_a_training(tmp_path, said, capsys):
    log = write_steps(tmp_path, [1])
    with files_up_to((tmp_path / "metrics.jsonl").stat().st_size + 100):  # in the middle of the next line
        for step in (2, 3, 4):
            log.write({"step": step, **measured().as_dict()})
            log.images(step, np.random.default_rng(0).integers(0, 255, (2, 3, 64, 64), np.uint8), ["a", "b"])
            log.sync()
        with suppress(OSError):  # as its own timer would do it
            log.tensorboard.flush()
        log.write({"step": 5, **measured().as_dict()})
    log.write({"step": 6, **measured().as_dict()})
    log.close()
    assert [entry["step"] for entry in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert sum("its lines wait in memory" in line for line in said) == 1
    assert sum("goes on without TensorBoard (File too large)" in line for line in said) == 1
    assert sum("goes on without pictures" in line for line in said) == 3 and len(said) == 5
    assert "Traceback" not in capsys.readouterr().err


def test_lines_that_are_lost_are_counted(tmp_path, said, monkeypatch):
    monkeypatch.setattr("megat2i.record_file.WAITING", 3)
    log = write_steps(tmp_path, [1])
    with files_up_to(0):
        for step in range(2, 8):
            log.write({"step": step, **measured().as_dict()})
        log._file.close()
    assert said[-1] == f"{tmp_path}/metrics.jsonl: 6 lines could not be written and are lost"


def test_a_removed_run_folder_is_one_sentence(tmp_path):
    log = write_steps(_made(tmp_path / "run"), [1])
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(DataFileError, match="metrics.jsonl: was removed while the run goes on"):
        log.write({"step": 2, **measured().as_dict()})


def _made(folder):
    folder.mkdir()
    return folder
