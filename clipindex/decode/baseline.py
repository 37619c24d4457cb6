"""Which JPEGs are ordinary enough for a decoder that nobody can ask whether it noticed something.

A decoder on a device says little of what it met, so what can be known without decoding is found out before: the
structure that ITU-T T.81 asks of a sequential baseline image of one scan, every table that the scan names, as many
restart markers as the header promises, and an end. What remains unseen is damage inside of the coded data that leaves
all markers whole; there libjpeg, and so Pillow and the CPU's way, make an image of what they find as well.
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from clipindex.types import IntArray

SAMPLINGS = ((1, 1), (2, 1), (2, 2), (1, 2))
"""Luma per chroma sample, across and down: 4:4:4, 4:2:2, 4:2:0 and 4:4:0; of the two chroma planes (1, 1)."""
MAX_SIDE = 16_384
"""Of NVIDIA's hardware decoders."""

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_SOF0, _DHT, _SOS, _DQT, _DRI, _APP14, _COM = 0xC0, 0xC4, 0xDA, 0xDB, 0xDD, 0xEE, 0xFE
_KNOWN = {_SOF0, _DHT, _SOS, _DQT, _DRI, _COM, *range(0xE0, 0xF0)}  # the last are what applications note
_BLOCK = 8  # samples of a side
_FEWEST_BITS = 2  # of a block: one code for its mean, one for the rest
_MOST_DC_BITS = 11  # of a difference of means, at 8 bits a sample (table F.1)
_RGB_NAMES = b"RGB"  # by which libjpeg takes components for red, green and blue where nothing else is said


class Baseline(NamedTuple):
    """What the header of an ordinary JPEG says."""

    width: int
    height: int


class _Frame(NamedTuple):
    size: Baseline
    names: bytes
    """Of the components, in order."""
    tables: bytes
    """Of quantisation, one for each."""
    sampling: tuple[int, int]
    """Of the first component; others have (1, 1)."""


def read_baseline(data: bytes) -> Baseline | None:
    """Width and height of a JPEG that is baseline, of one or three components, whole by its structure; None of others.

    None is no verdict on the image: it is for a decoder that can say what it finds.
    """
    try:
        return _read(data)
    except IndexError:  # a segment that ends too early
        return None


def _read(data: bytes) -> Baseline | None:
    if data[:2] != _SOI or data[-2:] != _EOI:
        return None
    segments, at = _segments(data)
    if not segments.keys() <= _KNOWN or len(segments.get(_SOF0, ())) != 1:
        return None
    quantisers = [_quantisers(body) for body in segments[_DQT]]
    codes = [_codes(body) for body in segments[_DHT]]
    frame = _frame(segments[_SOF0][0])
    interval = _interval(segments[_DRI])
    if frame is None or interval is None or not all(quantisers) or not all(codes):
        return None
    if not _is_ycbcr(frame, segments[_APP14]):
        return None
    if not _scan_fits(segments[_SOS][0], frame, set().union(*quantisers), set().union(*codes)):
        return None
    return frame.size if _is_coded(data[at:-2], frame, interval) else None


def _segments(data: bytes) -> tuple[dict[int, list[bytes]], int]:
    """Contents of the segments by their markers, up to the first scan's header, and where that ends (B.1.1.4).

    Raises:
        IndexError: The file ends before.
    """
    found: dict[int, list[bytes]] = defaultdict(list)
    at = 2
    while _SOS not in found:
        if data[at] != 0xFF:
            return {}, at
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        if length < 2 or len(body) != length - 2:
            return {}, at
        found[data[at + 1]].append(body)
        at += 2 + length
    return found, at


def _interval(bodies: list[bytes]) -> int | None:
    """Units between restart markers, 0 where there are none (B.2.4.4); None if it makes no sense."""
    if any(len(body) != 2 for body in bodies):
        return None
    return int.from_bytes(bodies[-1], "big") if bodies else 0


