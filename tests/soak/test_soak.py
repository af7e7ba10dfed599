"""A short campaign of the same seed every time: each kind of fault that can be had here at least once."""

import json
import os
import subprocess
import sys
from pathlib import Path

from soak.campaign import PER_ROUND, available
from soak.report import FAILURES

ROUNDS = 3


def test_nothing_is_lost_and_nothing_is_wrong(tmp_path):
    """The command that ``make soak`` runs, ended by its number of rounds."""
    file, tests = tmp_path / "faults.json", Path(__file__).resolve().parents[1]
    options = ["--seed", "7", "--count", str(ROUNDS), "--variants", "3", "--minutes", "5", "--json", str(file)]
    path = os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "soak", *options],
        cwd=tests.parent,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert not [record for record in records if record["outcome"] in FAILURES]
    kinds = available(lambda line: None)
    assert len(kinds) <= ROUNDS * PER_ROUND
    assert {record["kind"] for record in records} == {kind.name for kind in kinds}
