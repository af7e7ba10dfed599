"""How a run stands is told from its folder alone, whatever became of its files."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megat2i import run_status
from megat2i.files import DataFileError
from megat2i.run_owner import Owner
from megat2i.run_status import Metrics, RunStatus, duration
from megat2i.status_screen import lines

CONFIG = "training: {steps: 100, stop_at: null}\n"
ENVIRONMENT = {"backend": "device=cpu", "layout": "1.1.2", "resumed_from": "r/checkpoints/step-20", "earlier": [{}, {}]}


def entry(step: int, **changed) -> dict:
    values = {"loss/text": 3.0, "loss/image": 4.0, "tokens_per_s": 1000.0, "step_s": 0.5, "mfu": None}
    return {"step": step, **values, "skipped": 0, "spike": 0} | changed


def owner(folder: Path, suffix: str = ".json", **changed) -> None:
    """An owner file: of this process, except for what is ``changed``."""
    (folder / "lock").mkdir(exist_ok=True)
    (folder / "lock" / f"000001{suffix}").write_text(json.dumps(asdict(replace(Owner.here(), **changed))))


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run that this process trains, 40 of 100 steps so far; its launch began 15 s before step 40."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "environment.json").write_text(json.dumps(ENVIRONMENT))
    entries = [entry(step, skipped=int(step == 30), spike=int(step in (30, 31))) for step in range(1, 41)]
    entries += [{"step": 40, "split": "valid", "loss/text": 3.5, "loss/image": 4.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    (tmp_path / "checkpoints" / "step-20").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-20" / "manifest.json").write_bytes(b"0" * 1500)
    (tmp_path / "checkpoints" / "step-30.writing").mkdir()
    owner(tmp_path)
    age(tmp_path / "environment.json", 20)
    age(tmp_path / "metrics.jsonl", 5)
    return tmp_path


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_a_run_that_trains(run):
    (run / "triggers").mkdir()
    (run / "triggers" / "job_end").write_text(json.dumps({"job": "7", "restart": "0", "end": int(time.time()) + 3700}))
    (run / "slowest_rank.json").write_text(
        json.dumps({"step": 40, "rank": 3, "host": "n2", "slower": 0.31, "clearly": True})
    )
    screen = "\n".join(lines(RunStatus(run).look()))
    assert f"process {os.getpid()} on {os.uname().nodename}, since" in screen
    for text in (
        "health         alive: last step 5 s ago, usually one every 0.5 s\n",
        "step           40 of 100 (40%)\n",
        "time left      45 s of the schedule; job 7 ends in 1:01:",  # 60 steps of the launch's 15 s / 20 steps
        "speed          1,000 tokens/s, 0.5 s a step\n",
        "training loss  text 3.000, image 4.000 (mean of up to 50 steps)\n",
        "held-out       text 3.500, image 4.500 (step 40)\n",
        "checkpoint     step 20, 0 s ago, 20 steps behind, 1.5 kB\n",
        "slowest rank   rank 3 on n2, 31% slower than the median (step 40)\n",
        "updates        1 skipped, 2 spikes, 0 rewinds\n",
        "restarts       2, the last from r/checkpoints/step-20\n",
        "machine        device=cpu layout=1.1.2",
    ):
        assert text in screen, screen
    assert screen.count("\n") + 1 <= 15


def dead(run: Path) -> None:
    owner(run, started=1)


def released(run: Path) -> None:
    (run / "lock" / "000001.json").rename(run / "lock" / "000001.released")


def finished(run: Path) -> None:
    released(run)
    (run / "finished").write_text('{"step": 100}')


def finished_before_there_was_a_file(run: Path) -> None:
    (run / "lock" / "000001.json").unlink()
    (run / "metrics.jsonl").write_text(json.dumps(entry(100)) + "\n")


def interrupted(run: Path) -> None:
    released(run)
    (run / "interrupted").write_text('{"step": 40, "reason": "SIGUSR1"}')


def stopped(run: Path) -> None:
    released(run)
    (run / "environment.json").write_text(json.dumps(ENVIRONMENT | {"changed_settings": {"training.stop_at": 40}}))


def of_an_older_version(run: Path) -> None:
    (run / "lock" / "000001.json").unlink()
    (run / "lock").rmdir()


def dead_and_named(run: Path) -> None:
    dead(run)
    (run / "hang").mkdir()
    (run / "hang" / "launch-ended.txt").write_text("rank 1 on n2 has ended, step 41\nits stack\n")


def still(run: Path) -> None:
    (run / "checkpoints" / "step-30.writing").rmdir()
    age(run / "environment.json", 300)
    age(run / "metrics.jsonl", 125)


def writes_a_checkpoint(run: Path) -> None:
    age(run / "environment.json", 300)
    age(run / "metrics.jsonl", 125)


def starting(run: Path) -> None:
    age(run / "environment.json", 1)


@pytest.mark.parametrize(
    ("change", "health"),
    [
        (dead, "dead: its processes have ended without a word; last step 5 s ago; --resume continues"),
        (dead_and_named, "dead: rank 1 on n2 has ended, step 41"),
        (released, "dead: its processes have ended without a word"),
        (finished, "finished: after step 100"),
        (finished_before_there_was_a_file, "finished: after step 100"),
        (interrupted, "interrupted: by SIGUSR1 after step 40; --resume continues"),
        (stopped, "stopped: at training.stop_at; --resume training.stop_at=null continues to step 100"),
        (of_an_older_version, "unknown: the folder has no lock, as runs of older versions; last step 5 s ago"),
        (still, "standing still: no step since "),
        (writes_a_checkpoint, "alive: writing a checkpoint; last step 2:05 ago"),
        (starting, "starting: no step of this launch yet"),
    ],
)
def test_its_health(run, change, health):
    change(run)
    row = next(line for line in lines(RunStatus(run).look()) if line.startswith("health"))
    assert row.startswith(f"health         {health}")


@pytest.mark.parametrize("beats", [True, False])
def test_a_run_of_another_machine_lives_while_its_heartbeat_changes(run, beats, monkeypatch):
    monkeypatch.setattr(run_status, "HEARTBEAT_S", 0.5)
    owner(run, host="n9", machine="other", boot="other")
    path, ended = run / "lock" / "000001.json", threading.Event()
    age(path, 7200)  # its clock is two hours late

    def beat() -> None:
        while not ended.wait(0.1):
            age(path, 7200)

    thread = threading.Thread(target=beat)
    if beats:
        thread.start()
    state = RunStatus(run).look()["health"]["state"]
    ended.set()
    if beats:
        thread.join()
    assert state == ("alive" if beats else "dead")


def snapshot(folder: Path) -> list:
    stats = [(path, path.lstat()) for path in sorted(folder.rglob("*"))]
    return [(path, stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in stats]


@pytest.mark.parametrize(
    "name", ["config.yaml", "environment.json", "metrics.jsonl", "lock/000001.json", "interrupted"]
)
def test_damaged_files_are_named_and_nothing_is_written(run, name):
    interrupted(run)
    owner(run, started=1)
    path, generator = run / name, random.Random(name)
    content, named = path.read_bytes(), 0
    for _ in range(60):
        damaged = bytearray(content[: generator.randrange(len(content) + 1)])
        for _ in range(generator.randrange(4)):
            if damaged:
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        before = snapshot(run)
        screen = lines(RunStatus(run).look())
        assert snapshot(run) == before
        problems = [line for line in screen if line.startswith("problem")]
        assert all(str(path) in line for line in problems)
        named += bool(problems)
    assert named > 10 or name == "lock/000001.json"  # its reader takes any damaged one for a launch of unknown host


@pytest.mark.parametrize("content", ["[]", "3", '"x"', '{"step": "x"}', "null", '{"earlier": 3, "resumed_from": []}'])
def test_files_of_another_shape_do_no_harm(run, content):
    for name in ("config.yaml", "environment.json", "interrupted", "slowest_rank.json", "metrics.jsonl"):
        (run / name).write_text(content + "\n")
    assert 10 < len(lines(RunStatus(run).look())) < 20


def test_what_holds_no_run_is_refused(tmp_path):
    with pytest.raises(DataFileError, match="holds no run. Give the folder that run.dir names"):
        RunStatus(tmp_path)


def test_records_are_read_on_from_where_they_ended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(entry(1)) + "\n" + json.dumps(entry(2))[:20])
    metrics = Metrics(path)
    metrics.update()
    assert metrics.last["step"] == 1 and metrics.damaged == 0
    path.write_text(json.dumps(entry(1)) + "\n" + json.dumps(entry(2, skipped=1)) + "\n")
    metrics.update()
    assert (metrics.last["step"], metrics.skipped) == (2, 1)
    other = tmp_path / "other"
    other.write_text(json.dumps(entry(1)) + "\n")
    other.rename(path)  # as a resumed run drops what it does again
    metrics.update()
    assert (metrics.last["step"], metrics.skipped) == (1, 0)


def test_durations():
    texts = [duration(seconds) for seconds in (3.9, 125, 3600, 86_400 * 2 + 5)]
    assert texts == ["3 s", "2:05", "1:00:00", "2 days 0:00:05"]


@pytest.fixture
def tool(repository):
    """Function of (arguments) -> command of tools/status.py."""
    return lambda *arguments: [sys.executable, str(repository / "tools/status.py"), *map(str, arguments)]


def test_the_help_lists_every_key(tool, run):
    printed = json.loads(subprocess.check_output(tool(run, "--json")))
    described = subprocess.check_output(tool("--help"), text=True)
    missing = [key for key in printed if f"\n{key}" not in described and f", {key}" not in described]
    assert missing == []
    refused = subprocess.run(tool(run / "checkpoints"), capture_output=True, text=True)
    assert refused.returncode == 1 and refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1


def test_a_watched_run_gets_a_line_a_change_in_a_log_and_ctrl_c_ends_it(tool, run):
    process = subprocess.Popen(tool(run, "--watch", "0.1"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().endswith(" alive, step 40 of 100, training loss text 3.000, image 4.000\n")
    time.sleep(0.3)  # nothing changes: no line
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(entry(41)) + "\n")
    assert " alive, step 41 of 100, " in process.stdout.readline()
    process.send_signal(2)
    output, errors = process.communicate(timeout=10)
    assert (process.returncode, output, errors) == (130, "", "the run itself goes on\n")


def test_a_watched_run_is_drawn_anew_in_a_terminal(tool, run):
    terminal, side = os.openpty()
    process = subprocess.Popen(tool(run, "--watch", "0.1"), stdout=side, stderr=side)
    os.close(side)
    shown = b""
    while shown.count(b"\033[H\033[2Jrun ") < 3:
        shown += os.read(terminal, 4096)
    process.send_signal(2)
    assert process.wait(10) == 130
    os.close(terminal)
