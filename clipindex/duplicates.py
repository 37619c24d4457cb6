"""Near-duplicates: rows whose cosine is above a threshold, joined into groups, with the one of each to keep."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from clipindex.atomic import remove_stale_temporaries, write_json
from clipindex.errors import IndexingError, UsageError
from clipindex.index.files import OpenIndex, open_index
from clipindex.index.lists import Mask
from clipindex.index.plan import default_memory_bytes
from clipindex.index.search import find, find_within
from clipindex.nearest import (
    check_model,
    compare_shards,
    count_within,
    ids_of,
    locate,
    unit_cosines,
    vectors_at,
)
from clipindex.recall import draw_rows, read_drawn
from clipindex.store import AtomicParquet, VectorReader, read_dataset, read_embeddings, read_rows, shard_states
from clipindex.types import Float32Array, IntArray

NUM_CHECKED = 1000
"""Rows whose duplicates are counted exactly; half as many more are drawn to find the effort by."""
AT_ONCE = 1024
"""Rows searched together, at most."""
FIRST_AT_ONCE = 32
MOST_PAIRS = 1 << 24
"""Pairs of them that are expected: a copy of an image that comes a million times has a million."""
EXACT_MARGIN = 1e-3
"""Around the threshold, within which an index of float16 vectors is not taken at its word."""

ERRORS_COVERED = 0.999
"""Of the scores of an index that approximates, the share that its margin makes up for."""
PAIRS_AT_ONCE = 1 << 16

_AGAIN = "run clipindex index, then this again"
_COLUMNS = ("key", "width", "height")
_SCHEMA = pa.schema(
    [
        ("group", pa.int64()),
        ("keep", pa.bool_()),
        ("key", pa.string()),
        ("cosine", pa.float32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("shard", pa.string()),
        ("row", pa.int64()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DuplicateSummary:
    """What was found."""

    out: str
    """Where groups.parquet lies."""
    threshold: float
    rows: int
    groups: int
    duplicates: int
    """Rows that could go: those in groups less one of each."""
    largest: int
    """Rows of the largest group."""
    recall: float
    """Share of the true pairs that the index finds, averaged over rows that have any; by exact search of a sample."""
    checked: int
    """Rows of that sample that have any."""
    probes: int
    """Lists looked at for each row."""
    seconds: float


def find_duplicates(
    folder: str | Path,
    *,
    threshold: float = 0.95,
    target_recall: float = 0.99,
    out: str | Path | None = None,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> DuplicateSummary:
    """Group the rows of a directory that are nearly the same, by the directory's index.

    Rows are joined where their cosine is at least the threshold, and what is joined to one is joined to the others
    (single linkage): a group may hold rows that are less alike than that, by a chain of others. The largest image of a
    group is the one to keep, and of those the first.

    Args:
        folder: The embedding directory, with an index that knows all of its rows.
        threshold: Cosine.
        target_recall: Share of the true pairs to find.
        out: Folder of summary.json and of groups.parquet, which has a row for each row of a group, the one to keep
            first: group, keep, key, cosine to the one to keep, width, height, shard, row. `folder`/duplicates by
            default.
        seed: Of the sample that is compared with exact search.
        on_progress: Called with what is being done, how much of it is done, and of how much.

    Raises:
        IndexingError: The directory has no index, or one that does not know all rows, or that misses the target.
        StoreError: A file is damaged.
    """
    if not 0 < threshold < 1:
        raise UsageError(f"threshold {threshold}: give a cosine between 0 and 1")
    folder = Path(folder)
    target = Path(out) if out is not None else folder / "duplicates"
    started = time.perf_counter()
    search = _Search(folder, _up_to_date(folder), threshold)
    recall, checked = _tune(search, target_recall, seed, on_progress)
    if recall < target_recall:
        raise IndexingError(
            f"{folder / 'index'} finds {recall:.4f} of the pairs, below {target_recall}; an index of kind ivf finds all"
        )
    members, groups = _groups(_joined(search, on_progress))
    on_progress("write", 0, 0)
    table = _table(search, members, groups)
    if not _is_up_to_date(folder, search.opened):
        raise IndexingError(f"shards of {folder} were replaced meanwhile; {_AGAIN}")
    remove_stale_temporaries(target)
    with AtomicParquet(target / "groups.parquet", _SCHEMA, compression="zstd") as parquet:
        parquet.write(table)
    sizes = np.bincount(groups)
    summary = DuplicateSummary(
        out=str(target),
        threshold=threshold,
        rows=search.opened.record.rows,
        groups=len(sizes),
        duplicates=len(members) - len(sizes),
        largest=int(sizes.max(initial=0)),
        recall=recall,
        checked=checked,
        probes=search.probes,
        seconds=round(time.perf_counter() - started, 3),
    )
    write_json(target / "summary.json", asdict(summary))
    return summary


class _Search:
    """Pairs of rows above a threshold, through an index."""

    def __init__(self, folder: Path, opened: OpenIndex, threshold: float) -> None:
        self.folder = folder
        self.opened = opened
        self.threshold = threshold
        self.reader = VectorReader(folder)
        self.names = [shard.name for shard in opened.shards]
        self.probes = max(opened.record.effort.probes, 1)
        self.margin = EXACT_MARGIN
        self._at_once = FIRST_AT_ONCE
        self._allowed: Mask | None = ids_of(opened.shards, opened.record.next_id)

    def pairs(self, vectors: np.ndarray[Any, Any]) -> tuple[IntArray, IntArray]:
        """Which of some vectors [n, D], and the id of a row at the threshold or above; each vector's own among them."""
        wide = vectors.astype(np.float32)
        least = self.threshold - self.margin
        query, ids, scores = find_within(self.opened.faiss, wide, least, self.probes, self._allowed)
        unsure = np.flatnonzero(scores < self.threshold + self.margin)
        kept = np.ones(len(ids), np.bool_)
        for first in range(0, len(unsure), PAIRS_AT_ONCE):
            some = unsure[first : first + PAIRS_AT_ONCE]
            kept[some] = self._cosines(wide, query[some], ids[some]) >= self.threshold
        return query[kept], ids[kept]

    def blocks(self, vectors: np.ndarray[Any, Any]) -> Iterator[tuple[slice, IntArray, IntArray]]:
        """Pairs of some vectors at a time, and which those are: fewer where each has many."""
        first = 0
        while first < len(vectors):
            some = slice(first, min(first + self._at_once, len(vectors)))
            query, ids = self.pairs(vectors[some])
            yield some, query, ids
            first = some.stop
            of_each = max(len(ids) // (some.stop - some.start), 1)
            self._at_once = min(2 * self._at_once, AT_ONCE, max(1, MOST_PAIRS // of_each))

    def errors(self, vectors: Float32Array) -> Float32Array:
        """By how much scores of near rows are below their cosines."""
        ids, scores = find(self.opened.faiss, vectors, 10, self.probes, self._allowed)
        query, place = np.nonzero(ids >= 0)
        return self._cosines(vectors, query, ids[query, place]) - scores[query, place]

    def _cosines(self, vectors: Float32Array, query: IntArray, ids: IntArray) -> Float32Array:
        asked = torch.from_numpy(vectors)[torch.from_numpy(query)]
        return unit_cosines(asked, vectors_at(self.reader, self.names, *locate(self.opened, ids)))


def _up_to_date(folder: Path) -> OpenIndex:
    read_dataset(folder)
    opened = open_index(folder, default_memory_bytes())
    if opened is None:
        raise IndexingError(f"{folder} has no index; build it with clipindex index")
    check_model(folder, opened)
    if not _is_up_to_date(folder, opened):
        raise IndexingError(f"the index of {folder} is not that of its shards any more; run clipindex index")
    return opened


def _is_up_to_date(folder: Path, opened: OpenIndex) -> bool:
    known, new = compare_shards(shard_states(folder), opened.shards)
    return not new and len(known) == len(opened.shards)


def _tune(search: _Search, target: float, seed: int, on_progress: Callable[[str, int, int], None]) -> tuple[float, int]:
    """Find how much to look at; the share of the pairs that is found then, and of how many rows."""
    sizes = {shard.name: shard.rows for shard in search.opened.shards}
    sample = read_drawn(search.folder, draw_rows(sizes, NUM_CHECKED * 3 // 2, seed)).astype(np.float32)
    truth = count_within(
        search.folder, sample, search.threshold, search.names,
        lambda done: on_progress("search exactly", done, search.opened.record.rows),
    )  # fmt: skip
    if not search.opened.record.plan.is_lossless:
        search.margin = max(EXACT_MARGIN, float(np.quantile(search.errors(sample), ERRORS_COVERED)))
    has_any = np.flatnonzero(truth > 1)

    def recall(chosen: IntArray) -> float:
        found = np.zeros(len(chosen), np.int64)
        for some, query, _ in search.blocks(sample[chosen]):
            found[some] = np.bincount(query, minlength=some.stop - some.start) - 1  # without itself
        return float(np.clip(found / np.maximum(truth[chosen] - 1, 1), 0, 1).mean()) if len(chosen) else 1.0

    tuning, check = (has_any, has_any) if len(has_any) < 3 else (has_any[::3], np.delete(has_any, slice(None, None, 3)))
    most = search.opened.record.plan.num_lists or search.probes
    search.probes = 1 if search.opened.record.plan.num_lists else search.probes
    while search.probes < most and min(recall(tuning), recall(check)) < target:
        search.probes = min(2 * search.probes, most)
    return recall(check), len(check)


def _joined(search: _Search, on_progress: Callable[[str, int, int], None]) -> IntArray:
    """For each id the id of its group's first row, its own where it is alone."""
    first = _first_of_their_kind(search)
    parents = np.arange(search.opened.record.next_id, dtype=np.int64)
    done = 0
    for ids, batch in _rows(search):
        asked = np.flatnonzero(first[ids])
        for some, query, found in search.blocks(batch[asked]):
            _join(parents, ids[asked[some]][query], found)
        done += len(ids)
        on_progress("search", done, search.opened.record.rows)
    return _roots(parents, parents)


def _rows(search: _Search) -> Iterator[tuple[IntArray, np.ndarray[Any, Any]]]:
    """Ids [n] and vectors [n, D] of all rows, in blocks."""
    begins = {shard.name: shard.first_id for shard in search.opened.shards}
    sizes = {shard.name: shard.rows for shard in search.opened.shards}
    for batch in read_embeddings(search.folder, names=search.names):
        if batch.shard.rows != sizes[batch.shard.name]:
            raise IndexingError(f"shard {batch.shard.name} was replaced while it was read; {_AGAIN}")
        begin = begins[batch.shard.name] + batch.first_row
        yield np.arange(begin, begin + len(batch.embedding), dtype=np.int64), batch.embedding


def _first_of_their_kind(search: _Search) -> Mask:
    """Ids [next_id] of rows of which no copy came before, bit for bit: only these have to be searched for.

    The others are found by their first copy. Without this, a million copies of one image would each find a million.
    """
    hashes = np.zeros(search.opened.record.next_id, np.uint64)
    rng = np.random.default_rng(0)
    factors = rng.integers(0, 2**63, search.reader.dim, np.uint64) * np.uint64(2) + np.uint64(1)
    for ids, vectors in _rows(search):
        mixed = vectors.view(f"u{vectors.itemsize}") * factors
        hashes[ids] = (mixed ^ (mixed >> np.uint64(29))).sum(axis=1)
    mask = np.zeros(len(hashes), np.bool_)
    mask[np.unique(hashes, return_index=True)[1]] = True
    return mask


def _join(parents: IntArray, ones: IntArray, others: IntArray) -> None:
    """Union the groups of pairs: of two roots the larger points to the smaller, until no pair has two."""
    while len(ones):
        left, right = _roots(parents, ones), _roots(parents, others)
        apart = left != right
        ones, others = left[apart], right[apart]
        np.minimum.at(parents, np.maximum(ones, others), np.minimum(ones, others))


def _roots(parents: IntArray, ids: IntArray) -> IntArray:
    while True:
        above = parents[ids]
        if (above == ids).all():
            return above
        ids = above


def _groups(roots: IntArray) -> tuple[IntArray, IntArray]:
    """Ids [n] that are not alone, by group, and the number [n] of each one's group, in order of their first rows."""
    members = np.flatnonzero(np.bincount(roots, minlength=len(roots))[roots] > 1)
    members = members[np.argsort(roots[members], kind="stable")]
    return members, np.unique(roots[members], return_inverse=True)[1].astype(np.int64)


def _table(search: _Search, members: IntArray, groups: IntArray) -> pa.Table:
    shards, rows = locate(search.opened, members)
    order = np.lexsort((rows, shards))
    tables = [
        read_rows(search.folder, search.names[shards[at[0]]], rows[at], _COLUMNS)
        for at in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1)
        if len(at)
    ]
    if not tables:
        return _SCHEMA.empty_table()
    columns = pa.concat_tables(tables).take(pa.array(np.argsort(order)))
    area = columns["width"].to_numpy().astype(np.int64) * columns["height"].to_numpy()
    ranked = np.lexsort((members, -area, groups))
    kept = ranked[np.searchsorted(groups[ranked], groups)]  # of each row's group the first of the ranked
    found = {
        "group": groups,
        "keep": kept == np.arange(len(kept)),
        "cosine": _cosines_to(search, members, kept),
        "shard": pa.array(search.names, pa.string()).take(pa.array(shards)),
        "row": rows,
        **{name: columns[name] for name in _COLUMNS},
    }
    return pa.table({name: found[name] for name in _SCHEMA.names}, schema=_SCHEMA).take(pa.array(ranked))


def _cosines_to(search: _Search, members: IntArray, kept: IntArray) -> Float32Array:
    """Exact cosines of rows and those that are kept of their groups."""
    parts = []
    for first in range(0, len(members), PAIRS_AT_ONCE):
        some = slice(first, first + PAIRS_AT_ONCE)
        vectors = vectors_at(search.reader, search.names, *locate(search.opened, members[kept[some]]))
        others = vectors_at(search.reader, search.names, *locate(search.opened, members[some]))
        parts.append(unit_cosines(vectors, others))
    return np.concatenate(parts)
