"""Contact sheets: many small images, each with a few words under it, as one picture."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from clipindex.decode import decode_image
from clipindex.errors import SampleError
from clipindex.types import Preprocess

_GAP = 8
_WORDS_HEIGHT = 30
_FONT_SIZE = 11
_LINE_CHARACTERS = 0.16
"""Of a tile's width in pixels: what fits a line of the font."""


class Tile(NamedTuple):
    """One image of a sheet."""

    image: bytes | None
    """Encoded; None, or bytes that cannot be decoded, leave a grey tile."""
    words: str
    """At most two lines."""
    colour: str = "black"
    """Of the words."""


def contact_sheet(tiles: Sequence[Tile], *, columns: int, side: int) -> Image.Image:
    """Draw tiles in rows, with each image as large as fits a square of `side` pixels."""
    num_rows = -(-len(tiles) // columns)
    step = side + _GAP
    sheet = Image.new("RGB", (min(columns, len(tiles)) * step, num_rows * (step + _WORDS_HEIGHT)), "white")
    draw = ImageDraw.Draw(sheet)
    for at, tile in enumerate(tiles):
        x, y = at % columns * step + _GAP // 2, at // columns * (step + _WORDS_HEIGHT) + _GAP // 2
        sheet.paste(_drawn(tile.image, side), (x, y))
        width = int(side * _LINE_CHARACTERS)
        lines = [line if len(line) <= width else f"{line[: width - 1]}…" for line in tile.words.split("\n")[:2]]
        draw.multiline_text((x + 1, y + side + 1), "\n".join(lines), tile.colour, spacing=1, font_size=_FONT_SIZE)
    return sheet


def _drawn(data: bytes | None, side: int) -> Image.Image:
    pixels = np.full((side, side, 3), 200, np.uint8)
    if data is not None:
        whole = Preprocess(
            size=(side, side),
            resize_mode="longest",
            interpolation="bicubic",
            mean=(0, 0, 0),
            std=(1, 1, 1),
            fill_color=255,
        )
        try:
            decode_image(data, whole, pixels)
        except SampleError:
            pixels[:] = 200
    return Image.fromarray(pixels)
