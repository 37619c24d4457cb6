"""A corpus to measure on: photographs drawn out of the shipped ones, with the sizes and forms that real corpora have.

How long a JPEG takes to decode depends on what is in it: noise is slower than a photograph, a smooth picture faster.
So every picture is put together from crops of photographs, at the sources' own resolution where they have it. Where a
crop has to be enlarged, the octaves that it lacks come from a sheet of fine detail, cut out of the same photographs.
"""

import contextlib
import io
import json
import math
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageChops, ImageFilter

from clipindex.errors import UsageError
from clipindex.fileio import atomic_write, remove_stale_temporaries
from clipindex.shards import list_shards, read_samples
from clipindex.threads import map_in_order, num_cores
from clipindex.types import Sample

MARKER_FILE = "corpus.json"
PHOTOGRAPHS = Path(__file__).parents[1] / "demo_data" / "wds_photos"
RECIPE = 1
"""Raised with every change after which the same arguments give other bytes."""
NUM_CLASSES = 1000

PORTRAIT_SHARE = 0.27
ODD_SIZE_SHARE = 0.2
"""Smaller than the rest, and of any shape: what a photo site serves when the original is no larger."""
GREY_SHARE = 0.02
FULL_CHROMA_SHARE = 0.2
PROGRESSIVE_SHARE = 0.04
QUALITIES = (85, 95)

_PANEL_CHANCE = 0.4
_MERGE_CHANCE = 0.3
_LEAST_PANEL = 0.35
"""Of the picture's long side, so that a collage has a handful of panels."""
_ROOM = 1.0
_DETAIL_GAIN = 16.0
_DETAIL_FLOOR = 20
_DETAIL_RADIUS = 1.5
_DETAIL_LIMIT = 24
_PATCH = (12, 40)

_SWAPPING = (
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.TRANSVERSE,
)
_TURNS = (
    None,
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
    *_SWAPPING,
)
_TURN_WEIGHTS = (5, 5, 1, 1, 1, 1, 1, 1)

Size = tuple[int, int]


class _Photo(NamedTuple):
    name: str
    levels: list[Image.Image]
    """From its own size to one from which every picture can be cut without enlarging it."""


_Paints = list[_Photo]


class _Panel(NamedTuple):
    image: Image.Image
    name: str


def write_corpus(
    folder: Path,
    num_images: int,
    *,
    size: Size = (500, 375),
    shard_images: int = 1000,
    seed: int = 0,
    on_images: Callable[[int], None] = lambda n: None,
) -> list[str]:
    """Write `0.tar`, `1.tar`, … of JPEGs with label and JSON, or find them there; a rerun goes on where one stopped.

    An image depends on `seed`, its number and `size` alone, so the first of a larger corpus are a smaller one. The
    bytes are the same for the same Pillow.

    Args:
        folder: Where to; new, empty, or of an earlier call with the same arguments.
        num_images: Of all tars together.
        size: Width and height that most images are near to, in pixels.
        shard_images: Images in a tar.
        seed: Another one gives other images.
        on_images: Called after each image with the number there are.

    Returns:
        Paths of the tars, in order.

    Raises:
        UsageError: `folder` holds something else, or a number is too small.
    """
    if num_images < 1 or shard_images < 1 or min(size) < 16:
        raise UsageError("a corpus has at least one image, also in a tar, and no side below 16 pixels")
    about = {
        "images": num_images,
        "size": list(size),
        "shard_images": shard_images,
        "seed": seed,
        "recipe": RECIPE,
        "pillow": PIL.__version__,
    }
    if not _claim(folder, about):
        paints = _mix_paints(size)
        for path, numbers in _shards(folder, num_images, shard_images):
            if not path.exists():
                _write_shard(path, numbers, paints, size, seed, on_images)
            on_images(numbers.stop)
        _write_marker(folder, {**about, "complete": True})
    return [str(path) for path, _ in _shards(folder, num_images, shard_images)]


def _shards(folder: Path, num_images: int, shard_images: int) -> list[tuple[Path, range]]:
    starts = range(0, num_images, shard_images)
    return [
        (folder / f"{at}.tar", range(start, min(start + shard_images, num_images))) for at, start in enumerate(starts)
    ]


def _claim(folder: Path, about: dict[str, Any]) -> bool:
    """Whether the corpus is there, whole; if not, say in the folder whose tars appear in it from now on.

    Without that, the tars of a run that was stopped could not be told from anyone else's.
    """
    marker = folder / MARKER_FILE
    remove_stale_temporaries(folder)
    if not marker.exists():
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(f"{folder} holds something else; give an empty or new folder")
        _write_marker(folder, {**about, "complete": False})
        return False
    try:
        found = json.loads(marker.read_bytes())
        complete = found.pop("complete")
    except (ValueError, AttributeError, KeyError):
        raise UsageError(f"{marker} does not describe a corpus; remove {folder} or give another folder") from None
    if found != about:
        other = ", ".join(
            f"{key} {found.get(key)} and not {about[key]}" for key in about if found.get(key) != about[key]
        )
        raise UsageError(f"{folder} holds another corpus ({other}); remove it or give another folder")
    paths = [path for path, _ in _shards(folder, about["images"], about["shard_images"])]
    return bool(complete) and all(path.exists() for path in paths)


