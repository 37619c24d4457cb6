"""The lists of an index, and which of them a row reaches.

A row is compared with the rows of its own list, its home, and with those of each list whose centroid scores almost as
well with it: less by no more than the `reach`. A pair is looked at if either row reaches the other's home.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from clipindex.duplicates.copies import NO_ROW
from clipindex.duplicates.held import Held, Task, while_held
from clipindex.duplicates.rows import Rows
from clipindex.errors import StoreError
from clipindex.index.files import REBUILD
from clipindex.index.search import lists_of
from clipindex.nearest import Arithmetic, nonzero
from clipindex.threads import map_in_order, num_cores
from clipindex.types import IntArray

NEAR = 256
"""Lists that a row may reach, itself among them. Of the pairs of 200,000 CLIP-like rows 128 find 0.992, 512 0.994."""
PIECE = 4096
"""Rows that are multiplied at once."""
SCORES_AT_ONCE = 1 << 22
"""16 MiB in float32."""


class Lists(NamedTuple):
    """The lists of an index."""

    centroids: torch.Tensor
    """[L, D] in float32, less their mean: differences of scores stay, and are rounded less."""
    near: IntArray
    """[L, K]: each list itself and those with the nearest centroids, which alone its rows may reach."""
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
    return Lists(wide - wide.mean(dim=0), _nearest(wide), home)


def one_list(lists: Lists) -> Lists:
    """All rows in one, so that each is compared with each."""
    return Lists(torch.zeros(1, lists.centroids.shape[1]), np.zeros((1, 1), np.int64), np.minimum(lists.home, 0))


def _nearest(centroids: torch.Tensor) -> IntArray:
    size = max(1, SCORES_AT_ONCE // len(centroids))
    found = []
    for first in range(0, len(centroids), size):
        own = torch.arange(first, min(first + size, len(centroids)))
        scores = centroids[own] @ centroids.T
        scores[torch.arange(len(own)), own] = torch.inf
        found.append(scores.topk(min(NEAR, len(centroids)), dim=1).indices)
    return torch.cat(found).numpy()


def lacks(lists: Lists, vectors: torch.Tensor, home: torch.Tensor, arithmetic: Arithmetic) -> torch.Tensor:
    """By how much less each centroid scores [n, L] with unit vectors [n, D] than that of the home [n].

    By a rounded product, as in `reached`, so that what a sample tells is what rows then do.
    """
    scores = (arithmetic.rounded(vectors) @ arithmetic.rounded(lists.centroids).T).float().cpu()
    near = torch.from_numpy(lists.near)[home]
    lack = torch.full(scores.shape, torch.inf)
    return lack.scatter_(1, near, scores.gather(1, home[:, None]) - scores.gather(1, near))


def reached(
    rows: Rows, lists: Lists, members: Iterable[IntArray], reach: float, arithmetic: Arithmetic, memory_bytes: int
) -> Iterator[tuple[int, IntArray, IntArray]]:
    """Which rows reach which lists, their homes apart.

    Args:
        rows: All of them.
        lists: In which they are.
        members: Ids that have one home.
        reach: See above.
        arithmetic: Of the products.
        memory_bytes: For vectors.

    Yields:
        For some rows their number, and an id and a list for each pair.
    """
    rounded = arithmetic.rounded(lists.centroids)
    pieces = (Task(ids[at : at + PIECE], None) for ids in members for at in range(0, len(ids), PIECE))

    def look(held: Held, task: Task) -> tuple[int, IntArray, IntArray]:
        near = lists.near[lists.home[task.ones[0]]]
        scores = held.padded(held.place[task.ones]) @ rounded[near].T
        least = (scores[:, :1].float() - reach).to(scores.dtype)  # rounded as the scores are: none is lost
        row, place = nonzero((scores >= least)[: len(task.ones), 1:]).T
        return len(task.ones), task.ones[row], near[1 + place]

    def look_at_all(held: Held, tasks: list[Task]) -> Iterator[tuple[int, IntArray, IntArray]]:
        # Where memory is for less than a piece, there are others too: its other parts, which have their own tasks.
        alone = (task for task in tasks if task.others is None)
        return map_in_order(functools.partial(look, held), alone, num_cores())

    return while_held(rows, pieces, arithmetic, memory_bytes, look_at_all)
