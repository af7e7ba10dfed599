"""What a machine lacks is one sentence: tools/check_machine.sh and tools/install.py, run for real."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

HERE = os.path.realpath(sys.executable)
# What an index of packages that nothing answers for looks like, whatever this machine's pip is told otherwise.
OFFLINE = {
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_FIND_LINKS": "",
    "PIP_RETRIES": "1",
    "PIP_NO_CACHE_DIR": "1",
}


@pytest.fixture
def machine(tmp_path, repository):
    """Function of (commands, arguments, variables) -> what the check says on a machine that has these commands only.

    ``commands``: name -> the program, or the text of a shell script.
    """

    def check(commands: dict[str, str], *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, program in ({"uname": shutil.which("uname")} | commands).items():
            if os.path.isabs(program):
                (folder / name).symlink_to(program)
            else:
                (folder / name).write_text(f"#!/bin/sh\n{program}\n")
                (folder / name).chmod(0o755)
        script = str(repository / "tools/check_machine.sh")
        environment = {"PATH": str(folder)} | variables
        return subprocess.run(["/bin/sh", script, *arguments], env=environment, capture_output=True, text=True)

    return check


def test_a_machine_with_python_alone_is_enough_for_the_demo(machine):
    finished = machine({"python3": HERE})
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "python3, sentence",
    [
        (None, "Python 3.11 or newer (no 'python3' found; name another with make PYTHON=...)"),
        (
            'case "$1" in --version) echo Python 3.9.2;; *) exit 1;; esac',
            "Python 3.11 or newer ('python3' is Python 3.9.2; name another with make PYTHON=...)",
        ),
    ],
)
def test_python_is_absent_or_old(machine, python3, sentence):
    finished = machine({"python3": python3} if python3 else {})
    assert (finished.returncode, finished.stderr) == (1, f"This machine lacks: {sentence}.\n")


def test_python_has_no_venv(machine, tmp_path):
    (tmp_path / "ensurepip.py").write_text("raise ImportError('as Debian ships it')")
    finished = machine({"python3": HERE}, PYTHONPATH=str(tmp_path))
    sentence = "This machine lacks: Python's venv module (Debian: apt install python3-venv).\n"
    assert (finished.returncode, finished.stderr) == (1, sentence)


def test_another_system(machine):
    finished = machine({"python3": HERE, "uname": "echo Darwin"})
    sentence = "This machine lacks: Linux (DeepSpeed's launcher and the tests' Triton need it).\n"
    assert (finished.returncode, finished.stderr) == (1, sentence)


def test_a_compiler_is_asked_for_where_it_is_needed(machine):
    headers_elsewhere = f'case "$2" in *sysconfig*) echo /nowhere;; *) exec {HERE} "$@";; esac'
    finished = machine({"python3": headers_elsewhere}, "compiler")
    headers = "Python's headers (Debian: apt install python3-dev)"
    compiler = "a C++ compiler for torch.compile (Debian: apt install g++)"
    assert (finished.returncode, finished.stderr) == (1, f"This machine lacks: {headers}, {compiler}.\n")


@pytest.fixture
def install(repository):
    """Function of a folder -> the command that fills it, as the keywords of subprocess.Popen."""

    def command(folder, **variables: str) -> dict:
        arguments = [HERE, str(repository / "tools/install.py"), str(folder), "demo"]
        return {"args": arguments, "env": os.environ | OFFLINE | variables, "text": True}

    return command


def sentence_of(command: dict, timeout: float = 100.0) -> tuple[str, str]:
    """Standard output, and the one line of standard error, of a command that fails."""
    finished = subprocess.run(**command, capture_output=True, timeout=timeout)
    assert finished.returncode == 1
    assert finished.stderr.count("\n") == 1
    return finished.stdout, finished.stderr


def test_an_interrupted_installation_is_made_anew_and_no_network_is_one_sentence(install, tmp_path):
    folder = tmp_path / "env"
    with subprocess.Popen(**install(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 100
        while not (folder / "bin/python").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=100)
    assert (process.returncode, error) == (1, "\nInterrupted: the same command begins anew.\n")
    half = folder / "lib/half"
    half.write_text("what pip had unpacked")

    said, sentence = sentence_of(install(folder))
    assert "is half made, since the last installation did not end: it is made anew" in said
    assert not half.exists()
    assert sentence.startswith("No package index can be reached (Connection refused): see to the network")
    assert "Connection refused" in (folder / "install.log").read_text()
    assert not list(folder.glob(".installed*"))


def test_an_update_that_fails_leaves_what_was_there(install, tmp_path):
    folder = tmp_path / "env"
    sentence_of(install(folder))  # leaves an environment without packages
    (folder / ".installing").unlink()
    (folder / ".installed").touch()
    package = folder / "lib/package"
    package.write_text("what the user added")
    for _ in range(2):
        said, _ = sentence_of(install(folder))
        assert "made anew" not in said and package.exists()
        assert not (folder / ".installed").exists()


def test_a_folder_of_other_files_is_refused(install, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".installing").touch()
    _, sentence = sentence_of(install(tmp_path))
    assert sentence == f"{tmp_path} holds files and is no virtual environment: name another folder.\n"
    assert (tmp_path / "notes.txt").exists()


def test_one_installation_at_a_time(install, tmp_path):
    with (tmp_path / ".installing").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        _, sentence = sentence_of(install(tmp_path))
    assert sentence == f"Another command is filling {tmp_path}; start this one when that is done.\n"


@pytest.fixture
def small_disk(tmp_path):
    """Folder on a file system of 12 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_sentence_before_and_during_the_installation(install, small_disk):
    folder = small_disk / "env"
    needs = "free): the environment needs 1.8 GB with a CPU build of PyTorch, 10 GB with a CUDA build.\n"
    said, sentence = sentence_of(install(folder))
    assert sentence == f"The disk of {folder} is too full (0.0 GB {needs}"
    assert "Installing" not in said

    # with PyTorch there the rest is small, and begins: the copy of pip fills the disk
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    shutil.rmtree(folder)
    (folder / "lib" / version / "site-packages/torch").mkdir(parents=True)
    said, sentence = sentence_of(install(folder))
    assert "Installing" in said
    assert sentence == f"The disk of {folder} is too full (0.0 GB {needs}"
