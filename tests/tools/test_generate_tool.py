"""tools/generate.py over many prompts: from a file, killed and started again, and started over where that is needed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

PROMPTS = [f"{color} {shape}" for color in ("red", "green", "blue") for shape in ("circle", "square", "hut")] * 4


@pytest.fixture(scope="module")
def run(pretrain, tmp_path_factory):
    """Folder of a tiny run after two steps; its checkpoints are of both."""
    folder = tmp_path_factory.mktemp("generate") / "run"
    process = pretrain(folder, "training.steps=2", "training.warmup_steps=1", "training.checkpoint_every=1")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    (folder.parent / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n")
    return folder


def start(repository, run, output, *more) -> subprocess.Popen:
    command = [sys.executable, str(repository / "tools/generate.py"), "--run", run, "--output", output]
    command += ["--prompts-file", run.parent / "prompts.txt", "--batch-size", 1, "--temperature", 3, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def finish(process: subprocess.Popen) -> None:
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def images(folder) -> dict[str, tuple[bytes, int]]:
    """Content and time of writing of every image."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("0*.png")}


@pytest.fixture(scope="module")
def whole(repository, run):
    output = run.parent / "whole"
    finish(start(repository, run, output))
    return output


def test_every_line_of_the_file_is_drawn(whole):
    lines = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    assert sorted(images(whole)) == [line["file"] for line in lines] and (whole / "grid.png").exists()
    assert len({line["weights_sha256"] for line in lines}) == 1


def test_prompts_from_objects(repository, run, whole, tmp_path):
    """A .jsonl file of prompts, as the paper's reference.jsonl; its other keys do not matter."""
    listing = tmp_path / "reference.jsonl"
    listing.write_text("".join(json.dumps({"prompt": prompt, "file": "x.png"}) + "\n" for prompt in PROMPTS))
    finish(start(repository, run, tmp_path / "out", "--prompts-file", listing))
    assert (tmp_path / "out/samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    listing.write_text('{"file": "x.png"}\n')
    process = start(repository, run, tmp_path / "refused", "--prompts-file", listing)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "reference.jsonl: a line is not an object with a prompt (KeyError" in err


def test_a_killed_call_goes_on(repository, run, whole, tmp_path):
    process = start(repository, run, tmp_path / "out")
    while len(images(tmp_path / "out")) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = images(tmp_path / "out")
    assert 3 <= len(before) < len(PROMPTS), "not killed between the first and the last image"
    finish(start(repository, run, tmp_path / "out"))
    after = images(tmp_path / "out")
    assert {name: after[name] for name in before} == before, "an image was drawn twice"
    assert {name: content for name, (content, _) in after.items()} == {
        name: content for name, (content, _) in images(whole).items()
    }
    assert (tmp_path / "out/samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def test_ctrl_c_is_one_sentence_and_the_same_command_goes_on(repository, run, tmp_path):
    process = start(repository, run, tmp_path / "out")
    while len(images(tmp_path / "out")) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err
    assert err.splitlines()[-1] == "interrupted; the same command goes on where it was"
    before = images(tmp_path / "out")
    assert 2 <= len(before) < len(PROMPTS)
    finish(start(repository, run, tmp_path / "out"))
    assert {name: images(tmp_path / "out")[name] for name in before} == before


def test_other_settings_or_other_weights_start_over(repository, run, whole, tmp_path):
    output, moved = shutil.copytree(whole, tmp_path / "out"), shutil.copytree(run, tmp_path / "run")
    shutil.copy(run.parent / "prompts.txt", tmp_path)
    kept = images(output)
    finish(start(repository, moved, output))
    assert images(output) == kept, "the same weights elsewhere are the same"
    finish(start(repository, moved, output, "--temperature", 2))
    warmer = images(output)
    assert all(kept[name][1] != written for name, (_, written) in warmer.items())
    shutil.rmtree(max((moved / "checkpoints").glob("step-*")))
    finish(start(repository, moved, output, "--temperature", 2))
    assert all(warmer[name][1] != written for name, (_, written) in images(output).items())
    assert any(warmer[name][0] != content for name, (content, _) in images(output).items())
