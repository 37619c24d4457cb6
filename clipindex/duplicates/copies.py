"""Copies bit for bit, of which only the first is searched for: a million of one image would each find a million."""

from typing import Any

import numpy as np

from clipindex.duplicates.rows import PAIRS_AT_ONCE, Rows
from clipindex.threads import map_in_order, num_cores
from clipindex.types import IntArray

NO_ROW = -1


def first_copies(rows: Rows) -> IntArray:
    """For each id [next_id] that of the first row with the same vector, bit for bit; `NO_ROW` where it has gone."""
    hashes = np.zeros(rows.opened.record.next_id, np.uint64)
    first = np.full(len(hashes), NO_ROW, np.int64)
    hashed = map_in_order(lambda each: (each[0], _hashes(each[1].embedding)), rows.batches(), num_cores())
    for ids, found in hashed:
        hashes[ids], first[ids] = found, ids
    alive = np.flatnonzero(first != NO_ROW)
    _, place, inverse = np.unique(hashes[alive], return_index=True, return_inverse=True)
    likely = alive[place][inverse]
    copies = np.flatnonzero(likely != alive)
    for begin in range(0, len(copies), PAIRS_AT_ONCE):
        some = copies[begin : begin + PAIRS_AT_ONCE]
        same = _same(rows, alive[some], likely[some])
        first[alive[some[same]]] = likely[some[same]]
    return first


def _hashes(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Of vectors [n, D]: a sum of their words, each by a factor of its own."""
    bytes_ = vectors.view(np.uint8).reshape(len(vectors), -1)
    words = bytes_.view(np.uint64 if bytes_.shape[1] % 8 == 0 else f"u{vectors.itemsize}")
    factors = np.random.default_rng(0).integers(0, 2**63, words.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
    mixed = words * factors
    hashes: np.ndarray[Any, np.dtype[np.uint64]] = (mixed ^ (mixed >> np.uint64(29))).sum(axis=1)
    return hashes


def _same(rows: Rows, ones: IntArray, others: IntArray) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which pairs of ids are equal indeed: hashes of billions of vectors may meet."""
    same: np.ndarray[Any, np.dtype[np.bool_]] = (_bytes(rows, ones) == _bytes(rows, others)).all(axis=1)
    return same


def _bytes(rows: Rows, ids: IntArray) -> np.ndarray[Any, np.dtype[np.uint8]]:
    distinct, inverse = np.unique(ids, return_inverse=True)
    stored = np.concatenate([vectors for _, vectors in rows.stored(distinct)])
    return stored.view(np.uint8).reshape(len(stored), -1)[inverse]
