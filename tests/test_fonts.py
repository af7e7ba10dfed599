"""Captions in any script: letters where a font has them, words where none has."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, features

from megat2i import fonts
from megat2i.fonts import Lettering

LETTERING = Lettering(13)


@pytest.fixture
def no_system_fonts(monkeypatch):
    """A machine without fontconfig."""
    monkeypatch.setattr(fonts.shutil, "which", lambda name: None)
    fonts._font_of.cache_clear()
    yield
    fonts._font_of.cache_clear()


def drawn(text: str) -> np.ndarray:
    page = Image.new("L", (200, 20), 255)
    LETTERING.draw(ImageDraw.Draw(page), (0, 0), text)
    return np.asarray(page)


@pytest.mark.parametrize("text", ["€ 5", "крыша", "ένα σπίτι", "بيت", "בית", "ça va", "➜ ♥"])
def test_letters_are_drawn_as_themselves_without_fonts_of_the_system(no_system_fonts, text):
    box = drawn("\uffff")  # what a font draws for a letter that it does not have
    assert (box < 128).any()
    for letter in text.replace(" ", ""):
        assert (drawn(letter) < 128).any() and not np.array_equal(drawn(letter), box), letter
    assert fonts._legible(text) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a 你 b", "a [U+4F60] b"),
        ("smile \N{MELTING FACE}\ufe0f!", "smile [melting face]\ufe0f!"),
        ("a\u200d\U000e0067b", "a\u200db"),
    ],
)
def test_what_no_font_has_is_written_in_words(no_system_fonts, text, words):
    assert fonts._legible(text) == words
    assert np.array_equal(drawn(text), drawn(words)) and LETTERING.width(text) == LETTERING.width(words)


@pytest.mark.skipif(not features.check("raqm"), reason="this Pillow has no Raqm, which shapes Arabic")
def test_arabic_letters_are_joined(no_system_fonts):
    joined, apart = LETTERING.width("بيت"), sum(LETTERING.width(letter) for letter in "بيت")
    assert joined < apart


def test_lines_are_as_wide_as_they_may_be():
    text = "a woman firefighter with medium skin tone " * 3 + "W" * 80 + " end"
    lines = LETTERING.wrap(text, 150)
    assert all(LETTERING.width(line) <= 150 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    first, second = lines[:2]
    assert LETTERING.width(f"{first} {second.split()[0]}") > 150
    assert LETTERING.wrap("", 150) == [] and LETTERING.wrap("  two   words ", 150) == ["two words"]


def test_a_font_of_the_system_is_used_where_it_has_the_letter(tmp_path, monkeypatch):
    """fontconfig, with one font that has what DejaVu Sans is made to lack."""
    if fonts.shutil.which("fc-list") is None:
        pytest.skip("this machine has no fontconfig")
    (tmp_path / "fonts").mkdir()
    fonts.shutil.copy(fonts._default(), tmp_path / "fonts/system.ttf")
    (tmp_path / "fonts.conf").write_text(
        f"<fontconfig><dir>{tmp_path}/fonts</dir><cachedir>{tmp_path}/cache</cachedir></fontconfig>"
    )
    monkeypatch.setenv("FONTCONFIG_FILE", str(tmp_path / "fonts.conf"))
    original = fonts._letters
    monkeypatch.setattr(fonts, "_letters", lambda path: original(path) - {ord("€")})
    fonts._font_of.cache_clear()
    try:
        assert fonts._font_of("€") == str(tmp_path / "fonts/system.ttf")
        assert fonts._font_of("你") is None
        assert [part for _, part in fonts._parts("5 € a")] == ["5 ", "€", " a"]
    finally:
        fonts._font_of.cache_clear()
