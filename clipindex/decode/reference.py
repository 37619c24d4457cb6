"""Any image to pixels by Pillow and the model's own transform: what every other way is measured against."""

import contextlib
import importlib
import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from clipindex.decode.geometry import MAX_PIXELS, check_pixels, room
from clipindex.errors import SampleError
from clipindex.types import Preprocess, UInt8Array

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "AVIF", "HEIF", "PPM", "TGA")
"""What Pillow may take bytes for. Of its others, EPS runs Ghostscript on what it is given; ICO decodes on opening."""

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_AVIF_BRANDS = (b"avif", b"avis")


def decode_reference(
    data: bytes, preprocess: Preprocess, out: UInt8Array, *, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """As `jpeg.decode_image`, always by open_clip's own transform; lack of memory is raised as MemoryError."""
    if _brand(data) in _HEIF_BRANDS:
        _open_heif()
    try:
        with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
            width, height = image.size
            check_pixels(width, height, preprocess, max_pixels)
            if image.format == "TIFF":
                _check_tile(image, max_pixels)
            if image.format == "JPEG2000":
                _check_whole_jpeg2000(data)
            with room(width, height):
                image.load()  # before the transform is made, whose first making takes seconds and memory
                out[:] = np.asarray(_reference_transform(preprocess)(image))
            return width, height
    except (SampleError, MemoryError, ImportError):  # the last says nothing of the image
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
    # Here, since a process for one JPEG needs neither open_clip nor torchvision, and they take seconds.
    from open_clip.transform import PreprocessCfg, image_transform_v2

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
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

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
