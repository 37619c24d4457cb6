"""Render images of one coloured shape on a plain background, with exact labels.

Every label names a colour and a shape, so a model can be trained on some combinations
and then asked about others that it has never met.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Polygon = NDArray[np.float64]


def _regular(corners: int, radius: float = 1.0) -> Polygon:
    """Return a regular polygon about the origin, (corners, 2) float64."""
    angles = 2 * np.pi * np.arange(corners) / corners
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star() -> Polygon:
    """Return a five-pointed star, (10, 2) float64."""
    corners = _regular(10)
    corners[1::2] *= 0.42
    return corners


def _heart() -> Polygon:
    """Return the parametric heart curve, (48, 2) float64."""
    t = 2 * np.pi * np.arange(48) / 48
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, y + 2.5], axis=1) / 18


def _mirrored(quarter: list[tuple[float, float]]) -> Polygon:
    """Return the (2n, 2) float64 polygon whose upper half is given left to right."""
    upper = np.array(quarter)
    return np.concatenate([upper, upper[::-1] * (1, -1)])


DISC = _regular(48)
COLOURS = {
    "red": (215, 30, 35),
    "orange": (245, 130, 20),
    "yellow": (245, 225, 40),
    "green": (35, 150, 55),
    "cyan": (45, 210, 220),
    "blue": (35, 70, 205),
    "purple": (125, 40, 165),
    "pink": (250, 145, 190),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
# Each shape is an outline, within the unit disc, and the parts cut out of it.
SHAPES: dict[str, list[Polygon]] = {
    "arrow": [_mirrored([(-1, 0.22), (0.1, 0.22), (0.1, 0.65), (1, 0)])],
    "circle": [DISC],
    "crescent": [DISC, DISC * 0.85 + (0.5, 0)],
    "cross": [_mirrored([(-1, 0.28), (-0.28, 0.28), (-0.28, 1), (0.28, 1), (0.28, 0.28), (1, 0.28)])],
    "heart": [_heart()],
    "oval": [DISC * (1, 0.5)],
    "ring": [DISC, DISC * 0.55],
    "square": [_regular(4)],
    "star": [_star()],
    "triangle": [_regular(3)],
}
COMBINATIONS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
CLASS_NAMES = [f"{colour} {shape}" for colour, shape in COMBINATIONS]

# Two diagonals of the colour-by-shape table: every colour and every shape loses two
# combinations and keeps eight, so training meets all of them equally often.
HELD_OUT = [label for label in range(100) if (label // 10 - label % 10) % 5 == 0]
TRAINING = [label for label in range(100) if label not in HELD_OUT]


def _mask(shape: str, size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the coverage of a randomly placed shape, (size, size, 1) in 0..1."""
    supersampling = 4
    radius = rng.uniform(0.28, 0.45)
    centre = rng.uniform(radius, 1 - radius, 2)
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    canvas = Image.new("L", (size * supersampling,) * 2)
    for fill, part in zip((255, 0), SHAPES[shape], strict=False):
        corners = (part @ rotation * radius + centre) * size * supersampling
        ImageDraw.Draw(canvas).polygon(corners.ravel().tolist(), fill=fill)
    return np.asarray(canvas.reduce(supersampling))[..., None] / 255


def _background(size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return a greyish gradient, (size, size, 3) in 0..255, away from black and white."""
    slope = rng.uniform(-20, 20, 2)
    ramp = np.linspace(-1, 1, size)
    shade = rng.uniform(85, 175) + slope[0] * ramp[:, None] + slope[1] * ramp
    tinted: NDArray[np.float64] = shade[..., None] + rng.uniform(-12, 12, 3)
    return tinted


def _paint(colour: str | None, background: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Return an RGB triple in 0..255: the named colour, or for None one that has no name here."""
    if colour is not None:
        return np.array(COLOURS[colour]) + rng.uniform(-12, 12, 3)
    taken = np.array([*COLOURS.values(), background.mean((0, 1))])
    while True:
        paint = rng.uniform(0, 255, 3)
        if np.linalg.norm(taken - paint, axis=1).min() > 60:
            return paint


def render_scene(colour: str | None, shape: str, rng: np.random.Generator) -> Image.Image:
    """Return one RGB image, 64 to 96 pixels square; colour None paints in an unnamed colour."""
    size = int(rng.integers(64, 97))
    background = _background(size, rng)
    mask = _mask(shape, size, rng)
    pixels = mask * _paint(colour, background, rng) + (1 - mask) * background
    pixels += rng.normal(0, rng.uniform(0, 6), pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
