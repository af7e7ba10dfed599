"""A kill at any file operation of a writer: the same command, or ``--resume``, goes on, and nothing is left over."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kill_points import exit_code, kill_points
from PIL import Image

from megat2i import drawn, metrics, run_folder
from megat2i.data.array_job import write_once
from megat2i.data.fit_tokenizers import _publish
from megat2i.files import pending_folder, write_file
from megat2i.pictures import save_png
from megat2i.tokenizers.tokenizer_file import tokenizer_file_content, write_tokenizer_file


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def renew(folder: Path, template: Path | None = None):
    """Function that makes ``folder`` a copy of ``template``, or absent."""

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if template:
            shutil.copytree(template, folder)

    return prepare


@pytest.fixture
def launch(run_config, tmp_path, monkeypatch):
    """Function of (resume, other settings) that writes the run folder ``tmp_path`` / "run" as a launch does."""
    monkeypatch.setattr(run_folder, "_git_commit", lambda: None)  # two processes, and nothing to kill
    settings = run_config(tmp_path / "run")

    def write(resume: bool, stop_at: int | None = None) -> None:
        changed = replace(settings, training=replace(settings.training, stop_at=stop_at))
        run_folder.check(tmp_path / "run", changed, resume)
        run_folder.write(tmp_path / "run", changed, "torch", {"layout": "1.1.1"}, resume)

    return write


def test_a_first_launch_starts_again_with_the_same_command_and_goes_on_with_resume(launch, tmp_path, stride):
    run = tmp_path / "run"
    launch(resume=False)
    expected, resumable = contents(run), 0
    for _ in kill_points(run, renew(run), lambda: launch(resume=False), stride):
        if (run / "config.yaml").exists():
            resumable += 1
            renew(tmp_path / "copy", run)()
            launch(resume=True, stop_at=3)
            assert contents(run).keys() == expected.keys()
            renew(run, tmp_path / "copy")()
        else:
            with pytest.raises(run_folder.RunError, match="no run to resume; start without --resume"):
                launch(resume=True)
        launch(resume=False)
        assert contents(run).keys() == expected.keys()
        assert all(contents(run)[name] == expected[name] for name in expected if name != "environment.json")
    assert resumable >= 2


def test_a_resumed_launch_can_be_resumed_and_touches_neither_settings_nor_tokenizers(launch, tmp_path):
    run, begun = tmp_path / "run", tmp_path / "begun"
    launch(resume=False)
    (run / "metrics.jsonl").write_text("")
    shutil.copytree(run, begun)
    before, points = contents(run), 0
    for number in kill_points(run, renew(run, begun), lambda: launch(resume=True, stop_at=4)):
        points = number
        present = contents(run)
        assert all(present[name] == before[name] for name in before if name != "environment.json")
        launch(resume=True, stop_at=5)
        assert contents(run).keys() == before.keys()
        environment = json.loads((run / "environment.json").read_text())
        assert environment["changed_settings"] == {"training.stop_at": 5} and 1 <= len(environment["earlier"]) <= 2
    assert points >= 5


def test_the_record_of_a_run_is_the_old_or_the_new_one(tmp_path):
    run, begun = tmp_path / "run", tmp_path / "begun"
    begun.mkdir()
    lines = [json.dumps({"step": step, "loss": 1.5}) + "\n" for step in range(1, 6)]
    (begun / "metrics.jsonl").write_text("".join(lines) + '{"step": 6')
    images = np.zeros((2, 3, 8, 8), np.uint8)
    for step in (2, 5):
        drawn.save_step(begun, step, images, ["a", "b"])

    def resume() -> None:
        log = metrics.MetricsLog(run, 3)
        log.images(4, images, ["a", "b"])
        log.close()

    for _ in kill_points(run, renew(run, begun), resume):
        assert contents(run)["metrics.jsonl"].decode() in ("".join(lines) + '{"step": 6', "".join(lines[:3]))
        assert {found.step for found in drawn.read_steps(run)} <= {2, 4, 5}  # readable, whatever is there
        run_folder._remove_leftovers(run)
        assert exit_code(resume) == 0
        present = contents(run)
        assert present["metrics.jsonl"].decode() == "".join(lines[:3])
        assert [found.step for found in drawn.read_steps(run)] == [2, 4]
        assert not [name for name in present if name.endswith(".tmp")]


def test_a_folder_that_is_written_at_once_is_complete_or_absent(tmp_path):
    folder = tmp_path / "out" / "weights"

    def write() -> None:
        with pending_folder(folder) as pending:
            (pending / "sub").mkdir()
            for name in ("a", "sub/b"):
                (pending / name).write_text(name)

    for _ in kill_points(tmp_path / "out", renew(tmp_path / "out"), write):
        if not folder.exists():
            write()
        assert contents(folder) == {"a": b"a", "sub/b": b"sub/b"}


TOKENIZER = tokenizer_file_content({"x": torch.zeros(3)}, {"kind": "patch"})
PICTURE = Image.new("RGB", (4, 4))
SINGLE_FILES = {
    "write_file": lambda path: write_file(path, b"content"),
    "a picture": lambda path: save_png(PICTURE, path),
    "a tokenizer's file": lambda path: write_tokenizer_file(path, TOKENIZER),
    "a fitted tokenizer": lambda path: _publish(path, True, lambda temporary: temporary.write_bytes(b"codes")),
}


@pytest.mark.parametrize("writer", SINGLE_FILES)
@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_is_the_old_or_the_new_one(tmp_path, writer, replaced):
    path, begun = tmp_path / "out" / "file", tmp_path / "begun"
    begun.mkdir()
    if replaced:
        (begun / "file").write_bytes(b"old")
    write = SINGLE_FILES[writer]
    write(tmp_path / "expected")
    allowed = {b"old" if replaced else None, (tmp_path / "expected").read_bytes()}
    for _ in kill_points(path.parent, renew(path.parent, begun), lambda: write(path)):
        assert (path.read_bytes() if path.exists() else None) in allowed
        write(path)
        assert path.read_bytes() == (tmp_path / "expected").read_bytes()


def test_a_file_that_is_written_once_is_complete_or_absent(tmp_path):
    path = tmp_path / "out" / "job.json"
    (tmp_path / "begun").mkdir()
    for _ in kill_points(path.parent, renew(path.parent, tmp_path / "begun"), lambda: write_once(path, b"job")):
        write_once(path, b"job")
        assert path.read_bytes() == b"job"
