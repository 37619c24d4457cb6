"""One image to pixels: ordinary JPEGs by libjpeg-turbo, all else by the reference."""

from functools import partial

import simplejpeg
import torch

from clipindex.decode.geometry import MAX_PIXELS, check_pixels, crop_origin, is_plain, one_large, resized_size, room
from clipindex.decode.reference import decode_reference
from clipindex.errors import SampleError
from clipindex.types import Preprocess, UInt8Array

MAX_SCANS = 200
"""Of a JPEG; encoders make about ten. Each is a pass over all pixels, and an empty one takes a few bytes."""

SCALED_OVER_TARGET = 2
"""What scaled decoding leaves for the resize to shrink: nearer to the target it costs detail."""

_JUST_OVER_ONE = 1 + 1e-9  # the size of a resize by factor is rounded down
_SCAN_MARKER = b"\xff\xda"  # which does not occur in coded data by chance (ITU-T T.81, B.1.1.5)
_FAST_COLORSPACES = ("YCbCr", "Gray", "GRAY")


def decode_image(
    data: bytes, preprocess: Preprocess, out: UInt8Array, *, fast: bool = False, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Decode one image into place.

    Args:
        data: The encoded image; its content says what it is, not a name.
        preprocess: Target size and how to get there; mean and std are left to the device.
        out: Written: uint8 RGB [H, W, 3], of the target size.
        fast: Let libjpeg-turbo decode large JPEGs at a half, a quarter or an eighth of their size, as long as they
            stay at least twice the target: mean deviation below 1/255 (benchmarks/decode.py).
        max_pixels: Of the image, by its header, and of what it is resized to before the crop; at most `MAX_PIXELS`.

    Returns:
        Width and height of the source image in pixels.

    Raises:
        SampleError: The bytes are no whole image, or one of too many pixels, or there is no memory for it.
    """
    try:
        return _decode(data, preprocess, out, fast, max_pixels)
    except MemoryError:
        pass
    try:
        with one_large:  # perhaps others were decoded that take much
            return _decode(data, preprocess, out, fast, max_pixels)
    except MemoryError:
        raise SampleError("no memory to decode it; embed again with fewer --decode-threads") from None


def _decode(data: bytes, preprocess: Preprocess, out: UInt8Array, fast: bool, max_pixels: int) -> tuple[int, int]:
    is_jpeg = data[:3] == b"\xff\xd8\xff"
    scans = data.count(_SCAN_MARKER) if is_jpeg else 0
    if scans > MAX_SCANS:
        raise SampleError(f"a JPEG of {scans} scans, more than {MAX_SCANS}")
    if is_jpeg and is_plain(preprocess):
        size = _decode_jpeg(data, preprocess, out, fast, max_pixels)
        if size is not None:
            return size
    return decode_reference(data, preprocess, out, max_pixels=max_pixels)


def _decode_jpeg(
    data: bytes, preprocess: Preprocess, out: UInt8Array, fast: bool, max_pixels: int
) -> tuple[int, int] | None:
    """Decode a JPEG with libjpeg-turbo; None where it is not sound, for the reference to decide upon."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace not in _FAST_COLORSPACES:
            return None
        check_pixels(width, height, preprocess, max_pixels)
        factor = _scale_factor(height, width, preprocess) if fast else 1
        with room(width, height):
            pixels = simplejpeg.decode_jpeg(
                data, colorspace="RGB", min_height=-(-height // factor), min_width=-(-width // factor)
            )
            _resize(pixels, (height / factor, width / factor), (height, width), preprocess, out)
    except SampleError:
        raise
    except Exception:  # whatever a parser met, PyTorch's own out-of-memory RuntimeError included
        return None
    return width, height


def _scale_factor(height: int, width: int, preprocess: Preprocess) -> int:
    """What to divide the size by; libjpeg-turbo has vector code for these factors, and none for those between."""
    scaled = preprocess.resize_size or preprocess.size
    targets = scaled if preprocess.resize_mode == "squash" else (max(scaled),) * 2
    over = min(height / targets[0], width / targets[1])
    return next((factor for factor in (8, 4, 2) if over >= SCALED_OVER_TARGET * factor), 1)


def _resize(
    pixels: UInt8Array, extent: tuple[float, float], source: tuple[int, int], preprocess: Preprocess, out: UInt8Array
) -> None:
    """Resize and centre-crop as torchvision's Resize and CenterCrop do on a PIL image.

    Args:
        pixels: [h, w, 3], the source image or a smaller version of it.
        extent: Rows and columns of `pixels` that the source image covers; the last may be covered in part.
        source: Its height and width.
        preprocess: As in `decode_image`, and so `out`.
        out: Written.
    """
    height, width = preprocess.size
    scaled_height, scaled_width = resized_size(source, preprocess)
    # A view: NHWC memory seen as NCHW is channels_last, which the kernel takes and gives without a copy. The axis for N
    # has the stride of a whole image, for it counts: with another the resize costs as much again. NumPy makes views in
    # a third of PyTorch's time, all of it under Python's lock.
    image = torch.from_numpy(pixels.reshape(1, *pixels.shape).transpose(0, 3, 1, 2))
    if image.shape[2:] != (scaled_height, scaled_width):
        resize = partial(torch.nn.functional.interpolate, image, mode=preprocess.interpolation, antialias=True)
        if image.shape[2:] == extent:
            image = resize(size=(scaled_height, scaled_width))
        else:  # by size, it would stretch a last row or column that is covered in part
            factors = (scaled_height / extent[0] * _JUST_OVER_ONE, scaled_width / extent[1] * _JUST_OVER_ONE)
            image = resize(scale_factor=factors)
    top, left = crop_origin((scaled_height, scaled_width), preprocess)
    out[:] = image.numpy()[0, :, top : top + height, left : left + width].transpose(1, 2, 0)
