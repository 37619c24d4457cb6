"""A corpus to measure on: photographs drawn out of the shipped ones, with the sizes and forms that real corpora have.

How long a JPEG takes to decode depends on what is in it: noise is slower than a photograph, a smooth picture faster.
So every picture is put together from crops of photographs, at the sources' own resolution where they have it. Where a
crop has to be enlarged, the octaves that it lacks come from a sheet of fine detail, cut out of the same photographs.
"""

import contextlib
import io
import itertools
import json
import math
import random
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageChops, ImageFilter

from clipindex.atomic import atomic_write, remove_stale_temporaries
from clipindex.errors import UsageError
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
"""Of images that are smaller than the rest and of any shape, as photo sites serve what was uploaded small."""
FULL_CHROMA_SHARE = 0.2
"""Of 4:4:4, which editors write when asked for high quality; cameras, phones and crawlers' encoders write 4:2:0."""
GREY_SHARE = 0.02
PROGRESSIVE_SHARE = 0.04
"""Small, since corpora are mostly as cameras and crawlers' encoders left them, and web optimisers are the exception."""
QUALITIES = (85, 95)

_COLLAGE_CHANCE = 0.45
_MERGE_CHANCE = 0.35
_LEAST_PANEL = 0.35
"""Of the picture's long side, so that a collage has a handful of panels."""

_CLOSE_UP = 1.5
"""How much larger than a picture its sources are made, so that some pictures show only a part."""
_MOST_ROOM = 1000
"""No close-ups beyond, in pixels: sources of camera size are a hundred megabytes without them."""

# Set so that a picture's bytes a pixel, and its decoding time, are those of the shipped photographs at equal quality.
_SHARPNESS = 60
_DETAIL_GAIN = 16.0
_DETAIL_FLOOR = 20.0
_DETAIL_LIMIT = 24.0
_DETAIL_RADIUS = 1.5
_DETAIL_SIDE = 640
_PATCH_SIDES = (12, 40)

_QUARTER_TURNS = (
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
    *_QUARTER_TURNS,
)
_TURN_WEIGHTS = (5, 5, 1, 1, 1, 1, 1, 1)

Size = tuple[int, int]


class _Photo(NamedTuple):
    name: str
    levels: list[Image.Image]
    """From its own size to one from which every picture can be cut without enlarging; only read, by all threads."""


class _Picture(NamedTuple):
    image: Image.Image
    caption: str


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
        raise UsageError("a corpus has at least one image, at least one a tar, and sides of at least 16 pixels")
    about = {
        "images": num_images,
        "size": list(size),
        "shard_images": shard_images,
        "seed": seed,
        "recipe": RECIPE,
        "pillow": PIL.__version__,
    }
    shards = _shards(folder, num_images, shard_images)
    if not _claim(folder, about, shards):
        photos = _load_photos(size)
        for path, numbers in shards:
            if path.exists():
                on_images(numbers.stop)
            else:
                _write_shard(path, numbers, photos, size, seed, on_images)
        _write_marker(folder, {**about, "complete": True})
    return [str(path) for path, _ in shards]


def repeated(tars: Sequence[str], folder: Path, times: int) -> list[str]:
    """Links in a new folder that make `times` as many tars of some."""
    folder.mkdir(parents=True)
    links = [folder / f"{at}-{Path(tar).name}" for at in range(times) for tar in tars]
    for link, tar in zip(links, itertools.cycle(tars), strict=False):
        link.symlink_to(Path(tar).absolute())
    return [str(link) for link in links]


def _shards(folder: Path, num_images: int, shard_images: int) -> list[tuple[Path, range]]:
    starts = range(0, num_images, shard_images)
    return [
        (folder / f"{at}.tar", range(start, min(start + shard_images, num_images))) for at, start in enumerate(starts)
    ]


def _claim(folder: Path, about: dict[str, Any], shards: list[tuple[Path, range]]) -> bool:
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
        found = dict(json.loads(marker.read_bytes()))
    except (ValueError, TypeError):
        raise UsageError(f"{marker} does not describe a corpus; give another folder") from None
    complete = found.pop("complete", False)
    if found != about:
        other = ", ".join(
            f"{key} {found.get(key)} and not {about[key]}" for key in about if found.get(key) != about[key]
        )
        raise UsageError(f"{folder} holds another corpus ({other}); remove it or give another folder")
    return bool(complete) and all(path.exists() for path, _ in shards)


def _write_marker(folder: Path, content: dict[str, Any]) -> None:
    with atomic_write(folder / MARKER_FILE) as file:
        file.write(json.dumps(content).encode() + b"\n")


def _write_shard(
    path: Path, numbers: range, photos: list[_Photo], size: Size, seed: int, on_images: Callable[[int], None]
) -> None:
    def draw(number: int) -> dict[str, bytes]:
        return _draw_sample(photos, size, seed, number)

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


