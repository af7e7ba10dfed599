"""Many real ranks on this machine, in the layouts that the configurations for 64 GPUs ask for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megat2i import config

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


def distinct() -> list[Path]:
    """Configurations of whole clusters, one for every layout."""
    found = {}
    for path in CONFIGS:
        settings = config.load(path)
        if settings.data.sequence_length > 1000:  # not the demo's
            found.setdefault(settings.parallel, path)
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [16, pytest.param(64, marks=pytest.mark.full)])
def test_many_ranks_compute_what_one_process_does(repository, ranks):
    files = distinct()
    assert len(files) >= 3
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(Path(__file__).with_name("many_ranks.py")),
        str(ranks),
        *map(str, files),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=repository)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    print({name: f"{layout['seconds']:.1f} s" for name, layout in found["layouts"].items()})
    print(f"{found['seconds']:.0f} s and {found['gb']:.1f} GB in all")
    assert set(found["layouts"]) == {path.stem for path in files}
    for name, layout in found["layouts"].items():
        assert all(steps == layout["steps"][0] for steps in layout["steps"]), f"{name}: ranks report different losses"
        for (loss, norm), (right_loss, right_norm) in zip(layout["steps"][0], found["alone"], strict=True):
            assert abs(loss - right_loss) < 1e-6 * right_loss, name
            assert abs(norm - right_norm) < 1e-5 * right_norm, name
    assert found["gb"] < 12
