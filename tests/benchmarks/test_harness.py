"""Rows survive: those that failed, those that were skipped, and those of the benchmarks before."""

import json

import pytest
import torch


@pytest.fixture(scope="module")
def harness(repository):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(repository / "benchmarks")
        import harness

        yield harness


CPU = torch.device("cpu")


def fail():
    raise RuntimeError("no such kernel\nand more")


def test_a_contestant_that_fails_is_a_row_and_the_others_go_on(harness, tmp_path):
    record = harness.Record("one", tmp_path / "r.json", CPU, minutes=1)
    rows = harness.take_turns({"a": lambda: None, "b": fail, "c": "not installed"}, 4, CPU, record)
    assert rows["a"]["rounds"] == 4 and rows["a"]["min"] <= rows["a"]["ms"] <= rows["a"]["max"]
    assert rows["b"] == {"error": "RuntimeError: no such kernel"} and rows["c"] == {"skipped": "not installed"}
    record.add("section", {"a": rows["a"]})
    written = json.loads((tmp_path / "r.json").read_text())["one"]
    assert set(written["sections"]["section"]) == {"a"} and written["environment"]["versions"]["torch"]
    record.finish()
    record.add("section", {"b": rows["b"]})
    with pytest.raises(SystemExit, match="section: b: RuntimeError: no such kernel"):
        record.finish()
    assert set(json.loads((tmp_path / "r.json").read_text())["one"]["sections"]["section"]) == {"a", "b"}


def test_benchmarks_share_a_file(harness, tmp_path):
    for name in ("one", "two"):
        harness.Record(name, tmp_path / "r.json", CPU).add("s", {"a": {"ms": 1.0}})
    assert set(json.loads((tmp_path / "r.json").read_text())) == {"device", "one", "two"}


def test_when_the_minutes_are_over_rows_are_skipped_and_rounds_end(harness, tmp_path):
    record = harness.Record("one", tmp_path / "r.json", CPU, minutes=0)
    assert harness.take_turns({"a": lambda: None}, 4, CPU, record) == {"a": harness.OUT_OF_TIME}
    record = harness.Record("one", None, CPU, minutes=1)
    begun = []

    def late():
        begun.append(1)
        record.deadline = 0

    assert harness.take_turns({"a": late}, 50, CPU, record)["a"]["rounds"] == harness.FEWEST_ROUNDS


def test_what_is_prepared_is_not_timed(harness):
    import time

    def call():
        pass

    call.prepare = lambda: time.sleep(0.05)
    assert harness.one_time(call, CPU) < 40
