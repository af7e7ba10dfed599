"""Sheets of pictures: each picture whole and in its place, files never half-written."""

import numpy as np
import pytest
from PIL import Image

from megat2i.pictures import enlarge, save_png, sheet

RED, BLUE = (np.zeros((3, 8, 8), np.uint8) for _ in range(2))
RED[0], BLUE[2] = 255, 255


def test_enlarging_keeps_the_pixels():
    picture = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    large = np.asarray(enlarge(picture, 13))
    assert large.shape == (12, 12, 3)
    assert np.array_equal(large[::3, ::3].transpose(2, 0, 1), picture)
    assert enlarge(picture, 1).size == (4, 4)


def test_a_sheet_shows_every_picture_in_its_cell():
    page = np.asarray(sheet([("red, then blue", [RED, BLUE]), ("again", [RED, RED])], columns=1, side=16))
    reds = np.argwhere((page == (255, 0, 0)).all(-1))
    blues = np.argwhere((page == (0, 0, 255)).all(-1))
    assert (len(reds), len(blues)) == (3 * 256, 256)
    assert blues[:, 1].min() > reds[reds[:, 0] < blues[:, 0].max(), 1].min(), "the second picture stands on the right"
    assert reds[:, 0].max() > blues[:, 0].max(), "the second cell stands below"


def test_captions_and_title_are_written():
    blank = np.full((3, 8, 8), 255, np.uint8)

    def ink(caption, title):
        return (np.asarray(sheet([(caption, [blank])], columns=1, side=64, title=title)) < 100).sum()

    assert ink("", "") == 0 < ink("a", "") < ink("a caption", "") < ink("a caption", "and a title")


def test_a_png_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "x.png"
    save_png(enlarge(RED, 8), path)
    assert np.array_equal(np.asarray(Image.open(path)), RED.transpose(1, 2, 0))

    def broken(*_, **__):
        raise OSError("disk full")

    before = path.read_bytes()
    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_png(enlarge(BLUE, 8), path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
