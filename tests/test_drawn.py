"""Pictures that a run drew on its way: read back as written, cut back by a resume, never seen half-written."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from megat2i.drawn import FOLDER, read_steps, remove_steps_after, save_step
from megat2i.files import DataFileError
from megat2i.metrics import MetricsLog

PROMPTS = ["a hut", "<script>, “moon” 月"]


def pictures(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (2, 3, 8, 8), np.uint8)


@pytest.fixture
def run(tmp_path):
    for step in (900, 1_200_000, 30):
        save_step(tmp_path, step, pictures(step), PROMPTS)
    return tmp_path


def test_steps_come_back_in_order(run):
    steps = read_steps(run)
    assert [drawn.step for drawn in steps] == [30, 900, 1_200_000]
    for drawn in steps:
        assert drawn.prompts == PROMPTS and np.array_equal(drawn.images, pictures(drawn.step))
    with Image.open(run / FOLDER / "step-000900.png") as strip:
        assert strip.size == (16, 8)


def test_a_step_done_again_replaces_the_first(run):
    save_step(run, 900, pictures(7)[:1], ["other"])
    assert read_steps(run)[1].prompts == ["other"] and np.array_equal(read_steps(run)[1].images, pictures(7)[:1])
    assert len(list((run / FOLDER).iterdir())) == 6


def test_a_resume_removes_later_steps_and_half_written_ones(run):
    (run / FOLDER / "step-000030.png.7-ab.tmp").write_bytes(b"half")
    (run / FOLDER / "notes.txt").write_text("mine")
    remove_steps_after(run, 900)
    names = sorted(path.name for path in (run / FOLDER).iterdir())
    assert names == ["notes.txt", "step-000030.json", "step-000030.png", "step-000900.json", "step-000900.png"]
    remove_steps_after(run / "empty", 0)


def test_the_log_keeps_the_pictures_and_cuts_them_back(run):
    log = MetricsLog(run, 899)
    assert [drawn.step for drawn in read_steps(run)] == [30]
    log.images(901, pictures(1), PROMPTS)
    log.close()
    assert [drawn.step for drawn in read_steps(run)] == [30, 901]


def test_a_kill_between_the_files_leaves_no_step(run, monkeypatch):
    rename, renamed = os.replace, []

    def killed(temporary, path):
        if renamed:
            raise KeyboardInterrupt
        renamed.append(path)
        rename(temporary, path)

    monkeypatch.setattr("megat2i.files.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_step(run, 1000, pictures(0), PROMPTS)
    assert [drawn.step for drawn in read_steps(run)] == [30, 900, 1_200_000]
    assert not list((run / FOLDER).glob("*.tmp"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("step-000030.json", b"{", "step-000030.json: not readable as JSON"),
        ("step-000030.json", b'{"step": 30, "prompts": []}', "lists no step with prompts"),
        ("step-000030.json", json.dumps({"step": 30, "prompts": ["a"] * 3}).encode(), "not 3 pictures"),
        ("step-000030.png", b"no picture", "step-000030.png: not readable as a picture"),
    ],
)
def test_a_damaged_step_is_one_sentence(run, name, content, words):
    (run / FOLDER / name).write_bytes(content)
    with pytest.raises(DataFileError, match=words):
        read_steps(run)
