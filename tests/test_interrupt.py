"""Signals: the sentence survives odd folders, a training may answer them, and what does not answer is ended."""

import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from megat2i.interrupt import EXIT_CODE, stopped

BEGIN = """
import time
from megat2i import interrupt
from megat2i.interrupt import SIGNALS, leave_on_interrupt
def sentence():
    {sentence}
leave_on_interrupt(sentence)
"""
DEAF = BEGIN + 'print("ready", flush=True)\ntime.sleep(60)'
# A main thread that saves once it is asked to, and that takes ``seconds`` for its step.
ANSWERS = (
    BEGIN.format(sentence='return "stopped after step 7"')
    + """
SIGNALS.answered_within(lambda: {patience})
print("ready", flush=True)
while not SIGNALS.asked:
    time.sleep(0.01)
time.sleep({seconds})
raise SystemExit(sum(SIGNALS.asked))
"""
)
CTRL_C = "Ctrl-C: the run saves after this step and ends; Ctrl-C again ends it at once, without saving\n"


@contextmanager
def process_of(code: str):
    """A process that runs ``code`` up to its line "ready"; it does not outlive the block."""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def ended(process) -> tuple[int, str]:
    """Exit code, and what was said."""
    _, said = process.communicate(timeout=30)
    return process.returncode, said


def test_a_copy_of_a_checkpoint_is_no_checkpoint(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 412}) + "\n[]\n" + '{"step": 41')
    assert "there is no checkpoint yet: --resume starts from the beginning" in stopped(tmp_path)
    for name in ("step-400", "step-00000500", "step-00000500-copy1", "step-²", "step-" + "9" * 240, "step-"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    said = stopped(tmp_path)
    assert said == "stopped after step 412; the last checkpoint is step 400; --resume continues from there"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_sentence_that_fails_does_not_keep_the_process(number):
    with process_of(DEAF.format(sentence='raise OSError("the disk is gone")')) as process:
        process.send_signal(number)
        assert ended(process)[0] == 128 + number
    assert EXIT_CODE == 130


def test_both_signals_of_a_launcher_are_one_interrupt():
    with process_of(DEAF.format(sentence='return "stopped"')) as process:
        process.send_signal(signal.SIGUSR2)  # nothing to save yet, and nothing to end
        process.send_signal(signal.SIGSTOP)  # so that both are pending when it goes on
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        assert ended(process) == (EXIT_CODE, "stopped\n")


def test_a_training_answers_and_both_signals_of_a_launcher_are_one():
    with process_of(ANSWERS.format(patience=30, seconds=0.5)) as process:
        process.send_signal(signal.SIGSTOP)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
            process.send_signal(number)
        code, said = ended(process)
    assert code == signal.SIGINT + signal.SIGTERM and said.count("\n") == 1


def test_ctrl_c_is_answered_at_once_and_the_second_one_ends_a_long_step():
    with process_of(ANSWERS.format(patience=30, seconds=60)) as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == CTRL_C  # the step takes a minute
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert ended(process) == (EXIT_CODE, "stopped after step 7\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_main_thread_that_does_not_answer_is_ended(number):
    """As one is that sits in a collective whose other ranks are gone."""
    with process_of(ANSWERS.format(patience=0.5, seconds=60)) as process:
        process.send_signal(number)
        code, said = ended(process)
    assert code == 128 + number
    assert said.splitlines()[1:] == ["this step did not end within 0 s, so nothing was saved; stopped after step 7"]


def test_a_warning_alone_ends_nothing():
    """SIGUSR1 comes long before the end: a step that is longer than the patience is no reason to give up."""
    with process_of(ANSWERS.format(patience=0.2, seconds=1.5)) as process:
        process.send_signal(signal.SIGUSR1)
        assert ended(process) == (signal.SIGUSR1, "SIGUSR1: the run saves after this step and ends\n")
