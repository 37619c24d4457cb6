"""Average precision of many classes, exactly, over more scores than fit into memory.

As CLIP_benchmark defines it (clip_benchmark/metrics/zeroshot_classification.py): of each class, rows are sorted by
score, the best first; the average precision is the mean, over the positives of the class, of the precision down to each
of them, and 0 where there are none; mAP is the mean over all classes.

Only places of positives enter. So rows are looked at twice: at first the positives' scores are kept, then it is counted
how many negatives are before each. Memory holds positives and one block of scores, however many rows there are.

Equal scores keep the order of their rows. CLIP_benchmark leaves theirs to an unstable sort; this order is one that a
second run repeats, and it knows nothing of the truth.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from clipindex.errors import StoreError
from clipindex.threads import map_in_order, num_cores
from clipindex.types import Float32Array, IntArray

Item = TypeVar("Item")
Given = TypeVar("Given")
Result = TypeVar("Result")

BLOCK_SCORES = 1 << 22
"""Of a block, 16 MiB, with four times as much beside it while negatives are placed."""


class ScoreBlock(NamedTuple):
    """What consecutive rows have in all classes."""

    scores: Float32Array
    """[C, n], higher is better; the block's own, to be written to."""
    classes: IntArray
    """Of each positive of these rows."""
    rows: IntArray
    """Of each positive, its row in the block."""


class AveragePrecision:
    """Places of positives among all rows; what is before them is counted block by block.

    Args:
        num_classes: C.
        classes: Of each positive.
        rows: Of each positive.
        scores: Of each positive.
        num_rows: Of all that are ranked.
    """

    def __init__(
        self, num_classes: int, classes: IntArray, rows: IntArray, scores: Float32Array, num_rows: int
    ) -> None:
        self.num_classes = num_classes
        self.num_rows = num_rows
        order = np.lexsort((rows, -scores, classes))
        self._rows, self._falling = rows[order], -scores[order]
        self.support: IntArray = np.bincount(classes, minlength=self.num_classes).astype(np.int64)
        self._ends = np.cumsum(self.support)
        self._negatives = np.zeros(len(order), np.int64)

    def place(self, first_row: int, block: ScoreBlock) -> tuple[IntArray, IntArray]:
        """Before which positives negatives of a block come first, and how many.

        Threads may do this side by side; the results are for `count`.
        """
        block.scores[block.classes, block.rows] = -np.inf
        nothing = np.empty(0, np.int64)
        found = [(nothing, nothing)]
        for one in np.flatnonzero(self.support).tolist():
            positives = slice(int(self._ends[one] - self.support[one]), int(self._ends[one]))
            falling, wanted = self._falling[positives], -block.scores[one]
            # Sorting comes first, since a search for what is sorted stays in the cache.
            ordered = np.sort(wanted)
            ordered = ordered[: np.searchsorted(ordered, falling[-1], "right")]
            places, counts, level = _place(falling, ordered)
            found.append((places + positives.start, counts))
            if len(level):
                at = np.flatnonzero(np.isin(wanted, level))
                moved, changes = _move_level(falling, self._rows[positives], wanted[at], first_row + at)
                found.append((moved + positives.start, changes))
        places, counts = (np.concatenate(field) for field in zip(*found, strict=True))
        return places, counts

    def count(self, places: IntArray, counts: IntArray) -> None:
        """Add what `place` found."""
        np.add.at(self._negatives, places, counts)

    def per_class(self) -> npt.NDArray[np.float64]:
        """Average precision of each class [C]; 0 without positives."""
        begins = np.repeat(self._ends - self.support, self.support)
        right = np.arange(1, len(begins) + 1) - begins
        total = np.concatenate([[0], np.cumsum(self._negatives)])
        before = total[1:] - total[begins]
        classes = np.repeat(np.arange(self.num_classes), self.support)
        sums = np.bincount(classes, right / (right + before), minlength=self.num_classes)
        return sums / np.maximum(self.support, 1)

    def mean(self) -> float:
        """mAP, of all classes."""
        return float(self.per_class().mean())

    def describe(self) -> list[dict[str, float | int]]:
        """Support and average precision of each class, in class order."""
        return [
            {"support": int(support), "average_precision": float(one)}
            for support, one in zip(self.support, self.per_class(), strict=True)
        ]


