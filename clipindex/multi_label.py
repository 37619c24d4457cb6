"""Rows with any number of classes: their lists out of the store, and how well scores rank them."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clipindex.average_precision import BLOCK_SCORES, AveragePrecision, ScoreBlock, measure_average_precision
from clipindex.errors import ClassesError
from clipindex.products import widened
from clipindex.store import LABELS_TYPE, read_columns, read_embeddings
from clipindex.types import Float32Array, IntArray

log = logging.getLogger(__name__)

BOX_NUMBERS = 4
"""A list of so many may be of anything; where all are, they are likelier to be boxes than classes."""


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


def with_single_labels(label: pa.Array, labels: pa.ListArray) -> pa.ListArray:
    """The column `labels` of some rows, where one that has a single label in its place has the list of that label.

    Negative labels are no classes of a list: such rows stay without one.
    """
    numbers = label.fill_null(-1).to_numpy()
    is_single = np.asarray(labels.is_null()).astype(np.bool_) & (numbers >= 0)
    ends = np.concatenate([[0], np.cumsum(is_single)]).astype(np.int32)
    values = pa.array(numbers[is_single], pa.int32())
    singles = pa.ListArray.from_arrays(pa.array(ends), values, type=LABELS_TYPE, mask=pa.array(~is_single))
    return pc.coalesce(labels, singles)


def check_labels(folder: Path, shards: Sequence[str] | None, num_classes: int) -> tuple[int, str | None]:
    """Refuse single labels beyond the classes; warn of lists with such, since a list may be of something else.

    Returns:
        How many rows are to be ranked, which are those with lists and, where there are any, those with a single label;
        and why they cannot be, if they cannot.

    Raises:
        ClassesError: A single label is beyond; the first one is named.
        StoreError: A file is damaged.
    """
    listed = single = 0
    lengths: set[int] = set()
    fault: str | None = None
    for name, columns in read_columns(folder, ("key", "label", "labels"), shards):
        values = columns["label"].fill_null(0).to_numpy()
        beyond = _first_beyond(name, columns["key"], np.arange(len(values)), values, num_classes)
        if beyond is not None:
            raise ClassesError(f"{beyond}; give the class file that the labels count in")
        if columns["labels"].null_count < len(values):
            lists = unpack_labels(columns["labels"])
            fault = fault or _first_beyond(name, columns["key"], lists.rows, lists.classes, num_classes)
            listed += int(lists.is_labelled.sum())
            lengths.update(pc.list_value_length(columns["labels"]).drop_null().unique().to_pylist())
        single += int(pc.sum(pc.and_(columns["label"].is_valid(), columns["labels"].is_null())).as_py() or 0)
    if listed > 1 and lengths == {BOX_NUMBERS}:
        log.warning("all %s lists of labels have four numbers; boxes in .json belong into an object", f"{listed:,}")
    if fault is not None:
        log.warning("mAP is left out, since not all lists are of these classes: %s", fault)
    return listed + single if listed else 0, fault


def class_average_precision(
    folder: Path,
    vectors: Float32Array,
    shards: Sequence[str],
    on_rows: Callable[[int], None] = lambda rows: None,
) -> AveragePrecision:
    """How well cosines to class vectors rank the rows of a directory that have lists of classes, or a single one.

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
    """Embeddings of the rows that have lists or a single label, so many at most at once."""
    for batch in read_embeddings(folder, ("label", "labels"), shards):
        column = with_single_labels(batch.columns["label"], batch.columns["labels"])
        kept = np.flatnonzero(np.asarray(column.is_valid()))
        for first in range(0, len(kept), at_once):
            rows = kept[first : first + at_once]
            yield batch.embedding[rows], unpack_labels(column.take(pa.array(rows)))


def _first_beyond(
    shard: str, keys: pa.StringArray, rows: np.ndarray[Any, Any], values: np.ndarray[Any, Any], num_classes: int
) -> str | None:
    beyond = np.flatnonzero((values < 0) | (values >= num_classes))
    if not len(beyond):
        return None
    return (
        f"label {values[beyond[0]]} of key {keys[int(rows[beyond[0]])].as_py()!r} (shard {shard}) is beyond the"
        f" {num_classes} classes (ids 0 to {num_classes - 1})"
    )
