"""Lines of text in any script: in DejaVu Sans, which matplotlib brings, then in the fonts of the system.

A letter that no font has is written as its code point, an emoji as its name: a box would tell nothing. Limits: fonts of
the system are found by fontconfig's ``fc-list`` alone; Arabic letters are joined, and run from right to left, where
Pillow has Raqm, as its wheels have; parts of a line that need different fonts stand from left to right.
"""

import functools
import os
import shutil
import subprocess
import unicodedata
from itertools import groupby

import matplotlib
from fontTools.ttLib import TTFont
from PIL import ImageDraw, ImageFont

INVISIBLE = ("Cc", "Cf", "Mn")  # controls, joiners and marks, by Unicode's category: left out where no font has them
SYMBOLS = ("So", "Sk")  # emoji among them


class Lettering:
    """Text of ``size`` pixels."""

    def __init__(self, size: int):
        self.size = size

    def width(self, text: str) -> float:
        """Pixels that a line takes."""
        return sum(self._font(path).getlength(part) for path, part in _parts(_legible(text)))

    def draw(self, page: ImageDraw.ImageDraw, place: tuple[int, int], text: str) -> None:
        """Write one line in black; ``place`` is the left upper corner."""
        x, y = place
        for path, part in _parts(_legible(text)):
            font = self._font(path)
            page.text((x, y + self.size), part, fill="black", font=font, anchor="ls")
            x += font.getlength(part)

    def wrap(self, text: str, width: int) -> list[str]:
        """Lines of at most ``width`` pixels; words that are wider, or that no spaces part, are cut between letters."""
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if self.width(longer) <= width:
                lines[-1] = longer
                continue
            if lines[-1]:
                lines.append("")
            for letter in word:
                if lines[-1] and self.width(lines[-1] + letter) > width:
                    lines.append("")
                lines[-1] += letter
        return lines if lines[0] else []

    def _font(self, path: str) -> ImageFont.FreeTypeFont:
        return _open(path, self.size)


@functools.cache
def _open(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@functools.cache
def _default() -> str:
    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


@functools.cache
def _letters(path: str) -> frozenset[int]:
    with TTFont(path, fontNumber=0, lazy=True) as font:
        return frozenset(font.getBestCmap() or ())


@functools.cache
def _font_of(letter: str) -> str | None:
    """The file of a font that has ``letter``; None where there is none."""
    if ord(letter) in _letters(_default()):
        return _default()
    if shutil.which("fc-list") is None:
        return None
    wanted = f":charset={ord(letter):x}:scalable=true:color=false"
    listed = subprocess.run(["fc-list", wanted, "file"], capture_output=True, text=True).stdout
    files = sorted(line.rstrip(": ") for line in listed.splitlines())
    return next((file for file in files if file.lower().endswith((".ttf", ".otf", ".ttc"))), None)


def _parts(text: str) -> list[tuple[str, str]]:
    """(file of a font, consecutive letters that it has) from left to right."""
    return [(path, "".join(letters)) for path, letters in groupby(text, lambda letter: _font_of(letter) or _default())]


def _legible(text: str) -> str:
    return "".join(letter if _font_of(letter) else _in_words(letter) for letter in text)


def _in_words(letter: str) -> str:
    category = unicodedata.category(letter)
    if category in INVISIBLE:
        return ""
    name = unicodedata.name(letter, "").lower() if category in SYMBOLS else ""
    return f"[{name}]" if name else f"[U+{ord(letter):04X}]"
