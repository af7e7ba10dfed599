"""The demo's driver: its commands fit its configuration, failures are said, and nothing outlives it."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megat2i import config
from megat2i.interrupt import EXIT_CODE

SLEEPER = "import os, time; print(os.getpid(), flush=True); time.sleep(120)"


@pytest.fixture(scope="module")
def demo(repository):
    spec = importlib.util.spec_from_file_location("demo", repository / "tools/demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_data_are_those_that_the_configuration_expects(demo, repository):
    settings = config.load(repository / demo.CONFIG)
    options = dict(zip(demo.TOKENIZERS[::2], demo.TOKENIZERS[1::2], strict=True))
    options |= dict(zip(demo.PATCHES[::2], demo.PATCHES[1::2], strict=True))
    assert int(options["--codebook-size"]) == settings.vocab.image_codes
    assert int(options["--train-text-tokenizer"]) == settings.vocab.text_tokens
    image_tokens = (int(options["--image-size"]) // int(options["--patch-size"])) ** 2
    assert settings.data.sequence_length - image_tokens - 6 >= 12  # room for all but a handful of captions
    assert settings.data.train[0].prefix == f"{demo.DATA}/train" and settings.data.valid == f"{demo.DATA}/valid"
    assert settings.run.dir == str(demo.RUN)
    assert settings.runtime.dtype == "auto", "another recipe on other processors"


def test_a_failure_names_the_part_and_how_to_go_on(demo):
    with pytest.raises(SystemExit) as failure:
        demo.run("Training", sys.executable, "-c", "raise SystemExit(3)")
    message = str(failure.value)
    assert message.startswith("error: 'Training' failed with exit code 3; `make demo` goes on from there")
    assert f"{demo.DATA} and {demo.RUN}" in message


def test_a_part_that_was_interrupted_has_said_so_itself(demo):
    with pytest.raises(SystemExit) as failure:
        demo.run("Training", sys.executable, "-c", f"raise SystemExit({EXIT_CODE})")
    assert failure.value.code == EXIT_CODE


def test_a_killed_demo_takes_its_part_with_it(repository):
    source = (
        f"import sys; sys.path.insert(0, 'tools'); import demo; demo.run('part', sys.executable, '-c', {SLEEPER!r})"
    )
    driver = subprocess.Popen([sys.executable, "-c", source], cwd=repository, stdout=subprocess.PIPE, text=True)
    lines = iter(driver.stdout.readline, "")
    part = int(next(line for line in lines if line.strip().isdigit()))
    assert is_running(part)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    deadline = time.monotonic() + 30
    while is_running(part) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(part)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"
