"""Which JPEGs may go where nobody notices damage: real files of all kinds, and what damage makes of them."""

import io

import numpy as np
import pytest
from corpus import encoded, picture
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from clipindex.decode import decode_image
from clipindex.decode.baseline import MAX_SIDE, read_baseline
from clipindex.types import Preprocess

PLAN = Preprocess(size=(32, 32), resize_mode="shortest", interpolation="bicubic", mean=(0.0,) * 3, std=(1.0,) * 3)
SHAPE = (301, 97)
ORDINARY = {
    "plain": {}, "4:4:4": {"subsampling": 0}, "4:2:2": {"subsampling": 1}, "4:2:0": {"subsampling": 2},
    "own tables": {"optimize": True}, "coarse": {"quality": 3}, "fine": {"quality": 100},
    "restarts": {"restart_marker_blocks": 3}, "a restart a row": {"restart_marker_rows": 1},
    "with notes": {"exif": b"Exif\0\0II*\0", "comment": b"of the coast"},
}  # fmt: skip


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_ones_are_taken(kind, mode):
    assert read_baseline(encoded(picture(*SHAPE).convert(mode), **ORDINARY[kind])) == SHAPE


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (17, 1), (1, 640)])
def test_at_any_size(shape):
    assert read_baseline(encoded(picture(*shape))) == shape


def with_segment(data, marker, change):
    """The file with the first segment of a marker changed; its length, if it is another, as well."""
    at = data.index(b"\xff" + bytes([marker]))
    length = int.from_bytes(data[at + 2 : at + 4], "big")
    body = change(data[at + 4 : at + 2 + length])
    return data[: at + 2] + (len(body) + 2).to_bytes(2, "big") + body + data[at + 2 + length :]


def replaced(at, value):
    return lambda body: body[:at] + bytes([value]) + body[at + 1 :]


def adobe(transform):
    data = encoded(picture(*SHAPE))
    note = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])
    return data[:2] + note + data[2:]


def lossless_restart(data):
    """Two restart markers in the wrong order."""
    first, second = data.rindex(b"\xff\xd1"), data.rindex(b"\xff\xd2")
    changed = bytearray(data)
    changed[first + 1], changed[second + 1] = 0xD2, 0xD1
    return bytes(changed)


PLAIN = encoded(picture(*SHAPE))
RESTARTS = encoded(picture(*SHAPE), restart_marker_blocks=3)
END = PLAIN.rindex(b"\xff\xd9")
OTHERS = {
    "nothing": b"",
    "no more than two markers": b"\xff\xd8\xff\xd9",
    "a PNG": encoded(form="PNG"),
    "progressive": encoded(picture(*SHAPE), progressive=True),
    "CMYK": encoded(picture(*SHAPE).convert("CMYK")),
    "RGB by Adobe's note": adobe(0),
    "YCCK by Adobe's note": adobe(2),
    "RGB by its components' names": encoded(picture(*SHAPE), keep_rgb=True),
    "12 bits": with_segment(PLAIN, 0xC0, replaced(0, 12)),
    "4:1:1": with_segment(PLAIN, 0xC0, replaced(7, 0x41)),
    "chroma finer than luma": with_segment(PLAIN, 0xC0, replaced(10, 0x22)),
    "no height yet": with_segment(PLAIN, 0xC0, lambda body: body[:1] + b"\0\0" + body[3:]),
    "too wide": with_segment(PLAIN, 0xC0, lambda body: body[:3] + (MAX_SIDE + 1).to_bytes(2, "big") + body[5:]),
    "a frame that is cut short": with_segment(PLAIN, 0xC0, lambda body: body[:-1]),
    "a bomb": with_segment(PLAIN, 0xC0, lambda body: body[:1] + b"\x3f\xff\x3f\xff" + body[5:]),
    "extended sequential": PLAIN.replace(b"\xff\xc0", b"\xff\xc1", 1),
    "arithmetic coding": PLAIN.replace(b"\xff\xc0", b"\xff\xc9", 1),
    "an unknown table of codes": with_segment(PLAIN, 0xDA, replaced(2, 0x22)),
    "an unknown component": with_segment(PLAIN, 0xDA, replaced(1, 9)),
    "half of the coefficients": with_segment(PLAIN, 0xDA, replaced(8, 31)),
    "one component of three": with_segment(PLAIN, 0xDA, lambda body: b"\x01" + body[1:3] + body[-3:]),
    "a table of zeros": with_segment(PLAIN, 0xDB, lambda body: body[:1] + bytes(64)),
    "a table of 16 bits": with_segment(PLAIN, 0xDB, lambda body: b"\x10" + body[1:65] + body[1:65]),
    "more codes than fit": with_segment(PLAIN, 0xC4, replaced(1, 9)),
    "no tables of quantisation": PLAIN.replace(b"\xff\xdb", b"\xff\xfe"),
    "no codes": PLAIN.replace(b"\xff\xc4", b"\xff\xfe"),
    "no end": PLAIN[:END],
    "something after the end": PLAIN + b"\0",
    "two ends": PLAIN + b"\xff\xd9",
    "two images": PLAIN + PLAIN,
    "an end in the middle": PLAIN[: END - 400] + b"\xff\xd9" + PLAIN[END - 400 :],
    "ones before the end": PLAIN[:END] + b"\xff" + PLAIN[END:],
    "a restart that was not announced": PLAIN[: END - 400] + b"\xff\xd0" + PLAIN[END - 400 :],
    "restarts that are missing": RESTARTS.replace(b"\xff\xd3", b"", 1),
    "restarts in the wrong order": lossless_restart(RESTARTS),
    "no coded data to speak of": PLAIN[: PLAIN.index(b"\xff\xda") + 14] + b"\x12" * 20 + b"\xff\xd9",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_others_are_left_to_the_cpu(kind):
    assert read_baseline(OTHERS[kind]) is None


@pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 3}, {"subsampling": 0}])
def test_cut_off_anywhere_it_is_not_taken(options):
    data = encoded(picture(60, 40), **options)
    assert read_baseline(data) == (60, 40)
    assert not [cut for cut in range(len(data)) if read_baseline(data[:cut]) is not None]
    # Cut off, and made to look as if it were not: what is left may be too little, or be taken for the image's own.
    assert read_baseline(data[: data.index(b"\xff\xda") + 16] + b"\xff\xd9") is None


MUTATED = {
    f"{kind}, {mode}": encoded(picture(48, 40).convert(mode), **options)
    for kind, options in ORDINARY.items()
    for mode in ("RGB", "L")
}


@settings(max_examples=800, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from(sorted(MUTATED)),
    changes=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=4),
    in_header=st.booleans(),
    cut=st.none() | st.tuples(st.integers(0, 2**20), st.integers(1, 40)),
)
@example(kind="plain, RGB", changes=[(0, 0xFF)], in_header=False, cut=None)
@pytest.mark.filterwarnings("ignore")  # Pillow's own, of odd metadata
def test_what_is_taken_is_an_image_for_the_cpu_as_well(kind, changes, in_header, cut):
    """Damage of any kind: nothing that the CPU would reject may be taken, or it would become a row."""
    data = bytearray(MUTATED[kind])
    span = data.index(b"\xff\xda") + 14 if in_header else len(data)
    for at, value in changes:
        data[at % span] = value
    if cut is not None:
        at = cut[0] % len(data)
        del data[at : at + cut[1]]
    size = read_baseline(bytes(data))
    if size is not None:
        pixels = np.zeros((*PLAN.size, 3), np.uint8)
        assert decode_image(bytes(data), PLAN, pixels) == size
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == size
