"""Every row looked at: exact, in one pass over the embeddings."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from clipindex.nearest.found import Filter, Nearest
from clipindex.products import multiply
from clipindex.store import EmbeddingBatch, check_cosines, read_embeddings
from clipindex.threads import map_in_order, num_cores
from clipindex.types import Float32Array, IntArray

QUERIES_AT_ONCE = 256
"""Their scores with a row group are 16 MiB."""


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


def _better(
    batch: EmbeddingBatch, queries: torch.Tensor, vectors: torch.Tensor, worst: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, row and cosine of what is above the worst [Q] that each query has kept so far, in order of the queries."""
    if not len(vectors):
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0)
    parts = []
    for first in range(0, len(queries), QUERIES_AT_ONCE):
        scores = multiply(queries[first : first + QUERIES_AT_ONCE], vectors.T)
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
