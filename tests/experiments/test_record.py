"""Curves and statistics from metrics.jsonl."""

import json
import math

import pytest
from scipy import stats

from megat2i.experiments.record import EMA, MissingRun, Record, paired, thinned


def write(folder, losses, splits=(), steps=None):
    lines = [
        {"step": step, "loss": loss, "tokens/text": 2, "tokens/image": 30, "tokens/special": 1}
        for step, loss in enumerate(losses, 1)
    ]
    lines += [{"step": len(losses), "split": split, "loss": value} for split, value in splits]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(f"training: {{steps: {steps or len(losses)}}}\n")


def test_tokens_curve_and_validation(tmp_path):
    write(tmp_path, [4.0, 3.0, 2.0], [("valid", 2.5), ("valid_text", 9.0)])
    record = Record.read(tmp_path)
    assert record.tokens() == [33, 66, 99]
    weights = [(1 - EMA) * EMA**age for age in (2, 1, 0)]
    expected = sum(w * loss for w, loss in zip(weights, (4.0, 3.0, 2.0), strict=True)) / sum(weights)
    assert record.curve("loss") == pytest.approx([4.0, (EMA * 4 + 3) / (EMA + 1), expected])
    assert record.recent("loss") == 2.0  # of three steps, the last
    assert record.last("loss") == 2.5 and record.validation("loss", "valid_text") == [(3, 9.0)]


def test_what_is_missing_is_an_error(tmp_path):
    with pytest.raises(MissingRun, match="metrics.jsonl is absent"):
        Record.read(tmp_path)
    write(tmp_path, [], steps=10)
    with pytest.raises(MissingRun, match="ends at step 0 of 10"):
        Record.read(tmp_path)
    write(tmp_path, [2.0, 1.0], [("valid", 1.5)], steps=10)
    with pytest.raises(MissingRun, match="ends at step 2 of 10: run this experiment to its end"):
        Record.read(tmp_path)
    write(tmp_path, [1.0])
    with pytest.raises(MissingRun, match="has no validation of valid"):
        Record.read(tmp_path).last("loss")


@pytest.mark.parametrize("number", [2, 3, 5])
def test_the_interval_is_students(number):
    first, second = [1.0, 2.0, 4.0, 3.0, 2.5][:number], [1.5, 2.1, 4.9, 3.2, 2.4][:number]
    differences = [b - a for a, b in zip(first, second, strict=True)]
    low, high = stats.t.interval(0.95, number - 1, sum(differences) / number, stats.sem(differences))
    found = paired(first, second)
    assert found["interval_95"] == pytest.approx([low, high], rel=1e-3)
    assert found["mean_difference"] == pytest.approx(sum(differences) / number)


def test_one_pair_has_no_interval():
    found = paired([1.0], [1.5])
    assert found["mean_difference"] == 0.5 and found["interval_95"] is None


def test_thinned_keeps_both_ends():
    values = list(range(1001))
    assert thinned(values, 5) == [0, 250, 500, 750, 1000] and thinned([1, 2], 5) == [1, 2]
    assert math.isclose(len(thinned(values)), 400)
