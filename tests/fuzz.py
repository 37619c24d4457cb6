"""Fuzzing of what meets bytes first: `python tests/fuzz.py tar|image [libFuzzer options]`, as in -max_total_time=3600.

A crash, an exception that is no ShardError or SampleError, a sample that is neither row nor reject, or pixels that are
not Pillow's end it; libFuzzer then keeps the input beside it.
"""

import io
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["clipindex"]):
    from clipindex.decode import decode_image, decode_reference
    from clipindex.errors import SampleError, ShardError
    from clipindex.shards import list_shards, read_samples
    from clipindex.tar import read_members
    from clipindex.types import Preprocess

import numpy as np

PLAN = Preprocess(size=(16, 16), resize_mode="shortest", interpolation="bicubic", mean=(0.0,) * 3, std=(1.0,) * 3)
MAX_PIXELS = 1 << 20
"""What is larger costs time and finds nothing."""
SCRATCH = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)) / "fuzz.tar"


def one_tar(data: bytes) -> None:
    """Members and samples of anything: no exception but ShardError, the same keys twice in a row, offsets that hold."""
    data = with_checksums(data)
    try:
        for member in read_members(io.BytesIO(data), lambda name, size: True):
            assert member.data is None or data[member.offset : member.offset + member.size] == member.data
    except ShardError:
        pass
    SCRATCH.write_bytes(data)
    try:
        keys = [item.key for item in read_samples(list_shards(str(SCRATCH))[0])]
    except ShardError:
        return
    assert all(first != second for first, second in zip(keys, keys[1:], strict=False))


def with_checksums(data: bytes) -> bytes:
    """A fuzzer never guesses a checksum, and would not get past it."""
    fixed = bytearray(data)
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            fixed[at + 148 : at + 156] = b" " * 8
            fixed[at + 148 : at + 156] = b"%06o\0 " % sum(fixed[at : at + 512])
    return bytes(fixed)


def one_image(data: bytes) -> None:
    """Pixels as the reference gives them, or a reason."""
    pixels, expected = np.zeros((2, 16, 16, 3), np.uint8)
    try:
        size = decode_image(data, PLAN, pixels, max_pixels=MAX_PIXELS)
    except SampleError as error:
        assert str(error)
        return
    assert size == decode_reference(data, PLAN, expected, max_pixels=MAX_PIXELS)
    assert np.abs(pixels.astype(int) - expected).max() <= 2


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    target = {"tar": one_tar, "image": one_image}[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
