"""The rows of a directory nearest to vectors: of all rows, or of those that its index leads to."""

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from clipindex.errors import FingerprintError, StoreError
from clipindex.index.files import Effort, IndexedShard, OpenIndex, open_index
from clipindex.index.lists import Mask
from clipindex.index.plan import default_memory_bytes
from clipindex.index.search import find
from clipindex.store import (
    EmbeddingBatch,
    VectorReader,
    check_cosines,
    read_columns,
    read_dataset,
    read_embeddings,
    shard_states,
)
from clipindex.threads import map_in_order, num_cores
from clipindex.types import Float32Array

log = logging.getLogger(__name__)

QUERIES_AT_ONCE = 256
"""Their scores with a row group are 16 MiB."""
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

SAME = 1e-6
"""Cosines this near are one: sums in float32, in another order."""

IntArray = np.ndarray[Any, np.dtype[np.int64]]


class Nearest(NamedTuple):
    """The k nearest rows of each of Q queries, best first."""

    cosines: Float32Array
    """[Q, k]; -inf where there are fewer rows."""
    shards: IntArray
    """[Q, k], places in `names`."""
    rows: IntArray
    """[Q, k], row numbers within their shards."""
    names: list[str]
    """Of shards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Filter:
    """Which rows may be found: all by default."""

    labels: tuple[int, ...] = ()
    """One of these."""
    caption: str | None = None
    """Part of the caption, whatever its case."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What it looks at."""
        return (*(("label",) if self.labels else ()), *(("caption",) if self.caption is not None else ()))

    def passing(self, columns: Mapping[str, pa.Array]) -> Mask | None:
        """Rows [n] that may be found; None where all may."""
        masks = []
        if self.labels:
            masks.append(pc.is_in(columns["label"].cast(pa.int64()), pa.array(self.labels, pa.int64())))
        if self.caption is not None:
            masks.append(pc.match_substring(columns["caption"], self.caption, ignore_case=True))
        return np.logical_and.reduce([np.asarray(pc.fill_null(mask, False)) for mask in masks]) if masks else None


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


def scan(
    folder: Path,
    queries: Float32Array,
    k: int,
    *,
    where: Filter = Filter(),  # noqa: B008 - it is frozen
    names: Sequence[str] | None = None,
    device: str = "cpu",
    on_progress: Callable[[int], None] = lambda num_rows: None,
) -> Nearest:
    """The nearest rows by looking at every one, of all shards or of some; see `nearest`."""
    asked = torch.from_numpy(queries).to(device)
    cosines = torch.full((len(queries), k), -torch.inf)
    places = torch.zeros(len(queries), k, dtype=torch.int64)
    starts: list[tuple[int, str, int]] = []
    total = 0

    def better(batch: EmbeddingBatch) -> tuple[EmbeddingBatch, torch.Tensor, torch.Tensor, torch.Tensor]:
        passing = where.passing(batch.columns)
        kept = None if passing is None else np.flatnonzero(passing)
        vectors = torch.from_numpy(batch.embedding if kept is None else batch.embedding[kept])
        query, row, value = _better(batch, asked, vectors.to(device).float(), cosines[:, -1].to(device), k)
        return batch, query, row if kept is None else torch.from_numpy(kept)[row], value

    with contextlib.closing(
        map_in_order(better, read_embeddings(folder, where.columns, names), num_cores())
    ) as batches:
        for batch, query, row, value in batches:
            starts.append((total, batch.shard.name, batch.first_row))
            cosines, places = _ranked(cosines, places, query, row + total, value)
            total += len(batch.embedding)
            on_progress(total)
    return _placed(cosines.numpy(), places.numpy(), starts)


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


def vectors_at(reader: VectorReader, names: Sequence[str], shards: IntArray, rows: IntArray) -> torch.Tensor:
    """Vectors [n, D], float32, of rows: for each a place in `names` and a row."""
    order = np.argsort(shards, kind="stable")
    parts = [
        reader.take(names[shards[at[0]]], rows[at])
        for at in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1)
        if len(at)
    ]
    if not parts:
        return torch.empty(0, reader.dim)
    return torch.from_numpy(np.concatenate(parts)[np.argsort(order)]).float()


def row_cosines(
    reader: VectorReader,
    names: Sequence[str],
    vectors: torch.Tensor,
    shards: IntArray,
    rows: IntArray,
) -> Float32Array:
    """Exact cosines [n] of vectors [n, D] and rows, one by one."""
    cosines: Float32Array = torch.einsum("nd,nd->n", vectors, vectors_at(reader, names, shards, rows)).numpy()
    return cosines


def unit_cosines(ones: torch.Tensor, others: torch.Tensor) -> Float32Array:
    """Cosines [n] of vectors [n, D], one by one, brought to unit length first: float16 leaves them a hair from it."""
    normalize = torch.nn.functional.normalize
    cosines: Float32Array = torch.einsum("nd,nd->n", normalize(ones, dim=1), normalize(others, dim=1)).numpy()
    return np.minimum(cosines, 1)


