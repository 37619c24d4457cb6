"""How far a row has to reach, so that as many of its near-duplicates are found as are asked for: measured on a sample.

Take unit vectors x and y with a cosine of t or more, so that |x - y| <= sqrt(2 - 2 t), and the centroids a and b of
their homes. What b lacks for x, x (a - b), and what a lacks for y, y (b - a), are (x - y) (a - b) together: one of them
is sqrt(2 - 2 t) |a - b| / 2 or less, and there is no use in reaching further. Most pairs take a small part of it, since
x - y has no reason to point from one centroid to the other. Where nothing is enough, or it would be as cheap, all rows
are compared with one another.
"""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from clipindex.duplicates.lists import SCORES_AT_ONCE, Lists, lacks, one_list
from clipindex.duplicates.rows import Rows, checked_unit, unit
from clipindex.nearest import Arithmetic, limits
from clipindex.products import multiply
from clipindex.recall import draw_rows, read_drawn
from clipindex.store import EmbeddingBatch
from clipindex.threads import map_in_order, num_cores
from clipindex.types import IntArray

NUM_CHECKED = 1000
"""Rows whose duplicates are counted exactly; half as many more are drawn to find the reach by."""
HALVINGS = 7
"""Of the largest reach that may be needed, down to the least that is tried beside none."""
KEPT = 16
"""Pairs of a block of rows that are looked for in the result, or up to twice as many."""
CLEAR = 1e-5
"""By how much those are above the threshold: whoever computes their cosines, and in whatever order, finds so."""
SAME = 1e-6
"""Cosines this near are one: sums in float32, in another order."""


class Search(NamedTuple):
    """Which rows are compared, and what that finds."""

    lists: Lists
    reach: float
    lists_a_row: float
    """Mean number that a row is compared with; its home among them."""
    recall: float
    """Share of the true pairs that are found, averaged over rows of the sample that have any."""
    checked: int
    """How many those are."""
    expected: IntArray
    """[k, 2]: ids of some pairs that are found so, to be looked for in the result."""


class Sample(NamedTuple):
    """Rows whose near-duplicates are counted."""

    ids: IntArray
    """[S]."""
    vectors: torch.Tensor
    """Unit vectors [S, D] in float32."""
    home: torch.Tensor
    """[S]."""
    lack: torch.Tensor
    """[S, L]; see `lacks`."""


def find_reach(
    rows: Rows,
    lists: Lists,
    first: IntArray,
    threshold: float,
    target: float,
    seed: int,
    arithmetic: Arithmetic,
    on_progress: Callable[[int], None],
) -> Search:
    """The least reach that finds as large a share of the pairs as is wanted.

    Args:
        rows: All of them.
        lists: In which they are.
        first: Of each id the first copy.
        threshold: Cosine of a pair.
        target: The share.
        seed: Of the sample.
        arithmetic: Of products.
        on_progress: Called with the number of rows that were compared with the sample.
    """
    sample = _drawn(rows, lists, seed, arithmetic)
    counts, pairs, needed = count_pairs(rows, lists, first, sample, threshold, arithmetic, on_progress)
    others = counts[counts[:, -1] > 1] - 1  # without itself
    shares = others / others[:, -1:]
    is_third = np.arange(len(shares)) % 3 == 0
    tuning, check = (shares[is_third], shares[~is_third]) if len(shares) >= 3 else (shares, shares)
    recall = check.mean(axis=0) if len(check) else np.ones(counts.shape[1])
    least = np.minimum(recall, tuning.mean(axis=0)) if len(tuning) else recall
    # All rows, which come last, find all; that nothing is missed by less, no sample tells.
    at = int((least >= target).argmax()) if target < 1 else len(least) - 1
    reach = float(reaches(lists, threshold)[at])
    is_reached = sample.lack <= reach
    home = lists.home[lists.home >= 0]
    sizes = torch.from_numpy(np.bincount(home, minlength=len(lists.centroids)))
    if (is_reached * sizes).sum(dim=1).float().mean() >= len(home) / 2:  # each with each is half a square
        return Search(one_list(lists), 0.0, float(len(lists.centroids)), 1.0, len(check), pairs)
    return Search(
        lists, reach, float(is_reached.sum(dim=1).float().mean()), float(recall[at]), len(check), pairs[needed <= at]
    )


