"""The rows that several encoders are compared on: which are for what, and where each directory has them.

What is drawn is drawn once, among the common rows in the order of their keys. So it depends neither on how a directory
is stored nor on which is named first.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from clipindex.allocator import share_one_arena
from clipindex.errors import ClassesError
from clipindex.probing.join import Joined, join
from clipindex.probing.lists import LISTS_COLUMN, label_kinds
from clipindex.probing.rows import Held, Ids, Rows, Streamed, find_classes, hold_if_fits, split, take_part

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedTask:
    """Which rows are for what, the same for all directories."""

    joined: Joined
    classes: tuple[int, ...]
    class_ids: Ids
    """Of the joined rows."""
    training: Ids
    """Numbers among the joined rows."""
    tested: Joined
    """Where the test rows are: `joined` itself, or rows of other directories."""
    tested_ids: Ids
    """Class ids of its rows."""
    test: Ids
    """Numbers among its rows."""
    unseen: dict[int, int]
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Aligned:
    """Joined rows as one directory has them."""

    rows: Rows
    places: Ids | None
    """Number among `rows` of each joined row; None where they are held in the order of the joined rows."""

    def numbers(self, chosen: Ids) -> Ids:
        """Of joined rows among `rows`, in the same order."""
        return chosen if self.places is None else self.places[chosen]

    def ascending(self, chosen: Ids) -> Ids:
        """The same, in an order in which they may be passed over."""
        return chosen if self.places is None else np.sort(self.places[chosen])


def pose_shared_task(paths: Sequence[Path], tests: Sequence[Path], held_out: float, seed: int) -> SharedTask:
    """Join the rows, say which are left out, and decide what each is for.

    Args:
        paths: Directories to learn from.
        tests: Directories to test on, one for each; or none.
        held_out: The fraction of each class that is tested on where there are none.
        seed: Of what is held out.

    Raises:
        ClassesError: Labels cannot define a probe, or differ between directories.
        StoreError: Directories have no row in common, or a file is damaged.
    """
    share_one_arena()
    joined = _join(paths)
    classes = find_classes(joined.labels)
    class_ids = take_part(joined.labels, classes)[0].class_ids
    if not tests:
        training, test = split(class_ids, held_out, seed)
        return SharedTask(
            joined=joined,
            classes=classes,
            class_ids=class_ids,
            training=training,
            tested=joined,
            tested_ids=class_ids,
            test=test,
            unseen={},
            source=f"{held_out:g} of the common rows, held out",
        )
    tested = _join(tests)
    part, unseen = take_part(tested.labels, classes)
    return SharedTask(
        joined=joined,
        classes=classes,
        class_ids=class_ids,
        training=np.arange(len(class_ids)),
        tested=tested,
        tested_ids=part.class_ids,
        test=np.arange(len(part.class_ids)),
        unseen=unseen,
        source=", ".join(map(str, tests)),
    )


def _join(folders: Sequence[Path]) -> Joined:
    try:
        joined = join(folders)
    except ClassesError:
        if label_kinds(folders) != {LISTS_COLUMN}:
            raise
        where = ", ".join(map(str, folders))
        raise ClassesError(
            f"{where}: the rows have lists of labels, and compare knows rows of one class only"
        ) from None
    _say_what_is_left_out(joined)
    return joined


def _say_what_is_left_out(joined: Joined) -> None:
    for side in joined.sides:
        for number, keys, what in (
            (side.beyond, side.beyond_keys, f"of its {side.rows:,} rows are not in every directory, and left out"),
            (side.lacking, side.lacking_keys, "rows of other directories are not in it, and left out"),
        ):
            if number:
                more = ", …" if number > len(keys) else ""
                log.warning("%s: %s %s: %s%s", side.folder, f"{number:,}", what, ", ".join(keys), more)
        if side.labels_lacking:
            log.info("%s: %s rows take their labels from another directory", side.folder, f"{side.labels_lacking:,}")
    if joined.unlabelled:
        log.warning("%s common rows have no label, and are left out", f"{joined.unlabelled:,}")


def align(
    joined: Joined,
    at: int,
    class_ids: Ids,
    vectors: str,
    features: str,
    device: torch.device,
    memory_bytes: int | None,
    *,
    may_hold: bool,
) -> Aligned:
    """The joined rows of the directory with number `at`.

    Args:
        joined: The rows.
        at: Which directory.
        class_ids: Of the rows [n].
        vectors: The column of them.
        features: 'raw' or 'normalized'.
        device: Where they go.
        memory_bytes: See `rows.hold_if_fits`.
        may_hold: Whether to hold them where they fit: many passes go over them.
    """
    part, places = joined.part(at, class_ids)
    part = replace(part, vectors=vectors)
    stored = Streamed([part], features, device)
    rows: Rows = hold_if_fits(stored, memory_bytes, device, chosen=places) if may_hold else stored
    return Aligned(rows=rows, places=None if isinstance(rows, Held) else places)
