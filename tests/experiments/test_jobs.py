"""Jobs: order, marks of completion, failures, resumption; with real processes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megat2i.experiments.jobs import Job, JobError, run_jobs


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def append(path, word: str) -> str:
    return f"open({str(path)!r}, 'a').write({word!r})"


def writing(tmp_path, name: str, needs=(), more: str = "") -> Job:
    """A job that notes its name in ``order`` and makes its output."""
    code = f"{more}\n{append(tmp_path / 'order', name)}\n{append(tmp_path / name, name)}"
    return Job(name, python(code), tmp_path / name, tuple(needs))


def test_needs_come_first_and_done_jobs_are_not_done_again(tmp_path):
    jobs = [writing(tmp_path, "c", "ab"), writing(tmp_path, "b", "a"), writing(tmp_path, "a")]
    run_jobs(jobs, tmp_path / "jobs", 2)
    assert (tmp_path / "order").read_text() == "abc"
    run_jobs([*jobs, writing(tmp_path, "d", "c")], tmp_path / "jobs", 2)
    assert (tmp_path / "order").read_text() == "abcd"


def test_two_side_by_side(tmp_path):
    """Each waits for what the other makes first: one after the other they would never end."""
    jobs = []
    for name, other in ("ab", "ba"):
        wait = f"import os, time\n{append(tmp_path / f'{name}.begun', name)}\nend = time.time() + 60\n"
        wait += f"while not os.path.exists({str(tmp_path / f'{other}.begun')!r}): assert time.time() < end\n"
        jobs.append(writing(tmp_path, name, more=wait))
    run_jobs(jobs, tmp_path / "jobs", 2)


def test_one_at_a_time(tmp_path):
    jobs = [writing(tmp_path, name, more="import time; time.sleep(1)") for name in "ab"]
    began = time.monotonic()
    run_jobs(jobs, tmp_path / "jobs", 1)
    assert time.monotonic() - began > 2  # a lower bound holds on any machine


def test_a_failure_says_what_the_log_says_and_the_rest_goes_on_later(tmp_path):
    broken = tmp_path / "broken"
    broken.touch()
    code = f"import os, sys; print('out of paper'); sys.exit(3 if os.path.exists({str(broken)!r}) else 0)"
    failing = Job("b", python(code), tmp_path / "a", ("a",), steps=1)  # of a run, so that what is there stays
    jobs = [writing(tmp_path, "a"), failing, writing(tmp_path, "c", "b")]
    with pytest.raises(JobError, match="b ended with exit code 3; .*\n.*\n  out of paper\n"):
        run_jobs(jobs, tmp_path / "jobs", 1)
    assert (tmp_path / "order").read_text() == "a"
    broken.unlink()
    run_jobs(jobs, tmp_path / "jobs", 1)
    assert (tmp_path / "order").read_text() == "ac"


def test_another_command_and_a_lost_output_are_refused(tmp_path):
    run_jobs([writing(tmp_path, "a")], tmp_path / "jobs", 1)
    with pytest.raises(JobError, match="a was done with other command; remove"):
        run_jobs([writing(tmp_path, "a", more="pass")], tmp_path / "jobs", 1)
    (tmp_path / "a").unlink()
    with pytest.raises(JobError, match="made by a and gone since"):
        run_jobs([writing(tmp_path, "a")], tmp_path / "jobs", 1)


def test_half_an_output_is_removed_but_a_run_is_resumed(tmp_path):
    (tmp_path / "a").write_text("half")
    run_jobs([writing(tmp_path, "a")], tmp_path / "jobs", 1)
    assert (tmp_path / "a").read_text() == "a"
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    command = python(f"import sys; open({str(run / 'arguments')!r}, 'a').write(sys.argv[-1])")
    run_jobs([Job("run", command, run, steps=3)], tmp_path / "jobs", 1)
    assert (run / "arguments").read_text() == "--resume"


def test_progress_reads_whole_lines_only(tmp_path):
    job = Job("run", (), tmp_path, steps=9)
    assert job.steps_done() == 0
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 4}) + "\n" + '{"step": 5, "lo')
    assert job.steps_done() == 4
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 6, "x": "y" * 9000}) + "\n")
    assert job.steps_done() == 0


def test_a_changed_input_or_need_is_noticed(tmp_path):
    settings = tmp_path / "settings"
    settings.write_text("1")
    first = Job("a", python(append(tmp_path / "a", "a")), tmp_path / "a", inputs=(settings,))
    second = writing(tmp_path, "b", "a")
    run_jobs([first, second], tmp_path / "jobs", 1)
    settings.write_text("2")
    with pytest.raises(JobError, match="a was done with other inputs"):
        run_jobs([first, second], tmp_path / "jobs", 1)
    (tmp_path / "jobs/a.done.json").unlink()  # made again, and what needs it is not passed off as made from it
    with pytest.raises(JobError, match="b was done with other needs"):
        run_jobs([first], tmp_path / "jobs", 1)
        run_jobs([first, second], tmp_path / "jobs", 1)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_jobs_end_with_the_process_that_started_them(tmp_path, kind):
    job = f"import time; open({str(tmp_path / 'begun')!r}, 'w').close(); time.sleep(60)"
    code = f"""
from pathlib import Path
from megat2i.experiments.jobs import Job, run_jobs
run_jobs([Job("long", {python(job)!r}, Path({str(tmp_path / "out")!r}))], Path({str(tmp_path / "jobs")!r}), 1)
"""
    parent = subprocess.Popen(python(code), stderr=subprocess.DEVNULL)
    wait_until((tmp_path / "begun").exists)
    (child,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    parent.send_signal(kind)
    parent.wait()
    wait_until(lambda: not Path(f"/proc/{child}").exists())


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