def _write_marker(folder: Path, content: dict[str, Any]) -> None:
    with atomic_write(folder / MARKER_FILE) as file:
        file.write(json.dumps(content).encode() + b"\n")


def _write_shard(
    path: Path, numbers: range, paints: _Paints, size: Size, seed: int, on_images: Callable[[int], None]
) -> None:
    def draw(number: int) -> dict[str, bytes]:
        return _draw_sample(paints, size, seed, number)

    with (
        atomic_write(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar,
        contextlib.closing(map_in_order(draw, numbers, num_cores())) as drawn,
    ):
        for number, members in zip(numbers, drawn, strict=True):
            for name, data in members.items():
                info = tarfile.TarInfo(name)  # time, owner and group stay 0: equal images give equal tars
                info.size = len(data)
                info.mode = 0o644
                tar.addfile(info, io.BytesIO(data))
            on_images(number + 1)


def _draw_sample(paints: _Paints, size: Size, seed: int, number: int) -> dict[str, bytes]:
    """Members of a sample, the image first."""
    rng = random.Random(f"{seed} {number} {size[0]}x{size[1]}")
    label = rng.randrange(NUM_CLASSES)
    picture = _picture(paints, _image_size(size, rng), rng)
    meta = {"width": picture.image.width, "height": picture.image.height, "caption": f"a photograph of {picture.name}"}
    key = f"{number:09d}"
    return {
        f"{key}.jpg": _encode(picture.image, rng),
        f"{key}.cls": str(label).encode(),
        f"{key}.json": json.dumps(meta).encode(),
    }


def _image_size(size: Size, rng: random.Random) -> Size:
    """Most have the long side in full, as photo sites limit that one; the short side is between 3:2 and 5:4."""
    long, short = max(size), min(size)
    if rng.random() < ODD_SIZE_SHARE:
        long = round(long * rng.uniform(0.6, 1))
        short = round(long * rng.uniform(0.5, 1))
    else:
        short = min(long, round(short * rng.uniform(8 / 9, 16 / 15)))
    return (short, long) if rng.random() < PORTRAIT_SHARE else (long, short)


def _encode(image: Image.Image, rng: random.Random) -> bytes:
    options: dict[str, Any] = {"quality": rng.randint(*QUALITIES)}
    grey, full_chroma, progressive = (
        rng.random() < share for share in (GREY_SHARE, FULL_CHROMA_SHARE, PROGRESSIVE_SHARE)
    )
    if grey:
        image = image.convert("L")
    else:
        options["subsampling"] = "4:4:4" if full_chroma else "4:2:0"
    if progressive:
        options["progressive"] = True
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _picture(paints: _Paints, size: Size, rng: random.Random) -> _Panel:
    """One photograph, a collage of a few, or two that run into each other."""
    first = _collage(paints, size, rng, max(size) * _LEAST_PANEL)
    if rng.random() >= _MERGE_CHANCE:
        return first
    second = _cut(paints, size, rng)
    mask = _gradient(size, rng)
    return _Panel(Image.composite(first.image, second.image, mask), f"{first.name} and {second.name}")


def _collage(paints: _Paints, size: Size, rng: random.Random, least: float) -> _Panel:
    width, height = size
    if max(size) < 2 * least or rng.random() >= _PANEL_CHANCE:
        return _cut(paints, size, rng)
    image = Image.new("RGB", size)
    at = rng.uniform(0.35, 0.65)
    if width >= height:
        cut = round(width * at)
        parts = [((0, 0), (cut, height)), ((cut, 0), (width - cut, height))]
    else:
        cut = round(height * at)
        parts = [((0, 0), (width, cut)), ((0, cut), (width, height - cut))]
    names = []
    for corner, part in parts:
        panel = _collage(paints, part, rng, least)
        image.paste(panel.image, corner)
        names.append(panel.name)
    return _Panel(image, " beside ".join(names))


def _cut(paints: _Paints, size: Size, rng: random.Random) -> _Panel:
    """A crop of a photograph, turned, in colours of its own; never enlarged, at most halved."""
    photo = rng.choice(paints)
    turn = rng.choices(_TURNS, _TURN_WEIGHTS)[0]
    width, height = size[::-1] if turn in _SWAPPING else size
    fits = [min(level.width / width, level.height / height) for level in photo.levels]
    fit, source = rng.choice([both for both in zip(fits, photo.levels, strict=True) if both[0] >= 1])
    scale = rng.uniform(1, min(fit, 2))
    left = rng.uniform(0, source.width - width * scale)
    top = rng.uniform(0, source.height - height * scale)
    box = (left, top, left + width * scale, top + height * scale)
    image = source.resize((width, height), Image.Resampling.HAMMING, box)
    image = _recolour(image, rng)
    return _Panel(image if turn is None else image.transpose(turn), photo.name)


def _recolour(image: Image.Image, rng: random.Random) -> Image.Image:
    angle, saturation = rng.gauss(0, 0.2), rng.uniform(0.6, 1.2)
    cos, sin = saturation * math.cos(angle), saturation * math.sin(angle) / math.sqrt(3)
    own, left, right = (1 + 2 * cos) / 3, (1 - cos) / 3 - sin, (1 - cos) / 3 + sin
    image = image.convert("RGB", (own, left, right, 0, right, own, left, 0, left, right, own, 0))
    gamma = math.exp(rng.gauss(0, 0.25))
    gains = np.array([[rng.uniform(0.88, 1.1)] for _ in range(3)])
    table = np.clip(np.rint(255 * gains * (np.arange(256) / 255) ** gamma), 0, 255).astype(int)
    return image.point(table.ravel().tolist())


def _gradient(size: Size, rng: random.Random) -> Image.Image:
    gradient = Image.radial_gradient("L") if rng.random() < 0.5 else Image.linear_gradient("L")
    turn = rng.choice(_TURNS)
    middle, steepness = rng.uniform(80, 176), rng.uniform(1.5, 6)
    gradient = gradient if turn is None else gradient.transpose(turn)
    levels = np.clip((np.arange(256) - middle) * steepness + 128, 0, 255).astype(int)
    return gradient.point(levels.tolist()).resize(size, Image.Resampling.BILINEAR)


def _mix_paints(size: Size) -> _Paints:
    photos = []
    for shard in list_shards(str(PHOTOGRAPHS)):
        for sample in read_samples(shard):
            with Image.open(io.BytesIO(sample.image if isinstance(sample, Sample) else b"")) as image:
                if image.mode == "RGB":  # the others are one of these in grey, in few colours, with an alpha channel
                    photos.append((sample.key, image.copy()))
    goal = max(size)
    sheet = _detail_sheet([image for _, image in photos], 640)

    def paint(photo: tuple[str, Image.Image]) -> _Photo:
        return _Photo(photo[0], _levels(photo[1], goal, sheet))

    return list(map_in_order(paint, photos, num_cores()))


def _levels(image: Image.Image, goal: int, sheet: Image.Image) -> list[Image.Image]:
    """The photograph, and enlarged in steps of no more than two until its short side has room for any picture."""
    octaves = max(0, math.log2(goal / min(image.size)))
    levels = [image]
    for step in range(1, math.ceil(octaves) + 1):
        factor = 2 ** (octaves * step / math.ceil(octaves))
        levels.append(_enlarge(levels[-1], (round(image.width * factor), round(image.height * factor)), sheet))
    return levels


def _enlarge(image: Image.Image, size: Size, sheet: Image.Image) -> Image.Image:
    """Larger, with the fine detail that a photograph of that size would have, most of it where there is some already."""
    smooth = image.resize(size, Image.Resampling.LANCZOS).filter(ImageFilter.UnsharpMask(1.5, 60, 0))
    grey = smooth.convert("L")
    busy = ImageChops.difference(grey, grey.filter(ImageFilter.BoxBlur(2))).filter(ImageFilter.BoxBlur(5))
    amount = busy.point([min(255, round(_DETAIL_FLOOR + _DETAIL_GAIN * level)) for level in range(256)])
    detail = Image.new("RGB", size)
    for left in range(0, size[0], sheet.width):
        for top in range(0, size[1], sheet.height):
            detail.paste(sheet, (left, top))
    return Image.composite(ImageChops.add(smooth, detail, 1, -128), smooth, amount)


def _detail_sheet(images: list[Image.Image], side: int) -> Image.Image:
    """What a blur takes away from the photographs, in patches too small for anything to be made out."""
    rng = random.Random(0)
    fine = [ImageChops.subtract(image, image.filter(ImageFilter.GaussianBlur(_DETAIL_RADIUS)), 0.5, 128)
            for image in images]
    sheet = Image.new("RGB", (side, side), (128, 128, 128))
    radial = Image.radial_gradient("L").point([min(255, 2 * (255 - v)) for v in range(256)]).resize((_PATCH[1],) * 2)
    for _ in range(side * side // _PATCH[0] ** 2):
        source = rng.choice(fine)
        width, height = rng.randint(*_PATCH), rng.randint(*_PATCH)
        left, top = rng.randrange(source.width - width), rng.randrange(source.height - height)
        patch = source.crop((left, top, left + width, top + height))
        patch = patch.transpose(rng.choice([t for t in _TURNS if t is not None]))
        sheet.paste(patch, (rng.randrange(-width, side), rng.randrange(-height, side)), radial.resize(patch.size))
    soft = [round(128 + _DETAIL_LIMIT * math.tanh((level - 128) / _DETAIL_LIMIT)) for level in range(256)]
    return sheet.point(soft * 3)