def _draw_sample(photos: list[_Photo], size: Size, seed: int, number: int) -> dict[str, bytes]:
    """Members of a sample, the image first."""
    rng = random.Random(f"{seed} {number} {size[0]}x{size[1]}")
    label = rng.randrange(NUM_CLASSES)
    image, caption = _picture(photos, _image_size(size, rng), rng)
    meta = {"width": image.width, "height": image.height, "caption": f"a photograph of {caption}"}
    key = f"{number:09d}"
    return {
        f"{key}.jpg": _encode(image, rng),
        f"{key}.cls": str(label).encode(),
        f"{key}.json": json.dumps(meta).encode(),
    }


def _image_size(size: Size, rng: random.Random) -> Size:
    """Most have the long side in full, as photo sites limit that one; of 4:3, the short side is from 3:2 to 5:4."""
    long, short = max(size), min(size)
    if rng.random() < ODD_SIZE_SHARE:
        long = round(long * rng.uniform(0.6, 1))
        short = round(long * rng.uniform(0.5, 1))
    else:
        short = min(long, round(short * rng.uniform(8 / 9, 16 / 15)))
    return (short, long) if rng.random() < PORTRAIT_SHARE else (long, short)


def _encode(image: Image.Image, rng: random.Random) -> bytes:
    options: dict[str, Any] = {"quality": rng.randint(*QUALITIES)}
    if rng.random() < GREY_SHARE:
        image = image.convert("L")
    else:
        options["subsampling"] = "4:4:4" if rng.random() < FULL_CHROMA_SHARE else "4:2:0"
    # Pillow keeps the GIL while it encodes into memory, and not while into a file of the operating system's.
    with tempfile.TemporaryFile() as file:
        image.save(file, "JPEG", progressive=rng.random() < PROGRESSIVE_SHARE, **options)
        file.seek(0)
        return file.read()


def _picture(photos: list[_Photo], size: Size, rng: random.Random) -> _Picture:
    """One photograph, a collage of a few, or one that runs into another."""
    picture = _collage(photos, size, rng, max(size) * _LEAST_PANEL)
    if rng.random() >= _MERGE_CHANCE:
        return picture
    other = _cut(photos, size, rng)
    image = Image.composite(picture.image, other.image, _gradient(size, rng))
    return _Picture(image, f"{picture.caption} and {other.caption}")


def _collage(photos: list[_Photo], size: Size, rng: random.Random, least: float) -> _Picture:
    """A photograph, or two collages beside each other or one above the other."""
    width, height = size
    if max(size) < 2 * least or rng.random() >= _COLLAGE_CHANCE:
        return _cut(photos, size, rng)
    at = round(max(size) * rng.uniform(0.35, 0.65))
    across = width >= height
    first = _collage(photos, (at, height) if across else (width, at), rng, least)
    second = _collage(photos, (width - at, height) if across else (width, height - at), rng, least)
    image = Image.new("RGB", size)
    image.paste(first.image, (0, 0))
    image.paste(second.image, (at, 0) if across else (0, at))
    return _Picture(image, f"{first.caption} beside {second.caption}")


def _cut(photos: list[_Photo], size: Size, rng: random.Random) -> _Picture:
    """A crop of a photograph, turned, in colours of its own; not enlarged, and at most halved."""
    photo = rng.choice(photos)
    turn = rng.choices(_TURNS, _TURN_WEIGHTS)[0]
    width, height = size[::-1] if turn in _QUARTER_TURNS else size
    fits = [(min(level.width / width, level.height / height), level) for level in photo.levels]
    fit, source = rng.choice([pair for pair in fits if pair[0] >= 1])
    scale = rng.uniform(1, min(fit, 2))
    left, right = _span(source.width, width * scale, rng)
    top, bottom = _span(source.height, height * scale, rng)
    # Of the filters that halve well, Hamming's reads the fewest pixels.
    image = source.resize((width, height), Image.Resampling.HAMMING, (left, top, right, bottom))
    image = _recolour(image, rng)
    return _Picture(image if turn is None else image.transpose(turn), photo.name)


def _span(whole: int, part: float, rng: random.Random) -> tuple[float, float]:
    """Start and end of a part; rounding must not lead out of the whole, which Pillow refuses."""
    start = rng.uniform(0, max(0.0, whole - part))
    return start, min(start + part, whole)