def _is_ycbcr(frame: _Frame, adobe: list[bytes]) -> bool:
    """Whether three components are luma and chroma, or one is grey: what libjpeg concludes of the same file."""
    said = [body for body in adobe if body[:5] == b"Adobe"]
    if said:
        return all(len(body) >= 12 and body[11] == 1 for body in said)  # 0 is RGB, 2 is YCCK
    return frame.names != _RGB_NAMES


def _quantisers(body: bytes) -> set[int]:
    """Names of the tables of 8 bits in a segment (B.2.4.1); none if one of them is odd."""
    names = body[::65]
    whole = len(body) == 65 * len(names) and max(names) <= 3
    return set(names) if whole and all(0 not in body[at + 1 : at + 65] for at in range(0, len(body), 65)) else set()


def _codes(body: bytes) -> set[int]:
    """Classes and names of the Huffman tables in a segment (B.2.4.2); none if one of them is odd."""
    names: set[int] = set()
    at = 0
    while at < len(body):
        counts = body[at + 1 : at + 17]
        # Of 16 bits, the codes of length i take 2^(16 - i) words each; the word of ones is no code (F.1.2.1.1, K.2).
        words = sum(count << (15 - place) for place, count in enumerate(counts))
        symbols = body[at + 17 : at + 17 + sum(counts)]
        too_wide = not body[at] & 0x10 and max(symbols, default=0) > _MOST_DC_BITS
        if len(counts) != 16 or body[at] & ~0x11 or not 0 < words < 1 << 16 or too_wide:
            return set()
        names.add(body[at])
        at += 17 + sum(counts)
    return names if at == len(body) else set()


def _frame(body: bytes) -> _Frame | None:
    """A frame header (B.2.2) of 8 bits, with one or three components in a common sampling."""
    number = body[5]
    height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    if body[0] != 8 or number not in (1, 3) or len(body) != 6 + 3 * number:
        return None
    names, factors, tables = body[6::3], body[7::3], body[8::3]
    sampling = factors[0] >> 4, factors[0] & 15
    common = sampling in SAMPLINGS if number == 1 else sampling in SAMPLINGS and factors[1:] == b"\x11\x11"
    if not common or len(set(names)) != number or not 0 < height <= MAX_SIDE or not 0 < width <= MAX_SIDE:
        return None
    # A single component is coded block by block, whatever its factors say (A.2.2).
    return _Frame(Baseline(width, height), names, tables, sampling if number == 3 else (1, 1))


def _scan_fits(body: bytes, frame: _Frame, quantisers: set[int], codes: set[int]) -> bool:
    """Whether a scan header (B.2.3) is of all components, from the first coefficient to the last, by known tables."""
    number = len(frame.names)
    if len(body) != 4 + 2 * number or body[0] != number or body[-3:] != b"\x00\x3f\x00":
        return False
    used = {part for pair in body[2 : 1 + 2 * number : 2] for part in (pair >> 4, 0x10 | (pair & 15))}
    return body[1 : 1 + 2 * number : 2] == frame.names and used <= codes and set(frame.tables) <= quantisers


def _is_coded(coded: bytes, frame: _Frame, interval: int) -> bool:
    """Whether nothing but coded data and the right restart markers is there, and not less than the blocks take."""
    across, down = frame.sampling
    units = -(-frame.size.width // (_BLOCK * across)) * -(-frame.size.height // (_BLOCK * down))
    blocks = units * (across * down + len(frame.names) - 1)
    if 8 * len(coded) < _FEWEST_BITS * blocks:
        return False
    markers = _markers(coded)
    restarts = (units - 1) // interval if interval else 0
    return len(markers) == restarts and bool((markers == 0xD0 + np.arange(restarts) % 8).all())


def _markers(coded: bytes) -> IntArray:
    """What comes after a byte of ones, apart from the zero that says it is data (B.1.1.5)."""
    values = np.frombuffer(coded, np.uint8)
    places = np.flatnonzero(values == 0xFF) + 1
    following = values[places[places < len(values)]].astype(np.int64)
    # Ones at the very end belong to no marker and to no data.
    ends = np.full(int(places.size and places[-1] == len(values)), -1)
    return np.concatenate([following[following != 0], ends])
