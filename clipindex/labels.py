"""Labels as the members of a sample have them: a class number, or any number of them."""

import json
import re
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

MAX_LABELS = 1 << 16
"""Of one sample: what lists more is no list of an image's classes."""
MAX_LIST_BYTES = 1 << 20
"""Of a JSON list, enough for so many numbers."""

_MAX_HEADER_BYTES = 4096
_LABEL_RANGE = range(-(2**31), 2**31)
_NPY_MAGIC = b"\x93NUMPY"
_DESCRIPTION = re.compile(rb"'descr'\s*:\s*'([<>|=]?[?biuf]\d{0,2})'")
_SHAPE = re.compile(rb"'shape'\s*:\s*\(\s*(\d{1,12})\s*,\s*\)")


def parse_label(name: str, text: str) -> int | tuple[int, ...]:
    """What a `.cls` member says: a class number, or a JSON list of them.

    Args:
        name: Of the member, for the message.
        text: Its content.

    Raises:
        ValueError: It is neither.
    """
    if text.lstrip()[:1] == "[":
        found = _integers(text)
        if found is None:
            raise ValueError(f"{name}: {text[:40]!r} is no list of class numbers")
        return class_set(found, name)
    try:
        label = int(text)
    except ValueError:
        raise ValueError(f"{name}: {text[:40]!r} is no integer label or a list as [3,5]") from None
    if label not in _LABEL_RANGE:
        raise ValueError(f"{name}: label {label} does not fit 32 bits")
    return label


def parse_list(name: str, text: str) -> tuple[int, ...] | None:
    """The class numbers of a `.json` member that is a list of them, each once; None of any other, which is metadata."""
    if text.lstrip()[:1] != "[":
        return None
    found = _integers(text)
    if found is None or len(set(found)) < len(found):  # nobody lists a class twice: a multi-hot, say, or a box
        return None
    try:
        return class_set(found, name)
    except ValueError:  # whatever the numbers are, they are no classes
        return None


def parse_multi_hot(name: str, data: bytes) -> tuple[int, ...] | None:
    """The class numbers of a `.npy` member: the places of the ones among zeros [C], of any type of numbers.

    None of any other array, since corpora keep features and masks beside their images. The header is matched, never
    evaluated, and nothing is ever unpickled.

    Raises:
        ValueError: It is damaged.
    """
    wide = data[6:7] != b"\x01"  # the header's length has four bytes from version 2 on
    begin = 12 if wide else 10
    end = begin + int.from_bytes(data[8:begin], "little")
    if data[:6] != _NPY_MAGIC or data[6:7] not in (b"\1", b"\2", b"\3") or end > len(data):
        raise ValueError(f"{name}: no .npy file, or cut short")
    parsed = _parse_header(data[begin:end]) if end - begin <= _MAX_HEADER_BYTES else None
    if parsed is None:
        return None
    dtype, count = parsed
    if count * dtype.itemsize != len(data) - end:
        raise ValueError(f"{name}: {len(data) - end} bytes, where its header says {count * dtype.itemsize}")
    values = np.frombuffer(data, dtype, count, end)
    places = np.flatnonzero(values)
    if len(places) > MAX_LABELS or (values[places] != 1).any():
        return None
    return tuple(places.tolist())


def class_set(values: Iterable[int], name: str) -> tuple[int, ...]:
    """Class numbers in ascending order, each once.

    Args:
        values: In any order.
        name: Whose they are, for the message.

    Raises:
        ValueError: One is negative or does not fit 32 bits, or there are more than `MAX_LABELS`.
    """
    found = tuple(sorted(set(values)))
    for value in found[:1] + found[-1:]:
        if not 0 <= value < _LABEL_RANGE.stop:
            raise ValueError(f"{name}: {value} is no class number, from 0 to {_LABEL_RANGE.stop - 1}")
    if len(found) > MAX_LABELS:
        raise ValueError(f"{name}: {len(found)} classes, more than {MAX_LABELS}")
    return found


def _integers(text: str) -> list[int] | None:
    """A JSON list of integers; None of anything else."""
    if len(text) > MAX_LIST_BYTES:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) and all(type(value) is int for value in found) else None


@lru_cache(64)  # the samples of a corpus have one header
def _parse_header(header: bytes) -> tuple[np.dtype[np.generic], int] | None:
    """Type and length of a one-dimensional array of numbers; None of anything else."""
    description, shape = _DESCRIPTION.search(header), _SHAPE.search(header)
    if description is None or shape is None:
        return None
    try:
        return np.dtype(description[1].decode()), int(shape[1])
    except TypeError:
        return None
