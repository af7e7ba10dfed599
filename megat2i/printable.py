"""Text with foreign names in it, made fit for a terminal.

Names of files, tensors, columns and keys come from strangers: with an escape they could clear a screen or set a title,
with a line break say what the program never said. Other scripts stay as they are.
"""

import argparse
import unicodedata

# Control characters, what sets the direction of text, half surrogates, separators of lines and paragraphs.
UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}
DIRECTIONS = set("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """``text`` in one line with its control characters written as escapes such as \\x1b."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_written(character) for character in text)


def _written(character: str) -> str:
    if unicodedata.category(character) in UNPRINTABLE or character in DIRECTIONS:
        return character.encode("unicode_escape", "surrogatepass").decode()
    return character


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, whose errors repeat what was typed, such as file names that a shell filled in, in printable form."""

    def error(self, message: str):
        super().error(printable(message))
