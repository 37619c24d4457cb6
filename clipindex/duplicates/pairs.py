"""All pairs of rows at a threshold, of those that the lists of an index lead to, joined into groups.

A list is one product: of its rows with one another, and with the rows that reach it. A very large one is several, so
that memory stays bounded. Rows that are mostly of one group already are not compared with one another again: a million
images that are nearly one are half a billion pairs times a thousand, of which a million tell what there is to know.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from clipindex.duplicates.groups import Groups
from clipindex.duplicates.rows import PAIRS_AT_ONCE, Rows, unit
from clipindex.nearest import Arithmetic, Limits, limits, nonzero, unit_cosines
from clipindex.threads import map_in_order, num_cores
from clipindex.types import IntArray

PIECE = 1024
"""Rows of a list that are multiplied at once."""
TILE_SCORES = 1 << 21
"""Scores at once, 4 MiB in bf16; also the most pairs that are in hand of a thread."""


class Task(NamedTuple):
    """Rows to compare."""

    ones: IntArray
    """Ids [m]."""
    others: IntArray | None
    """Ids [n], each with all of the ones; None: the ones among themselves."""


class _Held(NamedTuple):
    """Rows in memory."""

    ids: IntArray
    """[n], ascending."""
    place: IntArray
    """[next_id]: of each id among those."""
    stored: np.ndarray[Any, Any]
    """Vectors [n, D] in the directory's dtype."""
    rounded: torch.Tensor
    """The same, to be multiplied."""


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
    row_bytes = rows.reader.dim * (rows.reader.dtype.itemsize + arithmetic.dtype.itemsize)
    most = max(memory_bytes // row_bytes, 2)
    bounds = limits(threshold, arithmetic, rows.reader.dim)
    for wanted, some in _loads(_split(tasks, most // 2, most // 2), rows.opened.record.next_id, most):
        held = _read(rows, wanted, arithmetic)
        look = _Looker(held, groups, bounds, threshold)
        with contextlib.closing(map_in_order(look, _tiles(some), num_cores())) as looked:
            yield from looked


def _split(tasks: Iterable[Task], piece: int, block: int) -> Iterator[Task]:
    """The same pairs in tasks of at most so many ones, and others."""
    for ones, others in tasks:
        for first in range(0, len(ones), piece):
            some = ones[first : first + piece]
            rest = ones[first + piece :] if others is None else others
            if others is None:
                yield Task(some, None)
            for begin in range(0, len(rest), block):
                yield Task(some, rest[begin : begin + block])


def _tiles(tasks: Iterable[Task]) -> Iterator[Task]:
    for task in tasks:
        piece = min(PIECE, len(task.ones))
        yield from _split([task], piece, TILE_SCORES // max(piece, 1))


def _loads(tasks: Iterable[Task], next_id: int, most: int) -> Iterator[tuple[IntArray, list[Task]]]:
    """Tasks that have at most so many rows together, and the ids of those, ascending."""
    wanted = np.zeros(next_id, np.bool_)
    some: list[Task] = []
    number = 0
    for task in tasks:
        parts = [part for part in task if part is not None]
        new = sum(len(part) - int(np.count_nonzero(wanted[part])) for part in parts)
        if some and number + new > most:
            yield np.flatnonzero(wanted), some
            wanted[:] = False
            some, number, new = [], 0, sum(map(len, parts))
        for part in parts:
            wanted[part] = True
        some.append(task)
        number += new
    if some:
        yield np.flatnonzero(wanted), some


def _read(rows: Rows, ids: IntArray, arithmetic: Arithmetic) -> _Held:
    stored = np.empty((len(ids), rows.reader.dim), rows.reader.dtype)
    rounded = torch.empty(stored.shape, dtype=arithmetic.dtype, device=arithmetic.device)

    def hold(item: tuple[slice, np.ndarray[Any, Any]]) -> None:
        at, vectors = item
        stored[at], rounded[at] = vectors, arithmetic.rounded(unit(vectors))

    for _ in map_in_order(hold, rows.stored(ids), num_cores()):
        pass
    place = np.empty(rows.opened.record.next_id, np.int64)
    place[ids] = np.arange(len(ids))
    return _Held(ids, place, stored, rounded)


class _Looker:
    """Looks at the pairs of tasks, in several threads, and joins those at the threshold."""

    def __init__(self, held: _Held, groups: Groups, bounds: Limits, threshold: float) -> None:
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
        scores = (self._rounded(left) @ self._rounded(right).T)[: len(left), : len(right)]
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
        for first in range(0, len(left), PAIRS_AT_ONCE):
            ones, others = (each[first : first + PAIRS_AT_ONCE] for each in (left, right))
            ids = self._held.ids
            apart = self._groups.names(ids[ones]) != self._groups.names(ids[others])
            ones, others = ones[apart], others[apart]
            cosines = unit_cosines(*(torch.from_numpy(self._held.stored[each]).float() for each in (ones, others)))
            kept = cosines >= self._threshold
            self._join(ones[kept], others[kept])

    def _join(self, left: IntArray, right: IntArray) -> None:
        self._groups.join(self._held.ids[left], self._held.ids[right])

    def _rounded(self, places: IntArray) -> torch.Tensor:
        """Vectors of places, and of any others up to one of few sizes: a CPU prepares half a millisecond for each."""
        padded = np.pad(places, (0, _round_up(len(places)) - len(places)))
        return self._held.rounded.index_select(0, torch.from_numpy(padded).to(self._held.rounded.device))


def _round_up(number: int) -> int:
    """To a multiple of a number of 16 and more: by an eighth to a quarter, of larger ones."""
    step = max(16, 1 << max(0, (number - 1).bit_length() - 3))
    return -(-number // step) * step