def measure_average_precision(
    num_classes: int,
    begin_pass: Callable[[], Iterable[Item]],
    score: Callable[[Item], ScoreBlock],
    on_rows: Callable[[int], None] = lambda rows: None,
    *,
    one_by_one: bool = False,
) -> AveragePrecision:
    """Go over rows twice, one block a core.

    Args:
        num_classes: C.
        begin_pass: Begins a pass over all rows, in the same blocks each time.
        score: What the rows of a block have in all classes; the same each time, to the last bit.
        on_rows: Called with the number of rows that were looked at, twice each.
        one_by_one: One block at a time instead, in the caller's thread: for scores of a GPU, whose memory blocks share.

    Raises:
        StoreError: The passes differ.
    """

    def positives(item: Item) -> tuple[int, IntArray, IntArray, Float32Array]:
        block = score(item)
        return block.scores.shape[1], block.classes, block.rows, block.scores[block.classes, block.rows]

    starts = [0]
    nothing = np.empty(0, np.int64)
    kept: list[tuple[IntArray, IntArray, Float32Array]] = [(nothing, nothing, np.empty(0, np.float32))]
    for count, classes, rows, scores in _in_order(positives, begin_pass(), one_by_one):
        kept.append((classes, rows + starts[-1], scores))
        starts.append(starts[-1] + count)
        on_rows(starts[-1])
    classes, rows, scores = (np.concatenate(field) for field in zip(*kept, strict=True))
    found = AveragePrecision(num_classes, classes, rows, scores, starts[-1])
    kept.clear()
    sizes = dict(zip(starts, np.diff(starts).tolist(), strict=False))

    def place(numbered: tuple[int | None, Item | None]) -> tuple[IntArray, IntArray, int]:
        first, item = numbered
        block = None if item is None else score(item)
        size = 0 if block is None else block.scores.shape[1]
        if block is None or first is None or size != sizes[first]:
            raise StoreError("the embeddings changed while they were read; run again when nothing writes to them")
        return *found.place(first, block), size

    done = starts[-1]
    numbered = zip_longest(starts[:-1], begin_pass())
    for places, counts, size in _in_order(place, numbered, one_by_one):
        found.count(places, counts)
        done += size
        on_rows(done)
    return found


def _in_order(function: Callable[[Given], Result], items: Iterable[Given], one_by_one: bool) -> Iterator[Result]:
    return map(function, items) if one_by_one else map_in_order(function, items, num_cores())


def _place(falling: Float32Array, ordered: Float32Array) -> tuple[IntArray, IntArray, Float32Array]:
    """Places among positives, how many negatives have which, and the scores at which both are.

    Args:
        falling: Of positives, the scores with their signs changed, ascending.
        ordered: The same of negatives, none of them behind all positives. At equal scores they are placed behind.
    """
    if len(falling) > len(ordered):
        places = np.searchsorted(falling, ordered, "right")
        level = ordered[falling[places - 1] == ordered]
        places, counts = np.unique(places[places < len(falling)], return_counts=True)
        return places, counts, level
    before, up_to = np.searchsorted(ordered, falling), np.searchsorted(ordered, falling, "right")
    counts = np.diff(before, prepend=0)
    places = np.flatnonzero(counts)
    return places, counts[places], falling[up_to > before]


def _move_level(
    falling: Float32Array, rows: IntArray, wanted: Float32Array, wanted_rows: IntArray
) -> tuple[IntArray, IntArray]:
    """Bring negatives [n] with scores of positives from behind those of them that have later rows to before them."""
    ends = np.searchsorted(falling, wanted, "right")
    places = _after_rows(rows, wanted_rows, np.searchsorted(falling, wanted), ends)
    moved = places < ends
    left = ends[moved & (ends < len(falling))]
    return np.concatenate([places[moved], left]), np.repeat([1, -1], [moved.sum(), len(left)])


def _after_rows(rows: IntArray, wanted: IntArray, low: IntArray, high: IntArray) -> IntArray:
    """In each range [low, high) of ascending `rows`, the first place whose row is not before the wanted one."""
    low, high = low.copy(), high.copy()
    while (low < high).any():
        middle = (low + high) // 2
        is_open = low < high
        is_before = is_open & (rows[np.minimum(middle, len(rows) - 1)] < wanted)
        low = np.where(is_before, middle + 1, low)
        high = np.where(is_open & ~is_before, middle, high)
    return low
