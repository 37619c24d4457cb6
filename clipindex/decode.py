"""Encoded image bytes to the uint8 pixels that a model's own transform would have seen.

The reference is open_clip's inference transform, applied to what Pillow opens: resize in the image's own mode, crop,
then convert to RGB; for backbones of timm it is timm's. EXIF orientation is not applied. Common JPEGs take a faster way
to the same pixels (libjpeg-turbo, then PyTorch's antialiased uint8 resize: within 2/255 of the reference); everything
else takes the reference itself.
"""

import contextlib
import importlib
import io
import threading
from functools import lru_cache, partial
from typing import Any

import numpy as np
import simplejpeg
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, UnidentifiedImageError
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from clipindex.errors import SampleError
from clipindex.types import Preprocess, UInt8Array

MAX_PIXELS = 178_956_970
"""Twice Pillow's warning level, where Pillow itself refuses: an image of half a gigabyte once decoded."""
LARGE_PIXELS = 32 << 20
"""Larger images are decoded one at a time, so that memory does not grow with the threads; 100 MB of pixels."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "AVIF", "HEIF", "PPM", "TGA")
"""What Pillow may take bytes for. Of its others, EPS runs Ghostscript on what it is given; ICO decodes on opening."""
MAX_SCANS = 200
"""Of a JPEG; encoders make about ten. Each is a pass over all pixels, and an empty one takes a few bytes."""

SCALED_OVER_TARGET = 2
"""What scaled decoding leaves for the resize to shrink: nearer to the target it costs detail."""

_JUST_OVER_ONE = 1 + 1e-9  # the size of a resize by factor is rounded down
_SCAN_MARKER = b"\xff\xda"  # which does not occur in coded data by chance (ITU-T T.81, B.1.1.5)
_one_large = threading.RLock()
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_AVIF_BRANDS = (b"avif", b"avis")
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
        with _one_large:  # perhaps others were decoded that take much
            return _decode(data, preprocess, out, fast, max_pixels)
    except MemoryError:
        raise SampleError("no memory to decode it; embed again with fewer --decode-threads") from None


def _decode(data: bytes, preprocess: Preprocess, out: UInt8Array, fast: bool, max_pixels: int) -> tuple[int, int]:
    is_jpeg = data[:3] == b"\xff\xd8\xff"
    scans = data.count(_SCAN_MARKER) if is_jpeg else 0
    if scans > MAX_SCANS:
        raise SampleError(f"a JPEG of {scans} scans, more than {MAX_SCANS}")
    if is_jpeg and preprocess.resize_mode != "longest" and _is_square(preprocess):
        size = _decode_jpeg(data, preprocess, out, fast, max_pixels)
        if size is not None:
            return size
    return decode_reference(data, preprocess, out, max_pixels=max_pixels)


def _is_square(preprocess: Preprocess) -> bool:
    """Whether 'shortest' is torchvision's plain resize; to other shapes open_clip has a rule of its own."""
    return preprocess.resize_mode == "squash" or preprocess.size[0] == preprocess.size[1]


