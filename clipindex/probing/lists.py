"""Rows with any number of classes: what a directory's lists of labels say, as a loss and an evaluation need it.

Rows are taken as others are, with the number of a row among those with a list in the place of its class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from clipindex.errors import ClassesError
from clipindex.logistic import ClassLists
from clipindex.multi_label import unpack_labels
from clipindex.probing.rows import LABEL_COLUMN, Ids, Part
from clipindex.probing.stored import read_stored
from clipindex.store import LABELS_TYPE, read_columns

LISTS_COLUMN = "labels"


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedLabels:
    """The lists of a directory, shard by shard in name order."""

    folder: Path
    shards: Mapping[str, str]
    """Which, and in what state they were read."""
    is_labelled: npt.NDArray[np.bool_]
    """[rows]; a list may be empty."""
    rows: Ids
    """Of each entry of all lists, its row among those with one."""
    labels: Ids
    """Of each entry."""

    @property
    def left_out(self) -> int:
        """Rows without a list."""
        return int((~self.is_labelled).sum())


def label_kinds(folders: Sequence[Path]) -> set[str]:
    """Which of the columns `label` and `labels` say anything of the rows of directories; a `label` ends the search.

    Raises:
        StoreError: A file is damaged.
    """
    kinds = set()
    for folder in folders:
        for _, columns in read_columns(folder, (LABEL_COLUMN, LISTS_COLUMN)):
            kinds |= {name for name, column in columns.items() if column.null_count < len(column)}
            if LABEL_COLUMN in kinds:
                return kinds
    return kinds


def read_all_lists(folder: str | Path) -> ListedLabels:
    """The lists of labels of a directory.

    Raises:
        ClassesError: No row has one.
        StoreError: A file is damaged.
    """
    folder = Path(folder)
    stored = read_stored(folder, (LISTS_COLUMN,))
    large = pa.large_list(LABELS_TYPE.value_field)  # entries of all rows may be more than 32 bits count
    found = unpack_labels(stored.columns[LISTS_COLUMN].cast(large).combine_chunks())
    listed = ListedLabels(
        folder=folder,
        shards=stored.states,
        is_labelled=found.is_labelled,
        rows=(np.cumsum(found.is_labelled) - 1)[found.rows],
        labels=found.classes,
    )
    if not listed.is_labelled.any():
        raise ClassesError(
            f"{folder}: none of {len(listed.is_labelled):,} rows has a list of labels; such lists come from .npy"
            " multi-hots or JSON lists in the tars"
        )
    return listed


def find_listed_classes(labels: ListedLabels) -> tuple[int, ...]:
    """The labels that occur, ascending.

    Raises:
        ClassesError: There are none.
    """
    values = np.unique(labels.labels)
    if not len(values):
        raise ClassesError(f"{labels.folder}: all lists of labels are empty; a probe learns from some that are not")
    return tuple(values.tolist())


def take_lists(labels: ListedLabels, classes: Sequence[int]) -> tuple[Part, ClassLists, dict[int, int]]:
    """All rows with lists, these with class ids, and how many rows have which label that is none of `classes`."""
    known = np.asarray(classes, np.int64)
    is_known = np.isin(labels.labels, known)
    values, counts = np.unique(labels.labels[~is_known], return_counts=True)
    numbers = np.where(labels.is_labelled, np.cumsum(labels.is_labelled) - 1, -1).astype(np.int64)
    lengths = np.bincount(labels.rows[is_known], minlength=int(labels.is_labelled.sum()))
    lists = ClassLists(
        torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)),
        torch.from_numpy(np.searchsorted(known, labels.labels[is_known])),
    )
    part = Part(folder=labels.folder, shards=labels.shards, class_ids=numbers)
    return part, lists, dict(zip(values.tolist(), counts.tolist(), strict=True))


def split_rows(num_rows: int, fraction: float, seed: int) -> tuple[Ids, Ids]:
    """Row numbers that stay and that are held out: a fraction of all, drawn whatever their classes are.

    Raises:
        ClassesError: There are too few rows to hold one out.
    """
    out = min(round(num_rows * fraction), num_rows - 1)
    if out < 1:
        raise ClassesError(f"{num_rows:,} rows are too few to hold {fraction:g} of them out")
    order = np.random.default_rng(seed).permutation(num_rows)
    return np.sort(order[out:]), np.sort(order[:out])
