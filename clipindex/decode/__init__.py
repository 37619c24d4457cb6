"""Encoded image bytes to the uint8 pixels that a model's own transform would have seen.

The reference is open_clip's inference transform, applied to what Pillow opens: resize in the image's own mode, crop,
then convert to RGB; for backbones of timm it is timm's. EXIF orientation is not applied. Common JPEGs take a faster way
to the same pixels (libjpeg-turbo, then PyTorch's antialiased uint8 resize: within 2/255 of the reference); everything
else takes the reference itself. On a CUDA device ordinary JPEGs may be decoded in batches by nvJPEG (`on_device`).
"""

from clipindex.decode.geometry import LARGE_PIXELS, MAX_PIXELS
from clipindex.decode.jpeg import MAX_SCANS, SCALED_OVER_TARGET, decode_image
from clipindex.decode.reference import FORMATS, decode_reference

__all__ = [
    "FORMATS",
    "LARGE_PIXELS",
    "MAX_PIXELS",
    "MAX_SCANS",
    "SCALED_OVER_TARGET",
    "decode_image",
    "decode_reference",
]
