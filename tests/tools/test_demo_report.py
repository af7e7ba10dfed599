"""The demo's report: curves from metrics.jsonl alone, fixed prompts, true pictures as the font draws them."""

import importlib.util
import json
import math

import pytest
import torch
from PIL import Image


@pytest.fixture(scope="module")
def report(repository):
    spec = importlib.util.spec_from_file_location("demo_report", repository / "tools/demo_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entry(step, loss, **more):
    losses = {"loss": loss, "loss/text": loss / 2, "loss/image": loss * 2}
    return {"step": step, **losses, "ppl/text": math.exp(loss / 2), "ppl/image": math.exp(loss * 2), **more}


def test_curves_are_drawn_from_the_record(report, tmp_path):
    entries = [entry(step, 5 / step) for step in range(1, 40)] + [entry(39, 1.0, split="valid")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    report.plot_curves(tmp_path)
    first = (tmp_path / "curves.png").read_bytes()
    assert Image.open(tmp_path / "curves.png").width > 1000
    entries[20] |= entry(21, 4.0)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    report.plot_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes() != first, "another record, the same curves"


def test_a_moving_average_has_no_bias_at_its_start(report):
    assert report.smoothed([3.0] * 5) == pytest.approx([3.0] * 5)
    values = report.smoothed([0.0] * 50 + [1.0] * 200)
    assert values[49] == 0 < values[60] < values[100] < 1 and values[-1] > 0.99


def test_prompts_are_fixed_and_the_held_out_ones_unseen(report):
    seen, unseen = report.drawings("train", 200), report.drawings("valid", 100)
    assert seen == report.drawings("train", 200)
    assert len({drawing.caption for drawing in seen}) == 200 and len({drawing.caption for drawing in unseen}) == 100
    train = {drawing.caption for drawing in report.captioned_images("train")}
    assert not train & {drawing.caption for drawing in unseen}


def test_true_pictures_are_those_of_their_captions(report):
    france = [d for d in report.captioned_images("train") if d.caption == "flag of France"]
    picture = report.pictures(france, 48)
    assert picture.shape == (1, 3, 48, 48) and picture.dtype == torch.uint8
    blue, white, red = (picture[0, :, 24, column].tolist() for column in (10, 24, 38))
    assert blue[2] > blue[0] and min(white) > 240 and red[0] > red[2] + 50