def count_within(
    folder: Path,
    queries: Float32Array,
    least: float,
    names: Sequence[str],
    on_progress: Callable[[int], None] = lambda num_rows: None,
) -> IntArray:
    """How many rows [Q] of some shards have at least this cosine to each query [Q, D], by looking at every row.

    As of `unit_cosines`.
    """
    asked = torch.nn.functional.normalize(torch.from_numpy(queries), dim=1)
    counts = np.zeros(len(queries), np.int64)
    total = 0

    def count(batch: EmbeddingBatch) -> tuple[int, IntArray]:
        vectors = torch.from_numpy(batch.embedding).float()
        scores = asked @ vectors.T
        check_cosines(batch, scores.amax(dim=1).numpy())
        scores /= vectors.norm(dim=1)
        return len(batch.embedding), (scores >= least - SAME).sum(dim=1).numpy()

    with contextlib.closing(map_in_order(count, read_embeddings(folder, names=names), num_cores())) as batches:
        for size, found in batches:
            counts += found
            total += size
            on_progress(total)
    return counts


def locate(opened: OpenIndex, ids: IntArray) -> tuple[IntArray, IntArray]:
    """Place of the shard in `opened.shards`, and row within it, of each id; an id of -1 gets any.

    Raises:
        StoreError: An id is none of the index's.
    """
    first = np.array([shard.first_id for shard in opened.shards], np.int64)
    rows = np.array([shard.rows for shard in opened.shards], np.int64)
    shards = np.maximum(np.searchsorted(first, ids, "right") - 1, 0)
    within = np.where(ids < 0, 0, ids - first[shards])
    if ((ids >= 0) & (within >= rows[shards])).any():
        raise StoreError(f"the index is damaged: it holds ids that no row has; {REBUILD}")
    return shards, within


def check_model(folder: Path, opened: OpenIndex) -> None:
    """Refuse an index of another model's embeddings.

    Raises:
        FingerprintError: It is.
    """
    wanted = read_dataset(folder).model.fingerprint
    if opened.record.fingerprint != wanted:
        raise FingerprintError(
            f"{folder / 'index'} is of embeddings with fingerprint {opened.record.fingerprint[:12]},"
            f" the directory's have {wanted[:12]}; {REBUILD}"
        )


def compare_shards(states: Mapping[str, str], indexed: Sequence[IndexedShard]) -> tuple[list[IndexedShard], list[str]]:
    """Which of an index's shards are still the same, and the names of those that it does not have, or as others.

    Args:
        states: Of the published shards, as `store.shard_states` tells them.
        indexed: The index's shards.
    """
    known = [shard for shard in indexed if states.get(shard.name) == shard.state]
    return known, sorted(set(states) - {shard.name for shard in known})


def ids_of(shards: Sequence[IndexedShard], next_id: int) -> Mask | None:
    """Which ids [next_id] are of rows of these shards; None where all are."""
    if sum(shard.rows for shard in shards) == next_id:
        return None
    mask = np.zeros(next_id, np.bool_)
    for shard in shards:
        mask[shard.first_id : shard.first_id + shard.rows] = True
    return mask


def widened(opened: OpenIndex, effort: Effort, times: float) -> Effort:
    """At least as many times the effort, as far as there is more to look at; `times` is at least 1."""
    most = opened.record.plan.num_lists or (0 if opened.record.plan.kind == "flat" else max(opened.record.rows, 1))
    return replace(effort, probes=min(math.ceil(effort.probes * times), max(most, effort.probes)))


REBUILD = "build the index again, with clipindex index --rebuild"


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


def _better(
    batch: EmbeddingBatch, queries: torch.Tensor, vectors: torch.Tensor, worst: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, row and cosine of what is above the worst [Q] that each query has kept so far, in order of the queries."""
    if not len(vectors):
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0)
    parts = []
    for first in range(0, len(queries), QUERIES_AT_ONCE):
        scores = queries[first : first + QUERIES_AT_ONCE] @ vectors.T
        check_cosines(batch, scores.amax(dim=1).cpu().numpy())
        least = worst[first : first + QUERIES_AT_ONCE]
        if torch.isinf(least).any():  # nothing to compare with yet
            values, rows = torch.topk(scores, min(k, len(vectors)), dim=1)
            query = torch.arange(len(scores)).repeat_interleave(values.shape[1])
            rows, values = rows.flatten(), values.flatten()
        else:
            query, rows = (scores > least[:, None]).nonzero(as_tuple=True)
            values = scores[query, rows]
        parts.append((query.cpu() + first, rows.cpu(), values.cpu()))
    query, rows, values = (torch.cat(each) for each in zip(*parts, strict=True))
    return query, rows, values


def _ranked(
    cosines: torch.Tensor, places: torch.Tensor, query: torch.Tensor, row: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best [Q, k] of those there were and of more, which come in order of the queries."""
    if not len(query):
        return cosines, places
    counts = torch.bincount(query, minlength=len(cosines))
    slot = torch.arange(len(query)) - (counts.cumsum(0) - counts)[query]
    shape = len(cosines), int(counts.max())
    more, where = torch.full(shape, -torch.inf), torch.zeros(shape, dtype=torch.int64)
    more[query, slot], where[query, slot] = value, row
    best, order = torch.topk(torch.cat([cosines, more], dim=1), cosines.shape[1], dim=1)
    return best, torch.cat([places, where], dim=1).gather(1, order)


def _placed(cosines: Float32Array, places: IntArray, starts: list[tuple[int, str, int]]) -> Nearest:
    names = list(dict.fromkeys(name for _, name, _ in starts))
    number = {name: at for at, name in enumerate(names)}
    begins = np.array([begin for begin, _, _ in starts], np.int64)
    shards = np.array([number[name] for _, name, _ in starts], np.int64)
    first = np.array([row for _, _, row in starts], np.int64)
    if not starts:
        return Nearest(cosines, places, places, names)
    batch = np.searchsorted(begins, places, "right") - 1
    return Nearest(cosines, shards[batch], first[batch] + places - begins[batch], names)


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
