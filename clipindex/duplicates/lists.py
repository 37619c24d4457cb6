"""The lists of an index, and which of them a row reaches.

A row is compared with the rows of its own list, its home, and with those of each list whose centroid scores almost as
well with it: less by no more than the `reach`. A pair is looked at if either row reaches the other's home.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from clipindex.duplicates.copies import NO_ROW
from clipindex.duplicates.rows import Rows, checked_unit
from clipindex.errors import StoreError
from clipindex.index.files import REBUILD
from clipindex.index.search import lists_of
from clipindex.nearest import Arithmetic, nonzero
from clipindex.store import EmbeddingBatch
from clipindex.threads import map_in_order, num_cores
from clipindex.types import IntArray

SCORES_AT_ONCE = 1 << 22
"""8 MiB in bf16; larger blocks fall out of the cache before they are looked at."""


class Lists(NamedTuple):
    """The lists of an index."""

    centroids: torch.Tensor
    """[L, D] in float32, less their mean: differences of scores stay, and are rounded less."""
    home: np.ndarray[Any, np.dtype[np.int32]]
    """[next_id]: the list of each id; copies have that of the first. -1 where there is no row."""


def read_lists(rows: Rows, first: IntArray) -> Lists:
    """The lists of the index of some rows, of which the first copies [next_id] are known.

    Raises:
        StoreError: A row is in no list.
    """
    centroids, home = lists_of(rows.opened.faiss, rows.opened.record.next_id)
    home = np.where(first == NO_ROW, np.int32(-1), home[first])
    if (home[first != NO_ROW] < 0).any():
        raise StoreError(f"{rows.folder / 'index'} is damaged: rows are in none of its lists; {REBUILD}")
    wide = torch.from_numpy(centroids)
    return Lists(wide - wide.mean(dim=0), home)


def one_list(lists: Lists) -> Lists:
    """All rows in one, so that each is compared with each."""
    return Lists(torch.zeros(1, lists.centroids.shape[1]), np.minimum(lists.home, 0))


def lacks(lists: Lists, vectors: torch.Tensor, home: torch.Tensor, arithmetic: Arithmetic) -> torch.Tensor:
    """By how much less each centroid scores [n, L] with unit vectors [n, D] than that of the home [n].

    By a rounded product, as in `reached`, so that what a sample tells is what rows then do.
    """
    scores = arithmetic.rounded(vectors) @ arithmetic.rounded(lists.centroids).T
    return _own(lists, vectors, home) - scores.float().cpu()


def _own(lists: Lists, vectors: torch.Tensor, home: torch.Tensor) -> torch.Tensor:
    """Scores [n, 1] of unit vectors [n, D] with the centroids of their homes [n]."""
    return torch.einsum("nd,nd->n", vectors, lists.centroids[home])[:, None]


def reached(
    rows: Rows,
    lists: Lists,
    numbers: range,
    is_asked: np.ndarray[Any, np.dtype[np.bool_]],
    reach: float,
    arithmetic: Arithmetic,
) -> Iterator[tuple[int, IntArray, IntArray]]:
    """Of some lists, and of the rows that are asked for: which row reaches which list, its home apart.

    Yields:
        For a block of rows their number, and an id and a list for each pair.
    """
    across = arithmetic.rounded(lists.centroids[numbers.start : numbers.stop]).T

    def look(item: tuple[IntArray, EmbeddingBatch]) -> tuple[int, IntArray, IntArray]:
        ids, batch = item
        kept = np.flatnonzero(is_asked[ids])
        vectors = checked_unit(batch)[kept]
        home = lists.home[ids[kept]].astype(np.int64)
        # Rounded as the scores are, so that none is lost.
        least = (_own(lists, vectors, torch.from_numpy(home)) - reach).to(arithmetic.device, arithmetic.dtype)
        rounded = arithmetic.rounded(vectors)
        size = max(1, SCORES_AT_ONCE // len(numbers))
        blocks = [slice(first, first + size) for first in range(0, len(kept), size)]
        found = [nonzero(rounded[some] @ across >= least[some]) + (some.start, numbers.start) for some in blocks]
        row, number = np.concatenate([np.empty((0, 2), np.int64), *found]).T
        is_other = number != home[row]
        return len(ids), ids[kept[row[is_other]]], number[is_other]

    yield from map_in_order(look, rows.batches(), num_cores())