def _decode_jpeg(
    data: bytes, preprocess: Preprocess, out: UInt8Array, fast: bool, max_pixels: int
) -> tuple[int, int] | None:
    """Decode a JPEG with libjpeg-turbo; None where it is not sound, for the reference to decide upon."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace not in _FAST_COLORSPACES:
            return None
        _check_pixels(width, height, preprocess, max_pixels)
        factor = _scale_factor(height, width, preprocess) if fast else 1
        with _room(width, height):
            pixels = simplejpeg.decode_jpeg(
                data, colorspace="RGB", min_height=-(-height // factor), min_width=-(-width // factor)
            )
            _resize(pixels, (height / factor, width / factor), (height, width), preprocess, out)
    except SampleError:
        raise
    except Exception:  # whatever a parser met, PyTorch's own out-of-memory RuntimeError included
        return None
    return width, height


def _room(width: int, height: int) -> contextlib.AbstractContextManager[object]:
    """Held while an image is in memory: large ones come one at a time."""
    return _one_large if width * height > LARGE_PIXELS else contextlib.nullcontext()


def _scale_factor(height: int, width: int, preprocess: Preprocess) -> int:
    """What to divide the size by; libjpeg-turbo has vector code for these factors, and none for those between."""
    scaled = preprocess.resize_size or preprocess.size
    targets = scaled if preprocess.resize_mode == "squash" else (max(scaled),) * 2
    room = min(height / targets[0], width / targets[1])
    return next((factor for factor in (8, 4, 2) if room >= SCALED_OVER_TARGET * factor), 1)


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
    scaled_height, scaled_width = preprocess.resize_size or preprocess.size
    if preprocess.resize_mode == "shortest":
        scaled_height, scaled_width = _shortest_side(*source, scaled_height)
    # A view: NHWC memory seen as NCHW is channels_last, which the kernel takes and gives without a copy. The axis for N
    # comes first, for its stride counts: as an afterthought it costs as much again as the resize.
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    if image.shape[2:] != (scaled_height, scaled_width):
        resize = partial(torch.nn.functional.interpolate, image, mode=preprocess.interpolation, antialias=True)
        if image.shape[2:] == extent:
            image = resize(size=(scaled_height, scaled_width))
        else:  # by size, it would stretch a last row or column that is covered in part
            factors = (scaled_height / extent[0] * _JUST_OVER_ONE, scaled_width / extent[1] * _JUST_OVER_ONE)
            image = resize(scale_factor=factors)
    top, left = round((scaled_height - height) / 2), round((scaled_width - width) / 2)
    out[:] = image[0, :, top : top + height, left : left + width].permute(1, 2, 0).numpy()


def _shortest_side(height: int, width: int, size: int) -> tuple[int, int]:
    """Target height and width: the shorter side at `size`, the longer one cut to an integer, as torchvision does."""
    if width <= height:
        return int(size * height / width), size
    return size, int(size * width / height)


def decode_reference(
    data: bytes, preprocess: Preprocess, out: UInt8Array, *, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """As `decode_image`, always by open_clip's own transform; lack of memory is raised as MemoryError."""
    if _brand(data) in _HEIF_BRANDS:
        _open_heif()
    try:
        with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
            width, height = image.size
            _check_pixels(width, height, preprocess, max_pixels)
            if image.format == "TIFF":
                _check_tile(image, max_pixels)
            if image.format == "JPEG2000":
                _check_whole_jpeg2000(data)
            with _room(width, height):
                out[:] = np.asarray(_reference_transform(preprocess)(image))
            return width, height
    except (SampleError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise whatever their parsers met
        raise SampleError(_reason(error, data)) from error


def _check_tile(image: Any, max_pixels: int) -> None:  # noqa: ANN401 - a TiffImageFile, of which Pillow's types say little
    """A tile is decoded whole, and may be larger than the image (TIFF 6.0, section 15: TileWidth, TileLength)."""
    width, height = (image.tag_v2.get(tag, 0) for tag in (322, 323))
    if width * height > max_pixels:
        raise SampleError(f"tiles of {width} x {height} pixels: above {max_pixels}")


def _check_whole_jpeg2000(data: bytes) -> None:
    """OpenJPEG gives black for what is cut off. In coded data no marker occurs by chance (ISO/IEC 15444-1, annex B)."""
    if data.rfind(b"\xff\xd9") < data.find(b"\xff\x4f\xff\x51"):
        raise SampleError("truncated: the JPEG 2000 codestream has no end")


def _brand(data: bytes) -> bytes:
    """Of an ISO base media file (ISO/IEC 14496-12), the major brand; else nothing."""
    return data[8:12] if data[4:8] == b"ftyp" else b""


@lru_cache
def _open_heif() -> None:
    """Let Pillow open HEIF where pillow-heif is installed: when such an image comes, since few corpora have any."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
        _known_formats.cache_clear()


@lru_cache
def _known_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has."""
    Image.init()
    return tuple(form for form in FORMATS if form in Image.OPEN)


@lru_cache
def _reference_transform(preprocess: Preprocess) -> Any:  # noqa: ANN401 - torchvision is untyped
    """open_clip's own inference transform, stopped before it leaves uint8; or timm's."""
    if preprocess.resize_size is not None:
        return _timm_transform(preprocess, preprocess.resize_size)
    transform = image_transform_v2(
        PreprocessCfg(
            size=preprocess.size,
            interpolation=preprocess.interpolation,
            resize_mode=preprocess.resize_mode,
            fill_color=preprocess.fill_color,
        ),
        is_train=False,
    )
    transform.transforms = transform.transforms[:-2]
    return transform


def _timm_transform(preprocess: Preprocess, resize_size: tuple[int, int]) -> Any:  # noqa: ANN401 - torchvision is untyped
    """As timm.data.create_transform for inference, and in the order of its data sets: RGB, resize, centre crop."""
    target = resize_size if preprocess.resize_mode == "squash" else resize_size[0]
    return Compose(
        [
            _to_rgb,
            Resize(target, interpolation=InterpolationMode(preprocess.interpolation)),
            CenterCrop(preprocess.size),
        ]
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def _check_pixels(width: int, height: int, preprocess: Preprocess, max_pixels: int) -> None:
    """Refuse what would not fit memory, before or after the resize: 1 x 20,000 pixels become 224 x 4,480,000."""
    scaled_height, scaled_width = preprocess.resize_size or preprocess.size
    if preprocess.resize_mode == "shortest":
        scaled_height, scaled_width = _shortest_side(height, width, max(scaled_height, scaled_width))
    if max(width * height, scaled_width * scaled_height) > max_pixels:
        raise SampleError(f"{width} x {height} pixels, resized {scaled_width} x {scaled_height}: above {max_pixels}")


def _reason(error: Exception, data: bytes) -> str:
    if not data:
        return "empty"
    if isinstance(error, UnidentifiedImageError):
        if _brand(data) in _HEIF_BRANDS and "HEIF" not in Image.OPEN:
            return "a HEIF image, for which there is no decoder here; pip install 'clipindex[heif]'"
        if _brand(data) in _AVIF_BRANDS and "AVIF" not in Image.OPEN:
            return "an AVIF image, for which there is no decoder here; install Pillow 11.3 or newer"
        return f"no image that Pillow knows; begins with {data[:12]!r}"
    return f"{type(error).__name__}: {error}"
