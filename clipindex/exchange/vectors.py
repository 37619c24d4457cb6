"""Vectors in NumPy's .npy format: opened where they lie, checked, brought to unit length."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipindex.errors import ShardError
from clipindex.types import Float32Array

UNIT_TOLERANCE = 5e-4
"""Of a vector's length, which rounding to float16 moves by 2**-11 of it at most. Such vectors stay as they are."""


class UnitVectors(NamedTuple):
    """A block of N vectors."""

    unit: Float32Array
    """[N, D]; anything where there is a fault."""
    lengths: Float32Array
    """[N], before."""
    is_unit: np.ndarray[Any, np.dtype[np.bool_]]
    """[N], whether it was a unit vector before."""
    faults: dict[int, str]
    """Of the vectors that have no direction, by their place."""


def open_array(path: Path) -> np.ndarray[Any, Any]:
    """Map a .npy file into memory; no pickle in it is ever loaded.

    Raises:
        ShardError: It is not a .npy file, holds Python objects, was cut, or goes on after its array.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy hands on whatever Python's own parser says of a damaged header
        raise ShardError(f"{path}: cannot be read as .npy ({error}); restore it, or save plain numbers") from error
    if not isinstance(array, np.memmap):
        raise ShardError(f"{path}: is a .npz archive; save its array as .npy")
    excess = os.path.getsize(path) - array.offset - array.nbytes
    if excess:
        raise ShardError(f"{path}: {excess:,} bytes follow its array; files that were glued together must be apart")
    return array


def open_vectors(path: Path, dim: int) -> np.ndarray[Any, Any]:
    """Map vectors [N, dim] of any float type into memory.

    Raises:
        ShardError: The file is damaged, or holds something else.
    """
    array = open_array(path)
    if array.ndim != 2 or array.dtype.kind != "f":
        raise ShardError(f"{path}: holds {array.dtype} {list(array.shape)}; vectors are floats [N, D]")
    if array.shape[1] != dim:
        raise ShardError(f"{path}: its vectors have {array.shape[1]} dimensions, the model's {dim}; name their model")
    return array


def to_unit(vectors: np.ndarray[Any, Any]) -> UnitVectors:
    """Bring vectors [N, D] to unit length, and say which have none."""
    wide = vectors.astype(np.float64)
    with np.errstate(all="ignore"):  # what overflows, or is no number, is a fault below
        lengths = np.sqrt(np.einsum("nd,nd->n", wide, wide))
        stored = lengths.astype(np.float32)
        is_unit = np.abs(lengths - 1) <= UNIT_TOLERANCE
        unit = (wide / np.where(is_unit, 1, lengths)[:, None]).astype(np.float32)
    bad = np.flatnonzero(~(np.isfinite(stored) & (stored > 0)))
    faults = {int(at): _fault(float(lengths[at])) for at in bad}
    return UnitVectors(unit, stored, is_unit, faults)


def _fault(length: float) -> str:
    if length < 1:
        return "the vector is zero"
    return f"the vector is of length {length:.3g}" if np.isfinite(length) else "the vector is not finite"
