"""What an image is resized to and where it is cut, whoever decodes it; and how large one may be."""

import contextlib
import threading

from clipindex.errors import SampleError
from clipindex.types import Preprocess

MAX_PIXELS = 178_956_970
"""Twice Pillow's warning level, where Pillow itself refuses: an image of half a gigabyte once decoded."""
LARGE_PIXELS = 32 << 20
"""Larger images are decoded one at a time, so that memory does not grow with the threads; 100 MB of pixels."""

one_large = threading.RLock()


def room(width: int, height: int) -> contextlib.AbstractContextManager[object]:
    """Held while an image is in memory: large ones come one at a time."""
    return one_large if width * height > LARGE_PIXELS else contextlib.nullcontext()


def is_plain(preprocess: Preprocess) -> bool:
    """Whether it is a resize and a centre crop and no more.

    'longest' pads, and to other shapes than a square open_clip has a rule of its own for 'shortest'.
    """
    if preprocess.resize_mode == "longest":
        return False
    return preprocess.resize_mode == "squash" or preprocess.size[0] == preprocess.size[1]


def resized_size(source: tuple[int, int], preprocess: Preprocess) -> tuple[int, int]:
    """Height and width that a source image of a height and width has before the centre crop."""
    height, width = preprocess.resize_size or preprocess.size
    return shortest_side(*source, height) if preprocess.resize_mode == "shortest" else (height, width)


def crop_origin(resized: tuple[int, int], preprocess: Preprocess) -> tuple[int, int]:
    """Top and left of torchvision's CenterCrop."""
    return round((resized[0] - preprocess.size[0]) / 2), round((resized[1] - preprocess.size[1]) / 2)


def shortest_side(height: int, width: int, size: int) -> tuple[int, int]:
    """Target height and width: the shorter side at `size`, the longer one cut to an integer, as torchvision does."""
    if width <= height:
        return int(size * height / width), size
    return size, int(size * width / height)


def check_pixels(width: int, height: int, preprocess: Preprocess, max_pixels: int) -> None:
    """Refuse what would not fit memory, before or after the resize: 1 x 20,000 pixels become 224 x 4,480,000.

    Raises:
        SampleError: It would not.
    """
    scaled_height, scaled_width = preprocess.resize_size or preprocess.size
    if preprocess.resize_mode == "shortest":
        scaled_height, scaled_width = shortest_side(height, width, max(scaled_height, scaled_width))
    if max(width * height, scaled_width * scaled_height) > max_pixels:
        raise SampleError(f"{width} x {height} pixels, resized {scaled_width} x {scaled_height}: above {max_pixels}")
