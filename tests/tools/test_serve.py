"""tools/serve.py: what it refuses, in one sentence each. The server itself: tests/serving/."""

import os
import socket
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def run(pretrain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "run"
    process = pretrain(folder, "training.steps=1", "training.warmup_steps=0")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return folder


def serve(repository, *arguments, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, str(repository / "tools/serve.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


def refused(finished: subprocess.CompletedProcess, words: str) -> None:
    assert finished.returncode == 1, finished.stderr
    assert finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1 and words in finished.stderr
    assert "ready" not in finished.stdout


def test_a_folder_without_a_run(repository, tmp_path):
    refused(serve(repository, "--run", tmp_path, "--port", 0), "config.yaml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batch-size", "0"), "--batch-size"),
        (("--queue", "9"), "at least 10"),
        (("--port", "70000"), "--port is 70000"),
        (("--host", "203.0.113.1"), "--host"),
    ],
)
def test_wrong_arguments(repository, run, arguments, words):
    refused(serve(repository, "--run", run, *arguments), words)


def test_a_port_in_use(repository, run):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused(serve(repository, "--run", run, "--port", port), f"port {port}")


def test_packages_that_are_missing(repository, run, tmp_path):
    """An interpreter that finds no FastAPI: a module of that name that cannot be found is in the way."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\nfind = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'fastapi' else find(name, *more)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    refused(serve(repository, "--run", run, PYTHONPATH=path), "fastapi not installed: pip install")


def test_another_address_is_warned_of(repository, run):
    script = str(repository / "tools/serve.py")
    command = [sys.executable, script, "--run", str(run), "--host", "0.0.0.0", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("ready"):
            break
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == ""
    assert any(line.startswith("warning: whoever reaches 0.0.0.0") for line in lines)
    assert any("loading the newest checkpoint" in line for line in lines), "startup says what it is doing"
