"""Questions to a FAISS index."""

from typing import Any

import faiss
import numpy as np

from clipindex.index.build import ivf_of
from clipindex.types import Float32Array, IntArray


def find(
    index: faiss.Index, queries: Float32Array, k: int, probes: int, allowed: np.ndarray[Any, np.dtype[np.bool_]] | None
) -> tuple[IntArray, Float32Array]:
    """Ids [Q, k] of what is nearest, -1 where less is found, and its scores by the index.

    Args:
        index: Of N vectors.
        queries: Unit vectors [Q, D].
        k: For each query.
        probes: Lists of an IVF index to look at, or nodes of a graph to keep in mind.
        allowed: Ids [N] that may be found; all by default.
    """
    scores, ids = index.search(
        np.ascontiguousarray(queries, np.float32), k, params=_parameters(index, probes, k, allowed)
    )
    return ids, scores


def find_within(
    index: faiss.Index,
    queries: Float32Array,
    least: float,
    probes: int,
    allowed: np.ndarray[Any, np.dtype[np.bool_]] | None,
) -> tuple[IntArray, IntArray, Float32Array]:
    """Query number, id and score of each vector whose score, by the index, is above `least`; see `find`."""
    limits, scores, ids = index.range_search(
        np.ascontiguousarray(queries, np.float32), least, params=_parameters(index, probes, 0, allowed)
    )
    return np.repeat(np.arange(len(queries)), np.diff(limits.astype(np.int64))), ids, scores


def _parameters(
    index: faiss.Index, probes: int, k: int, allowed: np.ndarray[Any, np.dtype[np.bool_]] | None
) -> faiss.SearchParameters:
    selector = None if allowed is None else faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=max(probes, k))
    if ivf_of(index) is None:
        return faiss.SearchParameters(sel=selector)
    inner = faiss.SearchParametersIVF(sel=selector, nprobe=probes)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=inner)
    return inner
