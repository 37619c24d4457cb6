"""The rows that an index leads to, together with those that it does not know yet."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from clipindex.errors import StoreError
from clipindex.index.files import REBUILD, Effort, IndexedShard, OpenIndex, open_index
from clipindex.index.lists import Mask
from clipindex.index.plan import default_memory_bytes
from clipindex.index.search import find
from clipindex.nearest.found import Filter, Nearest
from clipindex.nearest.ids import check_model, compare_shards, ids_of, locate
from clipindex.nearest.scan import scan
from clipindex.nearest.vectors import row_cosines
from clipindex.store import VectorReader, read_columns, shard_states
from clipindex.types import Float32Array, IntArray

log = logging.getLogger(__name__)

RANKED_AT_ONCE = 1 << 16
"""Rows whose embeddings are read to rank candidates: 128 MiB of 512 float32."""
FEW = 0.05
"""Share of the rows up to which those that pass a filter are looked at one by one: an index would have to look at many
times as many to find them."""
FILTER_SLACK = 2
"""Times more to look at, beside what a filter's rarity asks for: what passes may lie apart from the rest."""
MEASURED_K = 100
"""Up to which an index's recall is measured; for more it looks at more in proportion."""
CHECKED_HITS = 256
"""Of a search whose scores are cosines already, about as many are compared with those of the embeddings."""
SCORE_TOLERANCE = 4e-3
"""Between an index of float16 vectors and the embeddings it was made of: sums in float32, in another order."""


def nearest(
    folder: Path,
    queries: Float32Array,
    k: int,
    *,
    where: Filter,
    exact: bool,
    on_progress: Callable[[int], None] = lambda num_rows: None,
) -> Nearest:
    """The rows with the highest cosine to each query: through the directory's index where it has one.

    Rows that the index does not know yet, or that are others by now, are looked at one by one, and that is logged.

    Args:
        folder: The embedding directory.
        queries: Unit vectors [Q, D].
        k: Rows for each.
        where: Which rows may be found.
        exact: Look at all rows, whether there is an index or not.
        on_progress: Called with the number of rows that were looked at one by one.

    Raises:
        StoreError: A file is damaged, or the index does not belong to the embeddings.
        FingerprintError: It is of another model's.
    """
    opened = None if exact else open_index(folder, default_memory_bytes())
    if opened is None:
        return scan(folder, queries, k, where=where, on_progress=on_progress)
    check_model(folder, opened)
    known, new = compare_shards(shard_states(folder), opened.shards)
    allowed = _allowed(folder, opened, known, where)
    num_allowed = opened.record.next_id if allowed is None else int(allowed.sum())
    if where.columns and num_allowed <= FEW * opened.record.rows:
        return scan(folder, queries, k, where=where, on_progress=on_progress)
    rarer = FILTER_SLACK * opened.record.rows / max(num_allowed, 1) if where.columns else 1
    effort = widened(opened, opened.record.effort, max(rarer, k / MEASURED_K, 1))
    found = through_index(VectorReader(folder), opened, queries, k, effort, allowed)
    if new:
        log.info("%d shards are not in the index and are searched row by row; clipindex index adds them", len(new))
        found = _merged(found, scan(folder, queries, k, where=where, names=new, on_progress=on_progress))
    return found


