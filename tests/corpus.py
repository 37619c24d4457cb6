"""Real bytes for the tests: images that look like something, and tars made by the standard library."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def picture(width=96, height=64, seed=0):
    """A smooth RGB picture with a few shapes in it, as a PIL image."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image=None, form="JPEG", **options):
    """An image file's bytes."""
    buffer = io.BytesIO()
    (image or picture()).save(buffer, form, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], form=tarfile.USTAR_FORMAT):
    """A tar of regular files, in the given order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def labelled(keys, num_classes=3, seed=0):
    """Members of one JPEG, label and caption for each key."""
    for at, key in enumerate(keys):
        yield f"{key}.jpg", encoded(picture(64 + at % 5, 48, seed=seed + at), quality=90)
        yield f"{key}.cls", str(at % num_classes).encode()
        yield f"{key}.txt", f"picture number {at}".encode()


CRASHING_PLUGIN = """
import ctypes
from PIL import Image, ImageFile

class Crashing(ImageFile.ImageFile):
    format = "HEIF"

    def _open(self):
        self._size, self._mode = (8, 8), "RGB"

    def load(self):
        if b"poison" in self.fp.getvalue():
            ctypes.string_at(0)
        self.im = Image.new("RGB", (8, 8)).im
        self.pyaccess = None

def register_heif_opener():
    Image.register_open("HEIF", Crashing, lambda prefix: prefix[4:12] == b"ftypheic")
"""
"""A Pillow plug-in whose decoder, for some images, reads address zero: a real segmentation fault."""

HARMLESS = b"\0\0\0\x18ftypheic"
POISON = HARMLESS + b" poison"
