"""The rows that several embedding directories have in common: joined by key, whatever the order they are stored in.

Keys and labels of all directories are in memory meanwhile, some tens of bytes a row; embeddings are not read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clipindex.errors import ClassesError, StoreError
from clipindex.probing.rows import Ids, Labels, Part
from clipindex.probing.stored import read_stored

NUM_NAMED = 5
"""Keys that are named of those that are not common."""
BY_KEY = "key"
BY_SHARD = "shard and key"
"""Where keys come more than once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """What one directory has, beside what all have."""

    folder: str
    rows: int
    beyond: int
    """Its rows that not every directory has: they are left out."""
    beyond_keys: tuple[str, ...]
    """The first few, in the order of keys."""
    lacking: int
    """Rows of other directories that it lacks: they are left out."""
    lacking_keys: tuple[str, ...]
    labels_lacking: int
    """Its rows in common without a label of their own, which take it from another directory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """Labelled rows that all of several directories have, in the order of their keys."""

    by: str
    """`BY_KEY` or `BY_SHARD`."""
    labels: Labels
    """Of these rows, in that order; `folder` is the first directory."""
    rows: tuple[Ids, ...]
    """For each directory, the number of each of these rows in it."""
    shards: tuple[Mapping[str, str], ...]
    """Of each directory, and in what state they were read."""
    sides: tuple[Side, ...]
    unlabelled: int
    """Rows that all directories have and none has a label of: they are left out."""

    def part(self, at: int, class_ids: Ids) -> tuple[Part, Ids]:
        """These rows as those of the directory with number `at`.

        Args:
            at: Which directory.
            class_ids: Of these rows [n].

        Returns:
            The part, and for each of these rows its number [n] among the part's.
        """
        side, rows = self.sides[at], self.rows[at]
        all_ids = np.full(side.rows, -1, np.int64)
        all_ids[rows] = class_ids
        places = np.empty(len(rows), np.int64)
        places[np.argsort(rows)] = np.arange(len(rows))
        return Part(folder=Path(side.folder), shards=self.shards[at], class_ids=all_ids), places


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stored:
    """Keys and labels of one directory."""

    folder: Path
    shards: Mapping[str, str]
    """Which, and in what state they were read."""
    sizes: tuple[int, ...]
    keys: pa.ChunkedArray
    labels: Ids
    """0 where there is none."""
    is_labelled: npt.NDArray[np.bool_]

    def names(self, by: str) -> pa.ChunkedArray:
        """What tells each row from the others."""
        if by == BY_KEY:
            return self.keys
        shards = pa.array(list(self.shards), pa.large_string()).take(np.repeat(np.arange(len(self.shards)), self.sizes))
        joined = pc.binary_join_element_wise(shards, self.keys.combine_chunks(), pa.scalar("/", pa.large_string()))
        return pa.chunked_array([joined])

    def shard_of(self, row: int) -> str:
        return list(self.shards)[int(np.searchsorted(np.cumsum(self.sizes), row, "right"))]


def join(folders: Sequence[Path]) -> Joined:
    """Find the rows that all directories have, and their labels.

    A row is known by its key where no directory has a key twice, else by its shard's name and its key. A label belongs
    to the image: where one directory has none, that of another counts.

    Raises:
        StoreError: A file is damaged, a directory has a key twice in one shard, or there is no row that all have.
        ClassesError: No common row has a label, or directories disagree about one.
    """
    stored = [_read(folder) for folder in folders]
    by, twice = BY_KEY, ""
    found = _number(stored, by)
    if isinstance(found, str):
        by, twice = BY_SHARD, f" (by shard and key, since {found})"
        found = _number(stored, by)
        if isinstance(found, str):
            raise StoreError(f"rows cannot be joined: {found}; embed that shard again")
    names, rows = found
    is_common = np.all(rows >= 0, axis=0)
    if not is_common.any():
        firsts = "; ".join(
            f"the first of {one.folder} is {names[int(np.argmax(own >= 0))].as_py()!r}"
            for one, own in zip(stored, rows, strict=True)
        )
        raise StoreError(f"no row is in all of {len(stored)} directories{twice}: {firsts}; embed the same images")
    labels, has_label = _agree(stored, names, rows, is_common)
    chosen = np.flatnonzero(is_common & has_label)
    if not len(chosen):
        raise ClassesError(
            f"none of the {is_common.sum():,} rows that all of {', '.join(str(one.folder) for one in stored)} have"
            " has a label; a probe learns from labels, which come from the .cls members of the tars"
        )
    return Joined(
        by=by,
        labels=Labels(
            folder=stored[0].folder, shards={}, labels=labels[chosen], is_labelled=np.ones(len(chosen), np.bool_)
        ),
        rows=tuple(own[chosen] for own in rows),
        shards=tuple(one.shards for one in stored),
        sides=tuple(_side(one, names, own, is_common, has_label) for one, own in zip(stored, rows, strict=True)),
        unlabelled=int(is_common.sum()) - len(chosen),
    )


def _read(folder: Path) -> _Stored:
    stored = read_stored(folder, ("key", "label"))
    if not sum(stored.sizes):
        raise StoreError(f"{folder} has no rows: nothing is published in it; embed first")
    labels, is_labelled = stored.numbers("label")
    return _Stored(
        folder=folder,
        shards=stored.states,
        sizes=stored.sizes,
        keys=stored.columns["key"].cast(pa.large_string()),
        labels=labels,
        is_labelled=is_labelled,
    )


def _number(stored: Sequence[_Stored], by: str) -> tuple[pa.Array, Ids] | str:
    """All names there are [U], sorted, and the row [directories, U] of each in each directory, -1 where it has none.

    Where a directory has a name twice, what to say of that.
    """
    each = [one.names(by) for one in stored]
    names = pa.chunked_array([chunk for one in each for chunk in one.chunks], pa.large_string()).unique()
    names = names.take(pc.sort_indices(names))
    rows = np.full((len(stored), len(names)), -1, np.int64)
    for one, own, row in zip(stored, each, rows, strict=True):
        codes = pc.index_in(own, value_set=names).to_numpy().astype(np.int64)
        row[codes] = np.arange(len(codes))
        wrong = np.flatnonzero(row[codes] != np.arange(len(codes)))
        if len(wrong):
            first, second = int(wrong[0]), int(row[codes[wrong[0]]])
            shards = f"shards {one.shard_of(first)} and {one.shard_of(second)}"
            where = shards if one.shard_of(first) != one.shard_of(second) else f"shard {one.shard_of(first)} twice"
            return f"{one.folder} has key {one.keys[first].as_py()!r} in {where}"
    return names, rows


def _agree(
    stored: Sequence[_Stored], names: pa.Array, rows: Ids, is_common: npt.NDArray[np.bool_]
) -> tuple[Ids, npt.NDArray[np.bool_]]:
    """The label of each name [U], and whether any directory knows one."""
    labels = np.zeros(len(names), np.int64)
    said_by = np.full(len(names), -1, np.int64)
    for at, (one, own) in enumerate(zip(stored, rows, strict=True)):
        says = (own >= 0) & one.is_labelled[own]
        differs = np.flatnonzero(is_common & says & (said_by >= 0) & (labels != one.labels[own]))
        if len(differs):
            first = int(differs[0])
            more = f" (and {len(differs) - 1:,} more keys)" if len(differs) > 1 else ""
            raise ClassesError(
                f"key {names[first].as_py()!r} has label {labels[first]} in {stored[said_by[first]].folder} and"
                f" {one.labels[own[first]]} in {one.folder}{more}: the directories are not of one labelling"
            )
        new = says & (said_by < 0)
        labels[new] = one.labels[own[new]]
        said_by[new] = at
    return labels, said_by >= 0


def _side(
    one: _Stored, names: pa.Array, own: Ids, is_common: npt.NDArray[np.bool_], has_label: npt.NDArray[np.bool_]
) -> Side:
    has_own_label = one.is_labelled[own[is_common & has_label]]
    beyond = np.flatnonzero((own >= 0) & ~is_common)
    lacking = np.flatnonzero(own < 0)
    return Side(
        folder=str(one.folder),
        rows=len(one.labels),
        beyond=len(beyond),
        beyond_keys=tuple(names.take(beyond[:NUM_NAMED]).to_pylist()),
        lacking=len(lacking),
        lacking_keys=tuple(names.take(lacking[:NUM_NAMED]).to_pylist()),
        labels_lacking=int((~has_own_label).sum()),
    )