def through_index(
    reader: VectorReader,
    opened: OpenIndex,
    queries: Float32Array,
    k: int,
    effort: Effort,
    allowed: Mask | None = None,
) -> Nearest:
    """The nearest rows that an index leads to; where its scores only approximate cosines, ranked by the embeddings.

    Args:
        reader: Of the embedding directory.
        opened: Its index.
        queries: Unit vectors [Q, D].
        k: Rows for each.
        effort: How much to look at.
        allowed: Ids [next_id] that may be found; those of its shards by default.

    Raises:
        StoreError: The index does not belong to the embeddings.
    """
    allowed = ids_of(opened.shards, opened.record.next_id) if allowed is None else allowed
    names = [shard.name for shard in opened.shards]
    plan = opened.record.plan
    most = opened.record.rows if allowed is None else int(allowed.sum())
    wanted = min(max(k, min(k * effort.candidates, RANKED_AT_ONCE)), max(most, 1))
    step = max(1, RANKED_AT_ONCE // wanted)
    blocks = []
    for first in range(0, max(len(queries), 1), step):
        asked = queries[first : first + step]
        ids, scores = _filled(opened, asked, wanted, min(k, most), effort, allowed)
        shards, rows = locate(opened, ids)
        if plan.kind == "flat" or (plan.is_lossless and reader.dtype == np.float16):
            cosines = np.where(ids < 0, -np.inf, scores).astype(np.float32)
            some = slice(None, None, max(1, len(ids) * wanted // CHECKED_HITS))
            checked = _cosines(reader, names, asked[some], ids[some], shards[some], rows[some])
            there = ids[some] >= 0
            if (np.abs(checked[there] - cosines[some][there]) > SCORE_TOLERANCE).any():
                at = reader.folder / "index"
                raise StoreError(f"{at} is damaged: its vectors are not those of its rows; {REBUILD}")
        else:
            cosines = _cosines(reader, names, asked, ids, shards, rows)
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        blocks.append([np.take_along_axis(each, order, axis=1) for each in (cosines, shards, rows)])
    cosines, shards, rows = (np.concatenate(each) for each in zip(*blocks, strict=True))
    return Nearest(cosines, shards, rows, names)


def _filled(
    opened: OpenIndex, queries: Float32Array, wanted: int, least: int, effort: Effort, allowed: Mask | None
) -> tuple[IntArray, Float32Array]:
    """Ids and scores [Q, wanted], at least `least` of each query: where its lists hold fewer, it looks at more."""
    ids, scores = find(opened.faiss, queries, wanted, effort.probes, allowed)
    while len(short := np.flatnonzero((ids >= 0).sum(axis=1) < least)):
        wider = widened(opened, effort, 2)
        if wider == effort:  # a graph does not lead everywhere
            break
        effort = wider
        ids[short], scores[short] = find(opened.faiss, queries[short], wanted, effort.probes, allowed)
    return ids, scores


def widened(opened: OpenIndex, effort: Effort, times: float) -> Effort:
    """At least as many times the effort, as far as there is more to look at; `times` is at least 1."""
    most = opened.record.plan.num_lists or (0 if opened.record.plan.kind == "flat" else max(opened.record.rows, 1))
    return replace(effort, probes=min(math.ceil(effort.probes * times), max(most, effort.probes)))


def _allowed(folder: Path, opened: OpenIndex, known: Sequence[IndexedShard], where: Filter) -> Mask | None:
    """Ids that may be found; None where all may."""
    if not where.columns:
        return ids_of(known, opened.record.next_id)
    allowed = np.zeros(opened.record.next_id, np.bool_)
    at = {shard.name: shard.first_id for shard in known}
    ends = {shard.name: shard.first_id + shard.rows for shard in known}
    for name, columns in read_columns(folder, where.columns, sorted(at)):
        size = len(columns[where.columns[0]])
        if at[name] + size > ends[name]:
            raise StoreError(f"shard {name} was replaced while it was read; run again")
        allowed[at[name] : at[name] + size] = where.passing(columns)
        at[name] += size
    return allowed


def _merged(one: Nearest, other: Nearest) -> Nearest:
    """The best of two, as many of each query as the wider one has."""
    cosines = np.concatenate([one.cosines, other.cosines], axis=1)
    shards = np.concatenate([one.shards, other.shards + len(one.names)], axis=1)
    rows = np.concatenate([one.rows, other.rows], axis=1)
    width = max(one.cosines.shape[1], other.cosines.shape[1])
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :width]
    best = [np.take_along_axis(each, order, axis=1) for each in (cosines, shards, rows)]
    return Nearest(best[0], best[1], best[2], [*one.names, *other.names])


def _cosines(
    reader: VectorReader, names: Sequence[str], queries: Float32Array, ids: IntArray, shards: IntArray, rows: IntArray
) -> Float32Array:
    """Exact cosines [Q, c] of queries [Q, D] and rows; -inf where the id is -1."""
    out = np.full(ids.shape, -np.inf, np.float32)
    query, place = np.nonzero(ids >= 0)
    for first in range(0, len(query), RANKED_AT_ONCE):
        some = query[first : first + RANKED_AT_ONCE], place[first : first + RANKED_AT_ONCE]
        vectors = torch.from_numpy(queries)[torch.from_numpy(some[0])]
        out[some] = row_cosines(reader, names, vectors, shards[some], rows[some])
    return out
