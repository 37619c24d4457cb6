"""The rows that lists lead to, compared and joined into groups: a bounded number of vectors at a time.

Of every row, whatever the bound, some numbers are in memory as well: its id, its list, its group and its first copy.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from clipindex.duplicates.copies import NO_ROW
from clipindex.duplicates.groups import Groups
from clipindex.duplicates.held import Task
from clipindex.duplicates.lists import reached
from clipindex.duplicates.pairs import join_pairs
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
        memory_bytes: For vectors, and again for which lists they reach: rows of as many lists at a time as that allows.
        on_progress: Called with what is being done, how much of it is done, and of how much.
    """
    ids = np.arange(len(first), dtype=np.int64)
    asked = np.flatnonzero(first == ids)
    num_lists = len(search.lists.centroids)
    members = _by_list(asked, search.lists.home[asked], num_lists)
    groups = Groups(np.where(first == NO_ROW, ids, first))
    share = memory_bytes / max(1, REACHED_BYTES * len(asked) * search.lists_a_row)
    at_once = max(1, int(num_lists * min(1, share)))
    reach_done = done = 0
    for begin in range(0, num_lists, at_once):
        parts = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        homes = members[begin : begin + at_once] if num_lists > 1 else []
        for size, some, places in reached(rows, search.lists, homes, search.reach, arithmetic, memory_bytes):
            parts.append((some, places))
            reach_done += size
            on_progress("find lists", reach_done, len(asked))
        some, places = (np.concatenate(each) for each in zip(*parts, strict=True))
        reaching = _by_list(some, places, num_lists)
        tasks = _tasks(members, reaching, range(begin, begin + at_once))
        for compared in join_pairs(rows, tasks, groups, threshold, arithmetic, memory_bytes):
            done += compared
            on_progress("compare", done, len(asked))
    return groups.names(ids)


def _tasks(members: list[IntArray], reaching: list[IntArray], whole: range) -> Iterator[Task]:
    """The rows of each list with those that reach it; and some lists' rows among themselves."""
    for at, (inside, outside) in enumerate(zip(members, reaching, strict=True)):
        if len(inside) and at in whole:
            yield Task(inside, None)
        if len(inside) and len(outside):
            yield Task(inside, outside)


def _by_list(ids: IntArray, places: np.ndarray[Any, Any], number: int) -> list[IntArray]:
    """Ids [n], in an array for each list."""
    begins = np.cumsum(np.bincount(places, minlength=number))[:-1]
    return np.split(ids[np.argsort(places, kind="stable")], begins)
