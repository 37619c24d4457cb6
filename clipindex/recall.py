"""How much of the truth an index finds, and how little it has to look at for that.

Recall@k is the share of the k rows nearest to a query, by exact search, that the index finds as well. A row as near as
the k-th counts as one of them, so that copies of an image take no place from each other. A query that is a row of the
directory does not count itself.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipindex.index.files import Effort, OpenIndex, Recall
from clipindex.nearest import Nearest, scan, through_index
from clipindex.store import VectorReader
from clipindex.types import Float32Array, IntArray

DEPTH = 100
"""The k up to which recall is measured."""
TARGET_K = 10
"""The k of the recall that has a target."""
SAME = 1e-5
"""Cosines this near are one: sums in float32, in another order."""
CANDIDATES = 32
"""Times k, at most, that cosines are taken from the embeddings, of kinds that only approximate them."""
SPARED = 1.2
"""More lists are worth it where fewer candidates do then."""
TIMED_QUERIES = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """Queries, and what the exact answer to each is."""

    vectors: Float32Array
    """[Q, D]."""
    own: list[tuple[str, int]] | None
    """Shard and row of each query that is a row itself; None of others."""
    cosines: Float32Array
    """[Q, 100]: of the nearest rows but the query itself; -inf where there are fewer."""

    def of(self, chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> "Questions":
        """Some of them [Q]."""
        own = None if self.own is None else [self.own[at] for at in np.flatnonzero(chosen)]
        return Questions(vectors=self.vectors[chosen], own=own, cosines=self.cosines[chosen])


def draw_rows(sizes: Mapping[str, int], number: int, seed: int) -> list[tuple[str, IntArray]]:
    """Shards and rows, ascending: `number` of them or all, drawn evenly, one from each of as many equal stretches."""
    total = sum(sizes.values())
    number = min(number, total)
    edges = np.linspace(0, total, number + 1)
    drawn = (edges[:-1] + np.random.default_rng(seed).random(number) * np.diff(edges)).astype(np.int64)
    ends = np.cumsum(list(sizes.values()))
    shards = np.searchsorted(ends, drawn, "right")
    names = list(sizes)
    return [(names[at], drawn[shards == at] - (int(ends[at]) - sizes[names[at]])) for at in np.unique(shards).tolist()]


def read_drawn(folder: Path, drawn: Iterable[tuple[str, IntArray]]) -> np.ndarray[Any, Any]:
    """Vectors [n, D] of rows, in the directory's dtype."""
    reader = VectorReader(folder)
    return np.concatenate([reader.take(name, rows) for name, rows in drawn])


def exact_answers(
    folder: Path,
    names: Sequence[str],
    queries: Sequence[Float32Array],
    own: Sequence[list[tuple[str, int]] | None],
    *,
    device: str,
    on_progress: Callable[[int], None] = lambda num_rows: None,
) -> list[Questions]:
    """Find the exact answers to sets of queries [Q, D] among the rows of some shards: one look at every row for all."""
    found = scan(folder, np.concatenate(queries), DEPTH + 1, names=names, device=device, on_progress=on_progress)
    questions = []
    first = 0
    for vectors, rows in zip(queries, own, strict=True):
        rows_of = slice(first, first + len(vectors))
        part = Nearest(found.cosines[rows_of], found.shards[rows_of], found.rows[rows_of], found.names)
        questions.append(Questions(vectors=vectors, own=rows, cosines=_without_own(part, rows)[:, :DEPTH]))
        first += len(vectors)
    return questions


def measure(reader: VectorReader, opened: OpenIndex, questions: Questions, effort: Effort) -> Recall:
    """Recall@1, @10 and @100, each of a search for as many rows."""
    return Recall(
        queries=len(questions.vectors),
        **{f"recall_at_{k}": _recall(reader, opened, questions, effort, k) for k in (1, 10, 100)},
    )


def least_effort(reader: VectorReader, opened: OpenIndex, asked: Sequence[Questions], target: float) -> Effort:
    """The least effort whose recall@10 is the target with all questions, or the most there is."""

    def worst(probes: int, candidates: int) -> float:
        effort = Effort(probes=probes, candidates=candidates)
        return min(_recall(reader, opened, questions, effort, TARGET_K) for questions in asked)

    plan = opened.record.plan
    candidates = 1 if plan.is_lossless else CANDIDATES
    if plan.kind == "flat":
        return Effort()
    most = plan.num_lists or max(opened.record.rows, 1)
    low, high = 0, 1
    while high < most and worst(high, candidates) < target:
        low, high = high, min(2 * high, most)
    while high - low > max(1, high // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if worst(middle, candidates) < target else (low, middle)
    while candidates > 1:
        probes = min(round(high * SPARED), most)
        if worst(probes, candidates // 2) < target:
            break
        high, candidates = (high if worst(high, candidates // 2) >= target else probes), candidates // 2
    return Effort(probes=high, candidates=candidates)


def milliseconds(reader: VectorReader, opened: OpenIndex, questions: Questions, effort: Effort) -> float:
    """Of one query alone, for ten rows; the median."""
    taken = []
    for vector in questions.vectors[:TIMED_QUERIES]:
        started = time.perf_counter()
        through_index(reader, opened, vector[None], TARGET_K, effort)
        taken.append(time.perf_counter() - started)
    return float(np.median(taken)) * 1e3


def queries_per_s(reader: VectorReader, opened: OpenIndex, questions: Questions, effort: Effort) -> float:
    """All queries at once, for ten rows each."""
    started = time.perf_counter()
    through_index(reader, opened, questions.vectors, TARGET_K, effort)
    return len(questions.vectors) / (time.perf_counter() - started)


def within(reader: VectorReader, opened: OpenIndex, questions: Questions, effort: Effort, ms: float) -> Effort:
    """The most effort, up to the given one, that takes at most `ms` a query, or the least there is."""
    while effort.probes > 1 and (taken := milliseconds(reader, opened, questions, effort)) > ms:
        fewer = min(effort.probes - 1, int(effort.probes * ms / taken))
        effort = Effort(probes=max(fewer, 1), candidates=effort.candidates)
    return effort


def _recall(reader: VectorReader, opened: OpenIndex, questions: Questions, effort: Effort, k: int) -> float:
    found = through_index(reader, opened, questions.vectors, k + (questions.own is not None), effort)
    cosines = _without_own(found, questions.own)[:, :k]
    there = np.isfinite(questions.cosines[:, :k]).sum(axis=1)
    least = np.take_along_axis(questions.cosines, np.maximum(there - 1, 0)[:, None], axis=1)
    hits = ((cosines >= least - SAME) & np.isfinite(cosines)).sum(axis=1)
    return float((np.minimum(hits, there) / np.maximum(there, 1)).mean()) if there.any() else 1.0


def _without_own(found: Nearest, own: list[tuple[str, int]] | None) -> Float32Array:
    """Cosines [Q, k - 1], without the query's own row, which is the last where it is not among the others."""
    if own is None:
        return found.cosines
    number = {name: at for at, name in enumerate(found.names)}
    shards = np.array([number[name] for name, _ in own])[:, None]
    rows = np.array([row for _, row in own])[:, None]
    is_own = (found.shards == shards) & (found.rows == rows) & np.isfinite(found.cosines)
    is_own[~is_own.any(axis=1), -1] = True
    others: Float32Array = found.cosines[~is_own].reshape(len(own), -1)
    return others
