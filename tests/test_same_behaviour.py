"""The record of what the program computes: it repeats itself, and a change of one number is noticed."""

import pytest
import same_behaviour
from same_behaviour import differences, record_dataset, record_run


def test_whatever_is_not_equal_is_named():
    before = {"a": "1", "b": "2", "c": "3"}
    assert differences(before, dict(before)) == []
    assert differences(before, {"a": "1", "b": "9", "d": "4"}) == ["gone: c", "new: d", "changed: b"]


@pytest.mark.full
def test_a_record_repeats_itself_and_notices_a_change(tmp_path, monkeypatch):
    first, second, changed = tmp_path / "first", tmp_path / "second", tmp_path / "changed"
    before = record_dataset(first) | record_run(first, "python")
    again = record_dataset(second) | record_run(second, "python")
    assert len(before) > 10 and differences(before, again) == []
    monkeypatch.setattr(same_behaviour, "CONFIG", same_behaviour.CONFIG.replace("lr: 5.0e-3", "lr: 5.001e-3"))
    after = record_dataset(changed) | record_run(changed, "python")
    lines = differences(before, after)
    assert "changed: python: metrics" in lines and not any("dataset" in line for line in lines)
