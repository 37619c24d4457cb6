"""Images as crawls bring them: each ends as the pixels that Pillow gives, or as a reject with a reason."""

import io
import json
import os
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from command_line import with_modules
from corpus import encoded, picture
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from clipindex.decode import LARGE_PIXELS, decode_image, decode_reference
from clipindex.errors import SampleError
from clipindex.types import Preprocess

PLAN = Preprocess(size=(64, 64), resize_mode="shortest", interpolation="bicubic", mean=(0.0,) * 3, std=(1.0,) * 3)


def decoded(data, decode=decode_image, **options):
    out = np.zeros((*PLAN.size, 3), np.uint8)
    size = decode(data, PLAN, out, **options)
    return out.astype(np.int16), size


def in_mode(mode, shape=(120, 90)):
    image = picture(*shape)
    return image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)


def heif():
    import pillow_heif

    pillow_heif.register_heif_opener()
    return encoded(form="HEIF", quality=90)


def animated(form):
    frames = [Image.new("RGB", (90, 64), colour) for colour in ("red", "green", "blue")]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=50)


CMYK = [("JPEG", "CMYK", {}), ("JPEG", "CMYK", {"progressive": True})]
KINDS = [
    *CMYK, ("JPEG", "RGB", {}), ("JPEG", "RGB", {"progressive": True}), ("JPEG", "L", {}), ("PNG", "RGB", {}),
    ("PNG", "P", {}), ("PNG", "LA", {}), ("PNG", "I;16", {}), ("WEBP", "RGB", {}), ("WEBP", "RGB", {"lossless": True}),
    ("GIF", "P", {}), ("BMP", "RGB", {}), ("TIFF", "RGB", {}), ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("JPEG2000", "RGB", {}), ("AVIF", "RGB", {}), ("PPM", "RGB", {}), ("TGA", "RGB", {}),
]  # fmt: skip


@pytest.mark.parametrize(("form", "mode", "options"), KINDS)
def test_cut_off_at_any_byte_it_is_whole_or_a_reject(form, mode, options):
    data = encoded(in_mode(mode), form, **options)
    whole, _ = decoded(data)
    cuts = {
        *range(0, min(len(data), 700)),
        *range(0, len(data), max(1, len(data) // 400)),
        *range(len(data) - 40, len(data)),
    }
    for cut in cuts:
        try:
            pixels, _ = decoded(data[:cut])
        except SampleError:
            continue
        assert np.abs(pixels - whole).max() <= 2, f"filler from byte {cut} of {len(data)} on"


MUTATED = {
    f"{form} {mode} {len(options)}": encoded(in_mode(mode, (48, 40)), form, **options) for form, mode, options in KINDS
}


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from(sorted(MUTATED)),
    changes=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.none() | st.integers(0, 2**20),
)
@example(kind="JPEG RGB 0", changes=[(2, 0xDB)], cut=None)
@pytest.mark.filterwarnings("ignore")  # Pillow's own, of odd metadata
def test_damaged_at_random_it_gives_pillows_pixels_or_a_reject(kind, changes, cut):
    data = bytearray(MUTATED[kind])
    for at, value in changes:
        data[at % len(data)] = value
    damaged = bytes(data if cut is None else data[: cut % len(data)])
    try:
        pixels, size = decoded(damaged)
    except SampleError as error:
        assert str(error)
        return
    reference, reference_size = decoded(damaged, decode_reference)
    assert size == reference_size
    assert np.abs(pixels - reference).max() <= 2


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=300), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"BM", b"GIF89a"])
)
@pytest.mark.filterwarnings("ignore")
def test_bytes_that_are_no_image_are_rejects(data, start):
    with pytest.raises(SampleError):
        decoded(start + data)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_counts(form):
    pixels, size = decoded(animated(form))
    assert size == (90, 64)
    assert (pixels[..., 0] > 200).all() and (pixels[..., 1:] < 60).all()


def test_transparency_is_dropped_as_open_clip_drops_it():
    image = picture().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    palette = image.convert("P")
    palette.info["transparency"] = 3
    for one in (image, palette):
        data = encoded(one, "PNG")
        with Image.open(io.BytesIO(data)) as opened:
            expected = decoded(encoded(opened.convert("RGB"), "PNG"))[0]
        if one is image:  # a palette is resized before it is converted
            assert np.abs(decoded(data)[0] - expected).max() <= 2
        else:
            np.testing.assert_array_equal(decoded(data)[0], decoded(data, decode_reference)[0])


def test_ycck_is_converted_like_pillow():
    data = encoded(picture().convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data  # transform 2: YCCK
    np.testing.assert_array_equal(decoded(data)[0], decoded(data, decode_reference)[0])


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (2000, 1)])
def test_odd_shapes(shape):
    for form in ("PNG", "JPEG"):
        assert decoded(encoded(picture(*shape), form))[1] == shape


def test_a_sliver_that_resizing_would_blow_up_is_refused():
    with pytest.raises(SampleError, match="1 x 200000 pixels"):
        decoded(encoded(Image.new("L", (1, 200_000)), "PNG"))


