"""Contact sheets: many small images, each with a few words under it, as one picture."""

import itertools
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
_TITLE_SIZE = 15
_LINE_CHARACTERS = 0.16
"""Of a width in pixels: what fits a line of the font."""


class Tile(NamedTuple):
    """One image of a sheet."""

    image: bytes | None
    """Encoded; None, or bytes that cannot be decoded, leave a grey tile."""
    words: str
    """At most two lines."""
    colour: str = "black"
    """Of the words."""


class Group(NamedTuple):
    """Tiles that belong together."""

    title: str
    """One line above them; none where it is empty."""
    tiles: list[Tile]


def contact_sheet(groups: Sequence[Group], *, columns: int, side: int) -> Image.Image:
    """Draw tiles in rows, each group beginning one, with each image as large as fits a square of `side` pixels."""
    step = side + _GAP
    heights = [_title_height(group) + -(-len(group.tiles) // columns) * (step + _WORDS_HEIGHT) for group in groups]
    wide = max((min(columns, len(group.tiles)) for group in groups), default=1)
    sheet = Image.new("RGB", (max(wide, 1) * step, max(sum(heights), 1)), "white")
    draw = ImageDraw.Draw(sheet)
    for group, top in zip(groups, itertools.accumulate(heights, initial=0), strict=False):
        title = _cut(group.title, sheet.width * _LINE_CHARACTERS * _FONT_SIZE / _TITLE_SIZE)
        draw.text((_GAP // 2, top + _GAP // 2), title, "black", font_size=_TITLE_SIZE)
        for at, tile in enumerate(group.tiles):
            x = at % columns * step + _GAP // 2
            y = top + _title_height(group) + at // columns * (step + _WORDS_HEIGHT) + _GAP // 2
            sheet.paste(_drawn(tile.image, side), (x, y))
            lines = [_cut(line, side * _LINE_CHARACTERS) for line in tile.words.split("\n")[:2]]
            draw.multiline_text((x + 1, y + side + 1), "\n".join(lines), tile.colour, spacing=1, font_size=_FONT_SIZE)
    return sheet


def _title_height(group: Group) -> int:
    return _TITLE_SIZE + _GAP if group.title else 0


def _cut(line: str, characters: float) -> str:
    return line if len(line) <= characters else f"{line[: int(characters) - 1]}…"


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
