"""Rows with any number of classes: their lists out of the store, and how well scores rank them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clipindex.average_precision import BLOCK_SCORES, AveragePrecision, ScoreBlock, measure_average_precision
from clipindex.index.exact import widened
from clipindex.store import read_embeddings
from clipindex.types import Float32Array, IntArray


class LabelLists(NamedTuple):
    """The lists of n consecutive rows."""

    is_labelled: npt.NDArray[np.bool_]
    """[n]; a list may be empty."""
    rows: IntArray
    """Of each entry of all lists, its row."""
    classes: IntArray
    """Of each entry, its class number."""


def unpack_labels(column: pa.ListArray) -> LabelLists:
    """The column `labels` of some rows."""
    lengths = pc.list_value_length(column).fill_null(0).to_numpy()
    return LabelLists(
        is_labelled=np.asarray(column.is_valid()).astype(np.bool_),
        rows=np.repeat(np.arange(len(lengths)), lengths),
        classes=column.flatten().to_numpy().astype(np.int64),
    )


def class_average_precision(
    folder: Path,
    vectors: Float32Array,
    shards: Sequence[str],
    on_rows: Callable[[int], None] = lambda rows: None,
) -> AveragePrecision:
    """How well cosines to class vectors rank the rows of a directory that have lists of classes.

    Args:
        folder: The embedding directory.
        vectors: Unit vectors [C, D] of the classes, among which all labels are.
        shards: Names of the shards to read.
        on_rows: Called with the number of rows that were looked at, twice each.

    Raises:
        StoreError: A file is damaged.
    """
    at_once = max(1, BLOCK_SCORES // len(vectors))

    def score(rows: tuple[np.ndarray[Any, Any], LabelLists]) -> ScoreBlock:
        embedding, labels = rows
        return ScoreBlock(np.matmul(vectors, widened(embedding).T), labels.classes, labels.rows)

    return measure_average_precision(len(vectors), lambda: _labelled(folder, shards, at_once), score, on_rows)


def _labelled(folder: Path, shards: Sequence[str], at_once: int) -> Iterator[tuple[np.ndarray[Any, Any], LabelLists]]:
    """Embeddings of the rows that have lists, so many at most at once."""
    for batch in read_embeddings(folder, ("labels",), shards):
        column = batch.columns["labels"]
        kept = np.flatnonzero(np.asarray(column.is_valid()))
        for first in range(0, len(kept), at_once):
            rows = kept[first : first + at_once]
            yield batch.embedding[rows], unpack_labels(column.take(pa.array(rows)))
