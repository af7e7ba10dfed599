"""Sheets of pictures with captions under them, as PNG files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from megat2i.files import PendingFile, commit
from megat2i.fonts import Lettering

FONT_SIZE = 13
LINE_HEIGHT = 16
CAPTION_LINES = 3
MARGIN = 8
MINIMUM_WIDTH = 56  # pixels of a line of a caption, below however narrow a picture


def enlarge(image: np.ndarray, side: int) -> Image.Image:
    """``image`` [3, H, W] uint8 at about ``side`` pixels, by a whole factor so that its pixels stay visible."""
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    factor = max(1, round(side / picture.width))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def sheet(
    cells: Sequence[tuple[str, Sequence[np.ndarray]]], columns: int, side: int = 128, title: str = ""
) -> Image.Image:
    """A grid of cells, each a row of pictures [3, H, W] uint8 (as many in every cell) with its caption below."""
    pictures = [[enlarge(image, side) for image in images] for _, images in cells]
    width, height = pictures[0][0].size
    cell_width = len(pictures[0]) * (width + 4) + MARGIN
    cell_height = height + CAPTION_LINES * LINE_HEIGHT + MARGIN
    rows = -(-len(cells) // columns)
    top = MARGIN + (2 * LINE_HEIGHT if title else 0)
    page = Image.new("RGB", (MARGIN + columns * cell_width, top + rows * cell_height), "white")
    draw, lettering = ImageDraw.Draw(page), Lettering(FONT_SIZE)
    lettering.draw(draw, (MARGIN, MARGIN), title)
    for index, (caption, _) in enumerate(cells):
        x = MARGIN + index % columns * cell_width
        y = top + index // columns * cell_height
        for number, picture in enumerate(pictures[index]):
            page.paste(picture, (x + number * (width + 4), y))
            frame = (x + number * (width + 4) - 1, y - 1, x + number * (width + 4) + width, y + height)
            draw.rectangle(frame, outline=(200, 200, 200))
        lines = lettering.wrap(caption, max(MINIMUM_WIDTH, cell_width - MARGIN))[:CAPTION_LINES]
        for number, line in enumerate(lines):
            lettering.draw(draw, (x, y + height + 2 + number * LINE_HEIGHT), line)
    return page


def save_png(image: Image.Image, path: Path) -> None:
    """Write ``image`` so that ``path`` is never seen half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = PendingFile(path)
    try:
        image.save(file, format="PNG")
        commit([file])
    finally:
        file.discard()
