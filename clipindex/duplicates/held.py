"""Rows in memory, as many as it holds, for what is to be done with some of them at a time."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from clipindex.duplicates.rows import Rows, unit
from clipindex.nearest import Arithmetic
from clipindex.threads import map_in_order, num_cores
from clipindex.types import IntArray

Result = TypeVar("Result")

DEVICE_SHARE = 4
"""Of the memory that a CUDA device has free, one part in so many is for vectors."""


class Task(NamedTuple):
    """Rows to compare."""

    ones: IntArray
    """Ids [m]."""
    others: IntArray | None
    """Ids [n], each with all of the ones; None: the ones among themselves."""


class Held(NamedTuple):
    """Rows in memory."""

    ids: IntArray
    """[n], ascending."""
    place: IntArray
    """[next_id]: of each id among those; no number of others."""
    stored: np.ndarray[Any, Any]
    """Vectors [n, D] in the directory's dtype."""
    rounded: torch.Tensor
    """The same, to be multiplied."""

    def padded(self, places: IntArray) -> torch.Tensor:
        """Vectors of places, and of any others up to one of few numbers: a CPU prepares half a millisecond for each."""
        step = max(16, 1 << max(0, (len(places) - 1).bit_length() - 3))
        padded = np.pad(places, (0, -len(places) % step))
        return self.rounded.index_select(0, torch.from_numpy(padded).to(self.rounded.device))


def while_held(
    rows: Rows,
    tasks: Iterable[Task],
    arithmetic: Arithmetic,
    memory_bytes: int,
    work: Callable[[Held, list[Task]], Iterator[Result]],
) -> Iterator[Result]:
    """Work on tasks while all of their rows are in memory; on those that are too large for it in several.

    Args:
        rows: All of them.
        tasks: Those that come one after the other should have rows in common, which are read once then.
        arithmetic: By which they will be multiplied.
        memory_bytes: For vectors.
        work: Has nothing of the rows once it is done: then others are read, and memory is for those alone.
    """
    most = most_rows(rows, arithmetic, memory_bytes)
    place = np.empty(rows.opened.record.next_id, np.int64)
    for ids, some in _loads(split(tasks, most // 2, most // 2), len(place), most):
        place[ids] = np.arange(len(ids))
        yield from work(_read(rows, ids, place, arithmetic), some)


def most_rows(rows: Rows, arithmetic: Arithmetic, memory_bytes: int) -> int:
    """How many fit into memory, and into what a CUDA device has free of its own, which others may use as well."""
    stored, rounded = (rows.reader.dim * dtype.itemsize for dtype in (rows.reader.dtype, arithmetic.dtype))
    most = memory_bytes // (stored + rounded)
    if arithmetic.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(arithmetic.device)
        most = min(memory_bytes // stored, free // DEVICE_SHARE // rounded)
    return max(most, 2)


def split(tasks: Iterable[Task], piece: int, block: int) -> Iterator[Task]:
    """The same pairs in tasks of at most so many ones, and others."""
    for ones, others in tasks:
        for first in range(0, len(ones), piece):
            some = ones[first : first + piece]
            rest = ones[first + piece :] if others is None else others
            if others is None:
                yield Task(some, None)
            for begin in range(0, len(rest), block):
                yield Task(some, rest[begin : begin + block])


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


def _read(rows: Rows, ids: IntArray, place: IntArray, arithmetic: Arithmetic) -> Held:
    stored = np.empty((len(ids), rows.reader.dim), rows.reader.dtype)
    rounded = torch.empty(stored.shape, dtype=arithmetic.dtype, device=arithmetic.device)

    def hold(item: tuple[slice, np.ndarray[Any, Any]]) -> None:
        at, vectors = item
        stored[at] = vectors
        rounded[at] = arithmetic.rounded(unit(vectors))

    for _ in map_in_order(hold, rows.stored(ids), num_cores()):
        pass
    return Held(ids, place, stored, rounded)