def _drawn(rows: Rows, lists: Lists, seed: int, arithmetic: Arithmetic) -> Sample:
    drawn = draw_rows({shard.name: shard.rows for shard in rows.opened.shards}, NUM_CHECKED * 3 // 2, seed)
    first = {shard.name: shard.first_id for shard in rows.opened.shards}
    ids = np.concatenate([first[name] + numbers for name, numbers in drawn])
    home = torch.from_numpy(lists.home[ids]).long()
    vectors = unit(read_drawn(rows.folder, drawn))
    return Sample(ids, vectors, home, lacks(lists, vectors, home, arithmetic))


def reaches(lists: Lists, threshold: float) -> torch.Tensor:
    """What is tried, ascending: none, some, and all rows (infinity)."""
    most = math.sqrt(2 - 2 * threshold) * float(lists.centroids.norm(dim=1).max())
    return torch.tensor([0.0, *(most * 2.0**-halvings for halvings in range(HALVINGS, -1, -1)), math.inf])


def count_pairs(
    rows: Rows,
    lists: Lists,
    first: IntArray,
    sample: Sample,
    threshold: float,
    arithmetic: Arithmetic,
    on_progress: Callable[[int], None],
) -> tuple[IntArray, IntArray, IntArray]:
    """How many rows are at the threshold for each of a sample, by looking at every row: those found by each reach.

    Args:
        rows: All of them.
        lists: In which they are.
        first: Of each id the first copy.
        sample: S rows.
        threshold: Cosine.
        arithmetic: Of the product by which rows are passed over that are like none of the sample.
        on_progress: Called with the number of rows that were looked at.

    Returns:
        Counts [S, reaches]: of such rows that are found with each of the `reaches`; with the last, all. And of some of
        those pairs, but of copies, which no search has to find, the ids [k, 2] and which reach [k] is needed for them.
    """
    levels = reaches(lists, threshold)
    possible = limits(threshold, arithmetic, rows.reader.dim).possible
    rounded = arithmetic.rounded(sample.vectors)

    def count(item: tuple[IntArray, EmbeddingBatch]) -> tuple[int, torch.Tensor, torch.Tensor]:
        ids, batch = item
        kept = [torch.empty(0, 3, dtype=torch.int64)]
        counts = torch.zeros(len(rounded) * len(levels), dtype=torch.int64)
        size = max(1, SCORES_AT_ONCE // max(len(rounded), len(lists.centroids)))
        for some in (slice(begin, begin + size) for begin in range(0, len(ids), size)):
            vectors = checked_unit(batch, some)
            near = ((rounded @ arithmetic.rounded(vectors).T).amax(dim=0) >= possible).nonzero()[:, 0].cpu()
            cosines = multiply(sample.vectors, vectors[near].T)
            one, other = (cosines >= threshold - SAME).nonzero(as_tuple=True)
            home = torch.from_numpy(lists.home[ids[some]][near.numpy()].astype(np.int64))
            lack = lacks(lists, vectors[near], home, arithmetic)
            least = torch.minimum(sample.lack[one, home[other]], lack[other, sample.home[one]])
            level = torch.bucketize(least, levels)
            counts += torch.bincount(one * len(levels) + level, minlength=len(counts))
            # By arrays: NumPy takes a tensor of one number for that number.
            ones, others = sample.ids[one.numpy()], ids[some][near.numpy()][other.numpy()]
            apart = torch.from_numpy(first[ones] != first[others])
            pairs = torch.from_numpy(ones), torch.from_numpy(others), level
            clear = ((cosines[one, other] >= threshold + CLEAR) & apart).nonzero()[:, 0]
            clear = clear[:: max(1, len(clear) // KEPT)]
            kept.append(torch.stack([each[clear] for each in pairs], dim=1))
        return len(ids), counts, torch.cat(kept)

    total, counts = 0, torch.zeros(len(rounded) * len(levels), dtype=torch.int64)
    kept = [torch.empty(0, 3, dtype=torch.int64)]
    with contextlib.closing(map_in_order(count, rows.batches(), num_cores())) as counted:
        for size, found, pairs in counted:
            total, counts = total + size, counts + found
            kept.append(pairs)
            on_progress(total)
    pairs_kept = torch.cat(kept).numpy()
    by_reach = counts.view(len(rounded), len(levels)).cumsum(dim=1).numpy()
    return by_reach, pairs_kept[:, :2], pairs_kept[:, 2]
