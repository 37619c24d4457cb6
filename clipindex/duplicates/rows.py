"""The rows of a directory under the ids of its index."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from clipindex.errors import IndexingError
from clipindex.index.files import OpenIndex
from clipindex.nearest import locate, unit_cosines, vectors_at
from clipindex.store import EmbeddingBatch, VectorReader, check_cosines, read_embeddings
from clipindex.types import Float32Array, IntArray

AGAIN = "run clipindex index, then this again"
PAIRS_AT_ONCE = 1 << 16
ROWS_AT_ONCE = 1 << 11
"""Of a shard, which may have millions: they are rounded in memory that a cache holds."""
OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much."""


class Rows(NamedTuple):
    """All rows that an index knows."""

    folder: Path
    opened: OpenIndex
    names: list[str]
    """Of shards, by their first id."""
    reader: VectorReader

    def batches(self) -> Iterator[tuple[IntArray, EmbeddingBatch]]:
        """Ids [n] and rows, a block at a time, in the order of their ids."""
        shards = {shard.name: shard for shard in self.opened.shards}
        for batch in read_embeddings(self.folder, names=self.names):
            shard = shards[batch.shard.name]
            if batch.shard.rows != shard.rows:
                raise IndexingError(f"shard {shard.name} was replaced while it was read; {AGAIN}")
            first = shard.first_id + batch.first_row
            yield np.arange(first, first + len(batch.embedding), dtype=np.int64), batch

    def stored(self, ids: IntArray) -> Iterator[tuple[slice, np.ndarray[Any, Any]]]:
        """Vectors of ascending ids in the directory's dtype, and which of the ids they are of, some at a time."""
        shards, rows = locate(self.opened, ids)
        edges = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(ids)]
        for begin, end in zip(edges[:-1], edges[1:], strict=True):
            for first in range(begin, end, ROWS_AT_ONCE):
                some = slice(first, min(first + ROWS_AT_ONCE, end))
                yield some, self.reader.take(self.names[shards[first]], rows[some])

    def cosines(self, ones: IntArray, others: IntArray) -> Float32Array:
        """Exact cosines [n] of pairs of ids."""
        parts = [np.empty(0, np.float32)]
        for first in range(0, len(ones), PAIRS_AT_ONCE):
            some = slice(first, first + PAIRS_AT_ONCE)
            left, right = (
                vectors_at(self.reader, self.names, *locate(self.opened, ids[some])) for ids in (ones, others)
            )
            parts.append(unit_cosines(left, right))
        return np.concatenate(parts)


def unit(vectors: np.ndarray[Any, Any]) -> torch.Tensor:
    """Vectors [n, D] of any float type in float32, brought to unit length: float16 leaves them a hair from it."""
    return torch.nn.functional.normalize(torch.from_numpy(vectors).float(), dim=1)


def checked_unit(batch: EmbeddingBatch, some: slice) -> torch.Tensor:
    """Some of its vectors as `unit` gives them.

    Raises:
        StoreError: One is damaged: it is longer than a unit vector, or has what is no number.
    """
    vectors = torch.from_numpy(batch.embedding[some]).float()
    norms = vectors.norm(dim=1, keepdim=True)
    check_cosines(batch, norms.numpy())
    return vectors.div_(norms.clamp_min_(1e-12))