def header_of(form, width, height):
    """A file that says it is that large and has no data to speak of."""
    if form == "PNG":
        head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        chunks = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + struct.pack(">I", 99) + b"IDAT"
        return b"\x89PNG\r\n\x1a\n" + chunks
    data = bytearray(encoded(Image.new("RGB", (8, 8)), form))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_bombs_are_known_by_their_headers(form):
    started = time.perf_counter()
    with pytest.raises(SampleError, match="30000|bomb"):
        decoded(header_of(form, 30_000, 30_000))
    assert time.perf_counter() - started < 1
    with pytest.raises(SampleError, match="96 x 64 pixels.*above 5000"):
        decoded(encoded(form=form), max_pixels=5000)
    assert decoded(encoded(form=form), max_pixels=96 * 64)[1] == (96, 64)


def test_a_tile_larger_than_its_image_is_counted():
    data = bytearray(encoded(picture(64, 64), "TIFF", compression="raw"))
    count_at = int.from_bytes(data[4:8], "little")
    num_tags = int.from_bytes(data[count_at : count_at + 2], "little")
    for at in range(count_at + 2, count_at + 2 + 12 * num_tags, 12):
        tag = int.from_bytes(data[at : at + 2], "little")
        if tag in (273, 278, 279):  # a strip becomes a tile of 20,000 x 20,000
            new = {273: 324, 278: 323, 279: 325}[tag]
            data[at : at + 2] = new.to_bytes(2, "little")
            if new == 323:
                data[at + 8 : at + 12] = (20_000).to_bytes(4, "little")
        if tag == 284:  # planar configuration is 1 by default: its place is taken
            data[at : at + 12] = struct.pack("<HHII", 322, 4, 1, 20_000)
    with pytest.raises(SampleError, match="tiles of 20000 x 20000"):
        decoded(bytes(data))


def test_scans_without_end_are_refused():
    whole = encoded(picture(64, 64), progressive=True)
    first = whole.index(b"\xff\xda")
    empty_scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x00\x00"
    with pytest.raises(SampleError, match="5[0-9][0-9] scans"):
        decoded(whole[:first] + empty_scan * 500 + whole[first:])


def test_icons_are_not_opened():
    """Pillow decodes them before anybody can ask for their size."""
    with pytest.raises(SampleError, match="no image that Pillow knows"):
        decoded(encoded(form="ICO"))


def test_heif_is_decoded_where_a_decoder_is():
    pixels, size = decoded(heif())
    assert size == (96, 64)
    assert np.abs(pixels - decoded(encoded(form="PNG"))[0]).mean() < 4


def test_without_a_decoder_the_reject_says_what_to_install(tmp_path):
    (tmp_path / "pillow_heif.py").write_text("raise ImportError\n")
    (tmp_path / "x.heic").write_bytes(heif())
    code = (
        "import sys, json; import numpy as np\n"
        "from clipindex.decode import decode_image; from clipindex.errors import SampleError\n"
        "from clipindex.types import Preprocess\n"
        "p = Preprocess(size=(8, 8), resize_mode='shortest', interpolation='bicubic', mean=(0,) * 3, std=(1,) * 3)\n"
        "try: decode_image(open('x.heic', 'rb').read(), p, np.zeros((8, 8, 3), np.uint8))\n"
        "except SampleError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=with_modules(tmp_path), capture_output=True, text=True
    )
    assert "clipindex[heif]" in done.stdout, done.stderr


def test_postscript_is_not_run(tmp_path, monkeypatch):
    """Pillow would hand it to Ghostscript, whatever it is called in the tar."""
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(SampleError, match="no image that Pillow knows"):
        decoded(data)
    assert not (tmp_path / "ran").exists()


def test_without_memory_it_is_a_reject_and_the_next_one_is_decoded(tmp_path):
    side = 9000
    assert side * side > LARGE_PIXELS
    (tmp_path / "large.jpg").write_bytes(encoded(Image.new("RGB", (side, side), "red")))
    (tmp_path / "small.jpg").write_bytes(encoded())
    code = (
        "import json, resource, numpy as np, torch\n"
        "from clipindex.decode import decode_image; from clipindex.errors import SampleError\n"
        "from clipindex.types import Preprocess\n"
        "p = Preprocess(size=(64, 64), resize_mode='shortest', interpolation='bicubic', mean=(0,) * 3, std=(1,) * 3)\n"
        "out = np.zeros((64, 64, 3), np.uint8)\n"
        "decode_image(open('small.jpg', 'rb').read(), p, out)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)\n"
        "try: decode_image(open('large.jpg', 'rb').read(), p, out)\n"
        "except SampleError as error: said = str(error)\n"
        "print(json.dumps([said, decode_image(open('small.jpg', 'rb').read(), p, out)]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    said, size = json.loads(done.stdout or f'["{done.returncode}", 0]')
    assert "memory" in said, done.stderr
    assert size == [96, 64]
