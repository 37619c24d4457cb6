"""Which lists of an index a row is compared with, so that as many of its near-duplicates are found as are asked for.

A row is compared with the rows of its own list, its home, and with those of each list whose centroid scores almost as
well with it: less by no more than the `reach`. A pair is looked at if either row reaches the other's home.

There is a reach from which on no pair is missed. Take unit vectors x and y with a cosine of t or more, so that
|x - y| <= sqrt(2 - 2 t), and the centroids a and b of their homes. What b lacks for x, x (a - b), and what a lacks for
y, y (b - a), are (x - y) (a - b) together, which is at most sqrt(2 - 2 t) |a - b|: one of them is half of that or less.
Whether homes are the nearest lists does not matter. With R the largest distance of a centroid from any fixed point,
|a - b| <= 2 R: a reach of sqrt(2 - 2 t) R finds all. Near-duplicates are mostly found with much less, and how much is
measured with a sample.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from clipindex.duplicates.copies import NO_ROW
from clipindex.duplicates.rows import Rows, checked_unit
from clipindex.errors import StoreError
from clipindex.index.files import REBUILD
from clipindex.index.search import lists_of
from clipindex.nearest import Arithmetic, limits
from clipindex.store import EmbeddingBatch
from clipindex.threads import map_in_order, num_cores
from clipindex.types import Float32Array, IntArray

HALVINGS = 6
"""Of the reach that finds all, down to the least that is tried beside none."""
SAME = 1e-6
"""Cosines this near are one: sums in float32, in another order."""
SCORES_AT_ONCE = 1 << 22
"""8 MiB in bf16; larger blocks fall out of the cache before they are looked at."""


class Lists(NamedTuple):
    """The lists of an index."""

    centroids: torch.Tensor
    """[L, D] in float32, less their mean: differences of scores stay, and are rounded less."""
    home: np.ndarray[tuple[int], np.dtype[np.int32]]
    """[next_id]: the list of each id; copies have that of the first. -1 where there is no row."""

    @property
    def radius(self) -> float:
        """The largest distance of a centroid from their mean."""
        return float(self.centroids.norm(dim=1).max())


def read_lists(rows: Rows, first: IntArray) -> Lists:
    """The lists of the index of some rows, of which the first copies [next_id] are known.

    Raises:
        StoreError: A row is in no list.
    """
    centroids, home = lists_of(rows.opened.faiss, rows.opened.record.next_id)
    home = np.where(first == NO_ROW, np.int32(-1), home[first])
    if (home[first != NO_ROW] < 0).any():
        raise StoreError(f"{Path(rows.folder) / 'index'} is damaged: rows are in none of its lists; {REBUILD}")
    wide = torch.from_numpy(centroids)
    return Lists(wide - wide.mean(dim=0), home)


def reaches(lists: Lists, threshold: float, arithmetic: Arithmetic) -> list[float]:
    """From 0 to what finds every pair at the threshold, of which more in the module's docstring.

    Scores are of rounded vectors, and rounded themselves. So what finds all is more by twice what that can move one.
    """
    error = arithmetic.error(lists.centroids.shape[1])
    moved = error + arithmetic.unit_roundoff * (1 + error)
    most = (math.sqrt(2 - 2 * threshold) + 2 * moved) * lists.radius
    return [0.0, *(most * 2.0**-halvings for halvings in range(HALVINGS, -1, -1))]


def count_pairs(
    rows: Rows,
    lists: Lists,
    sample: IntArray,
    vectors: torch.Tensor,
    threshold: float,
    arithmetic: Arithmetic,
    on_progress: Callable[[int], None],
) -> IntArray:
    """How many rows are at the threshold for each of a sample, by looking at every row; and with each reach.

    Args:
        rows: All of them.
        lists: In which they are.
        sample: Ids [S].
        vectors: Unit vectors [S, D] of those.
        threshold: Cosine.
        arithmetic: Of the product by which rows are passed over that are like none of the sample.
        on_progress: Called with the number of rows that were looked at.

    Returns:
        Counts [S, 1 + reaches]: of all such rows, then of those that are found with each of the `reaches`.
    """
    levels = reaches(lists, threshold, arithmetic)
    possible = limits(threshold, arithmetic, rows.reader.dim).possible
    rounded = arithmetic.rounded(vectors)
    across = arithmetic.rounded(lists.centroids).T
    home = torch.from_numpy(lists.home.astype(np.int64))
    scores = (rounded @ across).cpu()
    own = scores.gather(1, home[sample, None])

    def count(item: tuple[IntArray, EmbeddingBatch]) -> tuple[int, torch.Tensor]:
        ids, batch = item
        wide = checked_unit(batch)
        rough = arithmetic.rounded(wide)
        best = (rounded @ rough.T).amax(dim=0)
        counts = torch.zeros(len(sample), 1 + len(levels), dtype=torch.int64)
        for near in (best >= possible).nonzero()[:, 0].split(max(1, SCORES_AT_ONCE // len(sample))):
            found = vectors @ wide[near.cpu()].T >= threshold - SAME
            counts[:, 0] += found.sum(dim=1)
            their_home = home[ids][near.cpu()]
            their_scores = (rough[near] @ across).cpu()
            their_own = their_scores.gather(1, their_home[:, None])
            for at, reach in enumerate(levels, 1):
                is_reached = scores[:, their_home] >= _least(own, reach)
                reaches_it = their_scores[:, home[sample]] >= _least(their_own, reach)
                counts[:, at] += (found & (is_reached | reaches_it.T)).sum(dim=1)
        return len(ids), counts

    total, counts = 0, torch.zeros(len(sample), 1 + len(levels), dtype=torch.int64)
    with contextlib.closing(map_in_order(count, rows.batches(), num_cores())) as counted:
        for size, found in counted:
            total, counts = total + size, counts + found
            on_progress(total)
    return counts.numpy()


def reached(
    rows: Rows, lists: Lists, asked: np.ndarray[tuple[int], np.dtype[np.bool_]], reach: float, arithmetic: Arithmetic
) -> Iterator[tuple[IntArray, IntArray]]:
    """Ids of the rows that are asked for, and lists other than its home that each reaches; a block of rows at a time."""
    across = arithmetic.rounded(lists.centroids).T

    def look(item: tuple[IntArray, EmbeddingBatch]) -> tuple[IntArray, IntArray]:
        ids, batch = item
        kept = np.flatnonzero(asked[ids])
        vectors = arithmetic.rounded(checked_unit(batch)[kept])
        home = torch.from_numpy(lists.home[ids[kept]].astype(np.int64)).to(arithmetic.device)[:, None]
        found = []
        size = max(1, SCORES_AT_ONCE // len(lists.centroids))
        for first in range(0, len(kept), size):
            block = home[first : first + size]
            scores = vectors[first : first + size] @ across
            near = (scores >= _least(scores.gather(1, block), reach)).scatter_(1, block, False).nonzero()
            found.append(near + torch.tensor([first, 0], device=near.device))
        row, number = torch.cat([torch.empty(0, 2, dtype=torch.int64), *(each.cpu() for each in found)]).numpy().T
        return ids[kept[row]], number

    yield from map_in_order(look, rows.batches(), num_cores())


def _least(own: torch.Tensor, reach: float) -> torch.Tensor:
    """The least score with a centroid that is reached, where that with the home's is `own`."""
    return (own.float() - reach).to(own.dtype)
