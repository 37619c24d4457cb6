"""Vectors of rows wherever they lie, and their cosines one by one."""

from collections.abc import Sequence

import numpy as np
import torch

from clipindex.store import VectorReader
from clipindex.types import Float32Array, IntArray


def vectors_at(reader: VectorReader, names: Sequence[str], shards: IntArray, rows: IntArray) -> torch.Tensor:
    """Vectors [n, D], float32, of rows: for each a place in `names` and a row."""
    order = np.argsort(shards, kind="stable")
    parts = [
        reader.take(names[shards[at[0]]], rows[at])
        for at in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1)
        if len(at)
    ]
    if not parts:
        return torch.empty(0, reader.dim)
    return torch.from_numpy(np.concatenate(parts)[np.argsort(order)]).float()


def row_cosines(
    reader: VectorReader,
    names: Sequence[str],
    vectors: torch.Tensor,
    shards: IntArray,
    rows: IntArray,
) -> Float32Array:
    """Exact cosines [n] of vectors [n, D] and rows, one by one."""
    cosines: Float32Array = torch.einsum("nd,nd->n", vectors, vectors_at(reader, names, shards, rows)).numpy()
    return cosines


def unit_cosines(ones: torch.Tensor, others: torch.Tensor) -> Float32Array:
    """Cosines [n] of vectors [n, D], one by one, brought to unit length first: float16 leaves them a hair from it."""
    normalize = torch.nn.functional.normalize
    cosines: Float32Array = torch.einsum("nd,nd->n", normalize(ones, dim=1), normalize(others, dim=1)).numpy()
    return np.minimum(cosines, 1)