def _recolour(image: Image.Image, rng: random.Random) -> Image.Image:
    """Other hue, saturation, white balance and gamma; the first two turn and shrink RGB about its grey axis."""
    angle, saturation = rng.gauss(0, 0.2), rng.uniform(0.6, 1.2)
    cos, sin = saturation * math.cos(angle), saturation * math.sin(angle) / math.sqrt(3)
    own, before, after = (1 + 2 * cos) / 3, (1 - cos) / 3 - sin, (1 - cos) / 3 + sin
    image = image.convert("RGB", (own, before, after, 0, after, own, before, 0, before, after, own, 0))
    gamma = math.exp(rng.gauss(0, 0.25))
    gains = np.array([[rng.uniform(0.88, 1.1)] for _ in range(3)])
    table = np.rint(np.minimum(255, 255 * gains * (np.arange(256) / 255) ** gamma))
    return image.point(table.ravel().tolist())


def _gradient(size: Size, rng: random.Random) -> Image.Image:
    """Weights by which one picture runs into another: across an edge, or out of a round spot."""
    gradient = Image.radial_gradient("L") if rng.random() < 0.5 else Image.linear_gradient("L")
    turn = rng.choice(_TURNS)
    middle, steepness = rng.uniform(80, 176), rng.uniform(1.5, 6)
    levels = np.clip((np.arange(256) - middle) * steepness + 128, 0, 255).astype(int).tolist()
    gradient = gradient if turn is None else gradient.transpose(turn)
    return gradient.point(levels).resize(size, Image.Resampling.BILINEAR)


def _load_photos(size: Size) -> list[_Photo]:
    samples = [sample for shard in list_shards(str(PHOTOGRAPHS)) for sample in read_samples(shard)]
    images = {sample.key: _decode(sample) for sample in samples if isinstance(sample, Sample)}
    # The others are one of these in grey, in few colours and with an alpha channel.
    photographs = {name: image for name, image in images.items() if image.mode == "RGB"}
    sheet = _detail_sheet(list(photographs.values()))
    room = max(max(size), min(_MOST_ROOM, round(_CLOSE_UP * max(size))))
    levels = map_in_order(lambda image: _levels(image, room, sheet), photographs.values(), num_cores())
    return [_Photo(name, images) for name, images in zip(photographs, levels, strict=True)]


def _decode(sample: Sample) -> Image.Image:
    image = Image.open(io.BytesIO(sample.image))
    image.load()
    return image


def _levels(image: Image.Image, room: int, sheet: Image.Image) -> list[Image.Image]:
    """The photograph, and enlarged in equal steps of at most two until its short side has `room` pixels."""
    octaves = max(0, math.log2(room / min(image.size)))
    levels = [image]
    for step in range(1, math.ceil(octaves) + 1):
        factor = 2 ** (octaves * step / math.ceil(octaves))
        levels.append(_enlarge(levels[-1], (round(image.width * factor), round(image.height * factor)), sheet))
    return levels


def _enlarge(image: Image.Image, size: Size, sheet: Image.Image) -> Image.Image:
    """Larger, with the detail that a photograph of that size would have, most of it where there is some already."""
    smooth = image.resize(size, Image.Resampling.LANCZOS).filter(ImageFilter.UnsharpMask(1.5, _SHARPNESS, 0))
    grey = smooth.convert("L")
    busy = ImageChops.difference(grey, grey.filter(ImageFilter.BoxBlur(2))).filter(ImageFilter.BoxBlur(5))
    amount = busy.point([min(255, _DETAIL_FLOOR + _DETAIL_GAIN * level) for level in range(256)])
    detail = Image.new("RGB", size)
    for left in range(0, size[0], sheet.width):
        for top in range(0, size[1], sheet.height):
            detail.paste(sheet, (left, top))
    return Image.composite(ImageChops.add(smooth, detail, 1, -128), smooth, amount)


def _detail_sheet(images: list[Image.Image]) -> Image.Image:
    """What a blur takes away from photographs, about a middle grey, in patches in which nothing can be made out."""
    rng = random.Random(0)
    side = _DETAIL_SIDE
    fine = [
        ImageChops.subtract(image, image.filter(ImageFilter.GaussianBlur(_DETAIL_RADIUS)), 0.5, 128) for image in images
    ]
    fading = Image.radial_gradient("L").point([min(255, 2 * (255 - level)) for level in range(256)])
    fading = fading.resize((_PATCH_SIDES[1],) * 2)
    sheet = Image.new("RGB", (side, side), (128, 128, 128))
    for _ in range(side * side // _PATCH_SIDES[0] ** 2):
        source = rng.choice(fine)
        width, height = rng.randint(*_PATCH_SIDES), rng.randint(*_PATCH_SIDES)
        left, top = rng.randrange(source.width - width), rng.randrange(source.height - height)
        patch = source.crop((left, top, left + width, top + height)).transpose(rng.choice(_QUARTER_TURNS))
        sheet.paste(patch, (rng.randrange(-width, side), rng.randrange(-height, side)), fading.resize(patch.size))
    # Strong edges would show as scratches.
    soft = [128 + _DETAIL_LIMIT * math.tanh((level - 128) / _DETAIL_LIMIT) for level in range(256)]
    return sheet.point(soft * 3)
