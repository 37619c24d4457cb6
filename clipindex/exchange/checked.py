"""A file of vectors beside its file of rows: which of them are taken, and what is wrong with the others."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipindex.errors import ShardError
from clipindex.exchange.rows import AT_ONCE, RowFile, Rows, open_rows
from clipindex.exchange.sources import Pair
from clipindex.exchange.vectors import UnitVectors, open_vectors, to_unit
from clipindex.shards import remembered_key


class CheckedBlock(NamedTuple):
    """Consecutive rows of a file, each with its vector."""

    first: int
    """Row number, within the file, of the first."""
    rows: Rows
    vectors: UnitVectors
    faults: dict[int, tuple[str, str]]
    """Stage and reason, by place, of rows that cannot be taken."""
    kept: list[int]
    """The places of all others."""
    num_bytes: int
    """Of the vectors, in their file."""


class CheckedFile(NamedTuple):
    """A file of vectors that has been opened, as many as it has rows."""

    num_rows: int
    """Taken or not."""
    blocks: Iterator[CheckedBlock]


def open_checked(pair: Pair, dim: int, at_once: int = AT_ONCE) -> CheckedFile:
    """Open a file of vectors [N, dim] and the file of its rows.

    Args:
        pair: The two.
        dim: Of the model.
        at_once: Most rows of a block.

    Raises:
        ShardError: One of them cannot be read, or they do not belong together; also raised by the blocks.
    """
    vectors = open_vectors(Path(pair.shard.url), dim)
    rows = open_rows(pair.rows, at_once)
    if rows.num_rows != len(vectors):
        raise ShardError(
            f"{pair.shard.url} has {len(vectors):,} vectors, but {pair.rows} {rows.num_rows:,} rows;"
            " find out which belong together"
        )
    return CheckedFile(len(vectors), _blocks(vectors, _in_full(pair, rows)))


def _in_full(pair: Pair, rows: RowFile) -> Iterator[Rows]:
    """The blocks of a file, as long as they are what it said when it was opened."""
    count = 0
    for block in rows.blocks:
        count += len(block.keys)
        if count > rows.num_rows:
            break
        yield block
    if count != rows.num_rows:
        raise ShardError(f"{pair.rows} had {rows.num_rows:,} rows, and then others; run again when nobody writes it")


def _blocks(vectors: np.ndarray[Any, Any], blocks: Iterator[Rows]) -> Iterator[CheckedBlock]:
    seen: set[str] = set()
    first = 0
    for rows in blocks:
        part = vectors[first : first + len(rows.keys)]
        unit = to_unit(part)
        faults = _faults(rows, unit, seen)
        kept = [at for at in range(len(rows.keys)) if at not in faults]
        yield CheckedBlock(first, rows, unit, faults, kept, part.nbytes)
        first += len(rows.keys)


def _faults(rows: Rows, vectors: UnitVectors, seen: set[str]) -> dict[int, tuple[str, str]]:
    """Stage and reason of the rows that cannot be taken, in order."""
    faults: dict[int, tuple[str, str]] = {}
    for at, key in enumerate(rows.keys):
        remembered = remembered_key(key)
        fault = rows.faults.get(at)
        if key and remembered in seen:
            faults[at] = ("tar", f"key {key!r} came before in this file")
        elif fault is not None:
            faults[at] = fault
        elif at in vectors.faults:
            faults[at] = ("encode", vectors.faults[at])
        seen.add(remembered)
    return faults
