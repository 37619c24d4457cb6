"""The rows that lists lead to, compared and joined into groups, in bounded memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from clipindex.duplicates.copies import NO_ROW
from clipindex.duplicates.groups import Groups
from clipindex.duplicates.lists import Lists, reached
from clipindex.duplicates.pairs import Task, join_pairs
from clipindex.duplicates.reach import Search
from clipindex.duplicates.rows import OnProgress, Rows
from clipindex.nearest import Arithmetic
from clipindex.types import IntArray

REACHED_BYTES = 64
"""Of a row that reaches a list, while they are sorted."""


def join_rows(
    rows: Rows,
    search: Search,
    first: IntArray,
    threshold: float,
    arithmetic: Arithmetic,
    memory_bytes: int,
    on_progress: OnProgress,
) -> IntArray:
    """For each id [next_id] the least of the group that it is of, its own where it is alone.

    Args:
        rows: All of them.
        search: Which of them are compared.
        first: Of each id the first copy, which alone is compared.
        threshold: Cosine from which on rows are of one group.
        arithmetic: Of products.
        memory_bytes: For vectors, and again for which lists they reach: of as many lists at a time as that allows.
        on_progress: Called with what is being done, how much of it is done, and of how much.
    """
    ids = np.arange(len(first), dtype=np.int64)
    is_asked = first == ids
    total, num_lists = int(is_asked.sum()), len(search.lists.centroids)
    groups = Groups(np.where(first == NO_ROW, ids, first))
    share = memory_bytes / max(1, REACHED_BYTES * total * search.lists_a_row)
    at_once = max(1, int(num_lists * min(1, share)))
    done = 0
    for begin in range(0, num_lists, at_once):
        numbers = range(begin, min(begin + at_once, num_lists))
        reaching = _reaching(rows, search, numbers, is_asked, arithmetic, on_progress)
        tasks = _tasks(search.lists, numbers, is_asked, reaching)
        for compared in join_pairs(rows, tasks, groups, threshold, arithmetic, memory_bytes):
            done += compared
            on_progress("compare", done, total)
    return groups.names(ids)


def _reaching(
    rows: Rows,
    search: Search,
    numbers: range,
    is_asked: np.ndarray[Any, np.dtype[np.bool_]],
    arithmetic: Arithmetic,
    on_progress: OnProgress,
) -> tuple[IntArray, IntArray]:
    parts = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    done = 0
    if len(search.lists.centroids) > 1:
        for size, ids, places in reached(rows, search.lists, numbers, is_asked, search.reach, arithmetic):
            parts.append((ids, places))
            done += size
            on_progress("find lists", done, rows.opened.record.rows)
    ids, places = (np.concatenate(each) for each in zip(*parts, strict=True))
    return ids, places


def _tasks(
    lists: Lists,
    numbers: range,
    is_asked: np.ndarray[Any, np.dtype[np.bool_]],
    reaching: tuple[IntArray, IntArray],
) -> Iterator[Task]:
    """Of each list its rows among themselves, and with the rows that reach it."""
    asked = np.flatnonzero(is_asked & (lists.home >= numbers.start) & (lists.home < numbers.stop))
    members = _by_list(asked, lists.home[asked] - numbers.start, len(numbers))
    others = _by_list(reaching[0], reaching[1] - numbers.start, len(numbers))
    for inside, outside in zip(members, others, strict=True):
        if len(inside):
            yield Task(inside, None)
            yield Task(inside, outside)


def _by_list(ids: IntArray, places: np.ndarray[Any, Any], number: int) -> list[IntArray]:
    """Ids [n], in an array for each list."""
    begins = np.cumsum(np.bincount(places, minlength=number))[:-1]
    return np.split(ids[np.argsort(places, kind="stable")], begins)
