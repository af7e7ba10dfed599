"""Ctrl-C: the sentence survives odd folders, and the process ends whatever becomes of the sentence."""

import json
import signal
import subprocess
import sys

import pytest

from megat2i.interrupt import EXIT_CODE, stopped

DEAF = """
import time
from megat2i.interrupt import leave_on_interrupt
def sentence():
    raise OSError("the disk is gone")
leave_on_interrupt(sentence)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_copy_of_a_checkpoint_is_no_checkpoint(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 412}) + "\n[]\n" + '{"step": 41')
    assert "there is no checkpoint yet: --resume starts from the beginning" in stopped(tmp_path)
    for name in ("step-400", "step-00000500", "step-00000500-copy1", "step-²", "step-" + "9" * 240, "step-"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    said = stopped(tmp_path)
    assert said == "stopped after step 412; the last checkpoint is step 400; --resume continues from there"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sentence_that_fails_does_not_keep_the_process(number):
    command = [sys.executable, "-c", DEAF]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        try:
            process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 128 + number
    assert EXIT_CODE == 130


def test_both_signals_of_a_launcher_are_one_interrupt():
    command = [sys.executable, "-c", DEAF.replace('raise OSError("the disk is gone")', 'return "stopped"')]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)  # so that both are pending when it goes on
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (EXIT_CODE, "stopped\n")
