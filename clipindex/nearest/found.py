"""What may be found, and what was."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipindex.index.lists import Mask
from clipindex.types import Float32Array, IntArray


class Nearest(NamedTuple):
    """The k nearest rows of each of Q queries, best first."""

    cosines: Float32Array
    """[Q, k]; -inf where there are fewer rows."""
    shards: IntArray
    """[Q, k], places in `names`."""
    rows: IntArray
    """[Q, k], row numbers within their shards."""
    names: list[str]
    """Of shards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Filter:
    """Which rows may be found: all by default."""

    labels: tuple[int, ...] = ()
    """One of these, as the row's label or among its labels."""
    caption: str | None = None
    """Part of the caption, whatever its case."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What it looks at."""
        return (*(("label", "labels") if self.labels else ()), *(("caption",) if self.caption is not None else ()))

    def passing(self, columns: Mapping[str, pa.Array]) -> Mask | None:
        """Rows [n] that may be found; None where all may."""
        masks = []
        if self.labels:
            wanted = pa.array(self.labels, pa.int64())
            single = pc.fill_null(pc.is_in(columns["label"].cast(pa.int64()), wanted), False)
            masks.append(pc.or_(single, pa.array(_has_any(columns["labels"], wanted))))
        if self.caption is not None:
            masks.append(pc.match_substring(columns["caption"], self.caption, ignore_case=True))
        return np.logical_and.reduce([np.asarray(pc.fill_null(mask, False)) for mask in masks]) if masks else None


def _has_any(lists: pa.ListArray, wanted: pa.Array) -> Mask:
    """Which lists [n] hold one of the numbers that are wanted."""
    found = np.zeros(len(lists), np.bool_)
    rows = pc.list_parent_indices(lists).to_numpy()
    found[rows[np.asarray(pc.is_in(lists.flatten().cast(pa.int64()), wanted))]] = True
    return found
