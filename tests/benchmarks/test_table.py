"""The README's tables are those of the committed records; what a record's rows become."""

import importlib.util
import json

import pytest


@pytest.fixture(scope="module")
def maker(repository):
    spec = importlib.util.spec_from_file_location("table", repository / "benchmarks/table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_has_the_tables_of_the_records(maker):
    readme = maker.README.read_text()
    made = maker.with_tables(readme, maker.tables(maker.newest(maker.RESULTS)))
    assert readme == made, "run python benchmarks/table.py --write"
    assert maker.newest(maker.RESULTS) or maker.NONE_YET in readme


RECORD = {
    "device": "NVIDIA X",
    "head": {
        "environment": {"command": "python b.py", "git_commit": None, "started": "2026-01-02T", "versions": {"a": "1"}},
        "gpu": {"driver": "580", "sm_mhz": "1980"},
        "sections": {
            "flat": {
                "ours": {"ms": 12.345, "min": 12.0, "max": 1500.5, "rounds": 3, "mfu": 0.4567, "parts": {"head": 1}},
                "Liger": {"skipped": "not | installed"},
                "other": {"ms": 0.1234, "min": 0.1, "max": 0.2, "tokens_per_s": 12345.6},
            }
        },
    },
}


def test_rows_of_a_record(maker, tmp_path):
    for date in ("2026-01-02", "2026-01-03"):
        (tmp_path / f"nvidia-x-{date}.json").write_text(json.dumps(RECORD))
    (tmp_path / "nvidia-y-2025-01-01.json").write_text(json.dumps(RECORD | {"device": "NVIDIA Y"}))
    newest = maker.newest(tmp_path)
    assert sorted(path.name for path in newest) == ["nvidia-x-2026-01-03.json", "nvidia-y-2025-01-01.json"]
    text = maker.tables(newest)
    assert "### NVIDIA X: head" in text and "### NVIDIA Y: head" in text and "Driver 580, 1980 MHz" in text
    assert "|  | ms (smallest, largest) | MFU | tokens/s |" in text
    assert "| ours | 12.3 (12, 1,500) | 45.7% |  |" in text
    assert "| Liger | not / installed |  |  |" in text
    assert "| other | 0.123 (0.1, 0.2) |  | 12,346 |" in text


def test_without_records_the_table_says_so(maker, tmp_path):
    assert maker.tables(maker.newest(tmp_path)) == maker.NONE_YET
