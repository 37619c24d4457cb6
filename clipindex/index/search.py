"""Questions to a FAISS index."""

from typing import Any

import faiss
import numpy as np

from clipindex.index.build import ivf_of
from clipindex.index.lists import ids_in
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


def lists_of(index: faiss.Index, num_ids: int) -> tuple[Float32Array, np.ndarray[Any, np.dtype[np.int32]]]:
    """Centroids [L, D] of an index's lists, and the list [num_ids] of each id, -1 of those that it does not hold.

    All are in one list about the origin where an index has none.
    """
    ivf = ivf_of(index)
    if ivf is None:
        return np.zeros((1, index.d), np.float32), np.zeros(num_ids, np.int32)
    centroids: Float32Array = faiss.downcast_index(ivf.quantizer).reconstruct_n(0, ivf.nlist)
    if isinstance(index, faiss.IndexPreTransform):
        centroids = index.chain.at(0).reverse_transform(centroids)
    home = np.full(num_ids, -1, np.int32)
    for number in range(ivf.nlist):
        ids = ids_in(ivf.invlists, number)
        home[ids[(ids >= 0) & (ids < num_ids)]] = number
    return centroids, home


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
