"""Files whose rows a directory has already, under another name: an export that comes back, or files that were moved."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from clipindex.exchange.rows import open_rows
from clipindex.exchange.sources import Pair
from clipindex.exchange.vectors import open_vectors, to_unit
from clipindex.store import ShardRecord, VectorReader, read_embeddings


class Twins:
    """Shards of a directory, to be found by their rows: the same keys in the same order, with the same vectors.

    Vectors are the same where they are in float16, which an export may have made of them. Of shards with as many rows
    as a file the first vector is read, once; all rows only where that is the file's first.

    Args:
        folder: The embedding directory.
        records: Of its published shards, by name.
    """

    def __init__(self, folder: Path, records: Mapping[str, ShardRecord]) -> None:
        self._folder = folder
        self._by_rows: dict[int, list[str]] = {}
        for name, record in records.items():
            self._by_rows.setdefault(record.rows, []).append(name)
        self._by_first: dict[int, dict[bytes, list[str]]] = {}

    def find(self, pair: Pair, dim: int) -> str | None:
        """The name of another shard that has the rows of a file.

        Raises:
            ShardError: The file, or its file of rows, cannot be read.
            StoreError: A shard is damaged.
        """
        vectors = open_vectors(Path(pair.shard.url), dim)
        for name in self._with_first(vectors):
            if name != pair.shard.name and _has_rows(self._folder, name, vectors, pair.rows):
                return name
        return None

    def _with_first(self, vectors: np.ndarray[Any, Any]) -> Iterable[str]:
        """Shards with as many rows, of which the first has the same vector."""
        count = len(vectors)
        if not count or count not in self._by_rows:
            return ()
        if count not in self._by_first:
            self._by_first[count] = _by_first(self._folder, self._by_rows[count])
        return self._by_first[count].get(_halves(to_unit(vectors[:1]).unit).tobytes(), ())


def _by_first(folder: Path, names: Sequence[str]) -> dict[bytes, list[str]]:
    reader = VectorReader(folder)
    found: dict[bytes, list[str]] = {}
    for name in names:
        found.setdefault(_halves(reader.take(name, np.array([0]))).tobytes(), []).append(name)
    return found


def _has_rows(folder: Path, name: str, vectors: np.ndarray[Any, Any], rows: Path) -> bool:
    keys = chain.from_iterable(block.keys for block in open_rows(rows).blocks)
    first = 0
    for batch in read_embeddings(folder, ("key",), [name]):
        count = len(batch.embedding)
        if batch.columns["key"].to_pylist() != list(islice(keys, count)):
            return False
        if not np.array_equal(_halves(batch.embedding), _halves(to_unit(vectors[first : first + count]).unit)):
            return False
        first += count
    return first == len(vectors) and next(keys, None) is None


def _halves(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with np.errstate(all="ignore"):  # what is no vector is no row either
        return vectors.astype(np.float16)
