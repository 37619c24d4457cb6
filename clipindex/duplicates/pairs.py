"""All pairs of rows at a threshold, of those that the lists of an index lead to, joined into groups.

A list is one product: of its rows with one another, and with the rows that reach it. A very large one is several, so
that memory stays bounded. Rows that are mostly of one group already are not compared with one another again: a million
images that are nearly one are half a billion pairs times a thousand, of which a million tell what there is to know.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from clipindex.duplicates.groups import Groups
from clipindex.duplicates.held import Held, Task, split, while_held
from clipindex.duplicates.rows import Rows
from clipindex.nearest import Arithmetic, Limits, limits, nonzero, unit_cosines
from clipindex.threads import map_in_order, num_cores
from clipindex.types import IntArray

PIECE = 1024
"""Rows of a list that are multiplied at once."""
TILE_SCORES = 1 << 21
"""Scores at once, 4 MiB in bf16; also the most pairs that are in hand of a thread."""
EXACT_AT_ONCE = 1 << 11
"""Pairs of a thread whose cosines are computed in float32: 20 MiB of 512 float16, and in a cache a fifth of the time
that 65,536 take."""


def join_pairs(
    rows: Rows,
    tasks: Iterable[Task],
    groups: Groups,
    threshold: float,
    arithmetic: Arithmetic,
    memory_bytes: int,
) -> Iterator[int]:
    """Join the rows whose cosine is at the threshold, by `unit_cosines`, of all pairs that are to be compared.

    Args:
        rows: All of them.
        tasks: What to compare; those that come one after the other should have rows in common.
        groups: Of the ids.
        threshold: Cosine.
        arithmetic: Of the products.
        memory_bytes: For vectors; they are read again as often as that is too little.

    Yields:
        After some pairs, of how many rows more all pairs among themselves have been compared.
    """
    bounds = limits(threshold, arithmetic, rows.reader.dim)

    def look(held: Held, some: list[Task]) -> Iterator[int]:
        return map_in_order(_Looker(held, groups, bounds, threshold), _tiles(some), num_cores())

    return while_held(rows, tasks, arithmetic, memory_bytes, look)


def _tiles(tasks: Iterable[Task]) -> Iterator[Task]:
    for task in tasks:
        piece = min(PIECE, len(task.ones))
        yield from split([task], piece, TILE_SCORES // max(piece, 1))


class _Looker:
    """Looks at the pairs of tasks, in several threads, and joins those at the threshold."""

    def __init__(self, held: Held, groups: Groups, bounds: Limits, threshold: float) -> None:
        self._held = held
        self._groups = groups
        self._bounds = bounds
        self._threshold = threshold

    def __call__(self, task: Task) -> int:
        """Returns the number of ones that were compared among themselves."""
        ones, others = task
        names = self._groups.names(ones)
        their_names = names if others is None else self._groups.names(others)
        middle = len(names) // 2
        in_one = names == np.partition(names, middle)[middle]  # if any group has more than half of them, that one's
        theirs_in_one = their_names == names[in_one.argmax()]
        if 2 * in_one.sum() * theirs_in_one.sum() <= len(names) * len(their_names):
            self._look(ones, others)
        else:  # without the pairs that are in one group already, which are most
            self._look(ones[~in_one], None if others is None else others[theirs_in_one])
            self._look(ones[in_one] if others is None else ones, (ones if others is None else others)[~theirs_in_one])
        return len(ones) if others is None else 0

    def _look(self, ones: IntArray, others: IntArray | None) -> None:
        left = self._held.place[ones]
        right = left if others is None else self._held.place[others]
        if not len(left) or not len(right):
            return
        scores = (self._held.padded(left) @ self._held.padded(right).T)[: len(left), : len(right)]
        if others is None:
            scores.tril_(-1)
        near = (scores.amax(dim=0) >= self._bounds.possible).nonzero()[:, 0]
        if not len(near):
            return
        scores = scores[:, near]
        one, other = nonzero(scores >= self._bounds.possible).T
        is_sure = (scores[one, other] > self._bounds.sure).cpu().numpy()
        pairs = left[one], right[near.cpu().numpy()[other]]
        self._join(*(each[is_sure] for each in pairs))
        self._join_exactly(*(each[~is_sure] for each in pairs))

    def _join_exactly(self, left: IntArray, right: IntArray) -> None:
        for first in range(0, len(left), EXACT_AT_ONCE):
            ones, others = (each[first : first + EXACT_AT_ONCE] for each in (left, right))
            ids = self._held.ids
            apart = self._groups.names(ids[ones]) != self._groups.names(ids[others])
            ones, others = ones[apart], others[apart]
            cosines = unit_cosines(*(torch.from_numpy(self._held.stored[each]).float() for each in (ones, others)))
            kept = cosines >= self._threshold
            self._join(ones[kept], others[kept])

    def _join(self, left: IntArray, right: IntArray) -> None:
        self._groups.join(self._held.ids[left], self._held.ids[right])
