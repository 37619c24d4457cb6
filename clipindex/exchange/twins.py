"""Files whose rows a directory has already, under another name: an export that comes back, or files that were moved."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from clipindex.exchange.checked import open_checked
from clipindex.exchange.rows import AT_ONCE
from clipindex.exchange.sources import Pair
from clipindex.store import ShardRecord, VectorReader, read_embeddings
from clipindex.types import Shard

_FEW = 64
"""Rows of a file that are checked at a time to find its first: most files are new, and 4,096 of each took 36 ms."""


class Twins:
    """Shards of a directory, to be found by their rows: the same keys in the same order, with the same vectors.

    Of a file, its rows are those that would be taken: a shard that was made of the same file lacks the others as well,
    and so does an export of it. Vectors are the same where they are in float16, which an export may have made of them.
    Of shards with no more rows than a file the first vector is read, once; all rows where that is the file's first.

    Args:
        folder: The embedding directory.
        records: Of its published shards, by name.
        own: Files of this run that it publishes, or an earlier one did. They are no twins of each other: what is
            published must not depend on where a run was stopped, nor on rows that are about to be replaced.
    """

    def __init__(self, folder: Path, records: Mapping[str, ShardRecord], own: Sequence[Shard]) -> None:
        names = {shard.name for shard in own}
        self._folder = folder
        self._replaced = names & records.keys()
        others = (record for name, record in records.items() if record.rows and name not in names)
        self._unread = sorted(others, key=lambda record: (record.rows, record.name), reverse=True)
        self._by_first: dict[bytes, list[str]] = {}

    def find(self, pair: Pair, dim: int) -> str | None:
        """The name of a shard that has the rows of a file.

        Raises:
            ShardError: The file, or its file of rows, cannot be read.
            StoreError: A shard is damaged.
        """
        if pair.shard.name in self._replaced:
            return None
        self._read_firsts(open_checked(pair, dim).num_rows)
        first = next(_rows_of_file(pair, dim, _FEW), None) if self._by_first else None
        if first is None:
            return None
        for name in self._by_first.get(first[1], ()):
            pairs = zip_longest(_rows_of_file(pair, dim), _rows_of_shard(self._folder, name))
            if all(one == other for one, other in pairs):
                return name
        return None

    def _read_firsts(self, count: int) -> None:
        """Read the first vector of the shards that have at most `count` rows."""
        if self._unread and self._unread[-1].rows <= count:
            reader = VectorReader(self._folder)
            while self._unread and self._unread[-1].rows <= count:
                name = self._unread.pop().name
                (first,) = _halves(reader.take(name, np.array([0])))
                self._by_first.setdefault(first, []).append(name)


def _rows_of_file(pair: Pair, dim: int, at_once: int = AT_ONCE) -> Iterator[tuple[str, bytes]]:
    """Key and vector of each row that would be taken."""
    for block in open_checked(pair, dim, at_once).blocks:
        yield from zip((block.rows.keys[at] for at in block.kept), _halves(block.vectors.unit[block.kept]), strict=True)


def _rows_of_shard(folder: Path, name: str) -> Iterator[tuple[str, bytes]]:
    for batch in read_embeddings(folder, ("key",), [name]):
        yield from zip(batch.columns["key"].to_pylist(), _halves(batch.embedding), strict=True)


def _halves(vectors: np.ndarray[Any, Any]) -> list[bytes]:
    """Each of the vectors [N, D] in float16."""
    with np.errstate(over="ignore"):  # what is damaged is no twin
        halves = np.ascontiguousarray(vectors, np.float16)
    return halves.view(f"V{halves.itemsize * halves.shape[1]}")[:, 0].tolist() if len(halves) else []
