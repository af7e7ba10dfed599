"""tools/compare_runs.py as it is started: largest differences, where they are, its exit status, and its errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def compare(repository):
    """Function of (arguments) -> (exit status, lines, errors)."""

    def run(*arguments) -> tuple[int, list[str], str]:
        command = [sys.executable, str(repository / "tools/compare_runs.py"), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout.splitlines(), done.stderr.strip()

    return run


def entry(step: int, **changed) -> dict:
    values = {"lr": 1e-3, "loss": 5.0 / step, "loss/text": 2.0, "loss/image": None, "tokens/text": 100 + step}
    return {"step": step, **values, "grad_norm": 0.5, "tokens_per_s": 1000.0, "step_s": 0.1, "mfu": None} | changed


def write(folder: Path, entries: list[dict], tail: str = "") -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries) + tail)
    return folder


def line_of(lines: list[str], metric: str) -> list[str]:
    (line,) = [line for line in lines if line.startswith(f"{metric} ")]
    return line.split(maxsplit=7)


def test_equal_runs_differ_nowhere_whatever_their_speed(compare, tmp_path):
    a = write(tmp_path / "a", [entry(step) for step in (1, 2, 3)] + [entry(3, split="valid")])
    b = write(
        tmp_path / "b", [entry(s, tokens_per_s=9.0, step_s=9.0, mfu=0.4) for s in (1, 2, 3)] + [entry(3, split="valid")]
    )
    status, lines, _ = compare(a, b / "metrics.jsonl", "--tolerance", 0)
    assert status == 0 and lines[0] == "4 records in both, to step 3"
    assert {line.split()[0] for line in lines[1:7]} == {
        "lr",
        "loss",
        "loss/text",
        "loss/image",
        "tokens/text",
        "grad_norm",
    }
    assert not any("tokens_per_s" in line or "mfu" in line for line in lines)
    assert line_of(lines, "loss")[:3] == ["loss", "absolute", "0"]


def test_the_largest_differences_and_their_steps(compare, tmp_path):
    a = write(tmp_path / "a", [entry(step) for step in range(1, 9)])
    b = write(
        tmp_path / "b",
        [entry(s, **{1: {"loss": 5.2}, 5: {"loss": 1.1}, 7: {"tokens/text": 108}}.get(s, {})) for s in range(1, 9)],
    )
    status, lines, _ = compare(a, b)
    assert status == 0
    assert line_of(lines, "loss")[1:7] == ["absolute", "0.2", "at", "1", "relative", "0.0909"]
    assert line_of(lines, "loss")[7] == "at 5       (1.0, 1.1)"
    assert line_of(lines, "tokens/text")[1:5] == ["absolute", "1", "at", "7"]
    assert compare(a, b, "--tolerance", 0.1)[0] == 0
    status, lines, _ = compare(a, b, "--tolerance", 0.05)
    assert status == 1 and lines[-1] == "largest relative difference 0.0909: ABOVE 0.05"


@pytest.mark.parametrize("value", [None, "nan", 7.0, "missing"])
def test_a_value_on_one_side_only_is_an_infinite_difference(compare, tmp_path, value):
    changed = entry(2, **{"loss/image": value}) if value != "missing" else entry(2)
    if value == "missing":
        del changed["loss/image"]
    a = write(tmp_path / "a", [entry(1), entry(2, **{"loss/image": 3.0})])
    status, lines, _ = compare(a, write(tmp_path / "b", [entry(1), changed]), "--tolerance", 0.9)
    assert status == (0 if value == 7.0 else 1)
    assert line_of(lines, "loss/image")[2] == ("4" if value == 7.0 else "inf")


def test_steps_of_one_run_only_are_listed(compare, tmp_path):
    a = write(tmp_path / "a", [entry(step) for step in (1, 2, 3, 4, 7)] + [entry(4, split="valid")])
    b = write(tmp_path / "b", [entry(step) for step in (3, 9)], tail='{"step": 10, "lo')  # killed while it wrote
    status, lines, _ = compare(a, b, "--tolerance", 0)
    assert status == 0
    assert lines[:3] == [
        f"train steps only in {a}: 1-2, 4, 7",
        f"valid steps only in {a}: 4",
        f"train steps only in {b}: 9",
    ]
    assert lines[3] == "1 records in both, to step 3"
    c = write(tmp_path / "c", [entry(50)])
    status, lines, _ = compare(a, c)
    assert status == 1 and lines[-1] == "no step is in both"


def test_what_is_no_record_of_a_run_is_one_clear_error(compare, tmp_path):
    good = write(tmp_path / "good", [entry(1)])
    (tmp_path / "empty").mkdir()
    for content, problem in (
        ("", "it holds no record"),
        ("hello\nworld\n", "line 1 is not JSON"),
        ('{"step": 1}\nhello\n{"step": 2}\n', "line 2 is not JSON"),
        ('{"loss": 1}\n', "line 1 is no record with a step"),
        ("[1]\n", "line 1 is no record with a step"),
        ("\udcff\n", "not readable"),
    ):
        (tmp_path / "bad.jsonl").write_bytes(content.encode(errors="surrogateescape"))
        status, lines, error = compare(good, tmp_path / "bad.jsonl")
        assert status == 1 and lines == [] and error.startswith("error: ") and problem in error
        assert "bad.jsonl" in error and error.count("\n") == 0
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        status, _, error = compare(path, good)
        assert status == 1 and "metrics.jsonl" in error and str(path) in error
