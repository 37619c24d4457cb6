"""Inner-product indexes in FAISS, and exact search of them."""

import threading
from typing import NamedTuple

import faiss
import numpy as np

from clipindex.types import Float32Array

SCAN_ROWS = 1024
"""Queries a block of a scan: smaller blocks spend more on the interpreter than they save in the cache."""
UNIT_TOLERANCE = 1e-3
"""Of a vector's length; float16 storage moves it by less."""


_memory = threading.local()


class Neighbours(NamedTuple):
    """The K best of an index for each of N queries, best first."""

    ids: np.ndarray[tuple[int, int], np.dtype[np.int32]]
    """[N, K]."""
    cosines: Float32Array
    """[N, K]."""
    probabilities: Float32Array
    """[N, K], over all vectors of the index."""


def flat_index(vectors: Float32Array) -> faiss.IndexFlatIP:
    """An exact inner-product index of unit vectors [C, D], so that inner product is cosine."""
    norms = np.linalg.norm(vectors, axis=1)
    assert np.all(np.abs(norms - 1) < UNIT_TOLERANCE), "vectors of an inner-product index must have unit norm"
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors, np.float32))
    return index


def stored_vectors(index: faiss.IndexFlatIP) -> Float32Array:
    """The vectors [C, D] that an index holds: a view, valid while the index lives."""
    flat: Float32Array = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d)
    return flat.reshape(index.ntotal, index.d)


def scan(
    index: faiss.IndexFlatIP, queries: Float32Array, k: int, *, logit_scale: float, logit_bias: float | None
) -> Neighbours:
    """Search an index exactly, and say how probable each neighbour is among all of its vectors.

    FAISS's own search keeps K scores a query and drops the rest, but a softmax needs them all; asking for all is twelve
    times slower, and a second matrix product doubles the work. So one product serves both. Ids and cosines are those of
    `index.search`.

    Args:
        index: C unit vectors.
        queries: Unit vectors [N, D]; a few hundred at a time are fastest.
        k: Neighbours to keep, at most C.
        logit_scale: Multiplies cosines; from the model.
        logit_bias: None for softmax models (CLIP, eq. in figure 3 of arXiv:2103.00020); else added, and each logit goes
            through a sigmoid of its own (SigLIP, arXiv:2303.15343).
    """
    scores = _product(queries, stored_vectors(index))
    rows = np.arange(len(queries))
    ids = np.empty((len(queries), k), np.int32)
    cosines = np.empty((len(queries), k), np.float32)
    for place in range(k):  # argmax runs at memory speed; a partial sort costs more than five of them
        best = scores.argmax(axis=1)
        ids[:, place], cosines[:, place] = best, scores[rows, best]
        scores[rows, best] = -np.inf
    if logit_bias is not None:
        # The logistic function, in the form that cannot overflow.
        return Neighbours(
            ids, cosines, (0.5 + 0.5 * np.tanh((logit_scale * cosines + logit_bias) / 2)).astype(np.float32)
        )
    top = cosines[:, :1]
    kept = np.exp(logit_scale * (cosines - top))
    scores -= top
    scores *= logit_scale
    # As a product, since NumPy sums along short rows at a third of that speed.
    others = np.exp(scores, out=scores) @ np.ones((scores.shape[1], 1), np.float32)
    total = kept.sum(axis=1, keepdims=True) + others
    return Neighbours(ids, cosines, kept / total)


def _product(queries: Float32Array, vectors: Float32Array) -> Float32Array:
    """Scores [N, C], in memory that a thread uses again: faulting fresh pages in costs a fifth of the product."""
    wanted = len(queries) * len(vectors)
    memory: Float32Array | None = getattr(_memory, "scores", None)
    if memory is None or memory.size < wanted:
        memory = _memory.scores = np.empty(wanted, np.float32)
    scores: Float32Array = np.matmul(queries, vectors.T, out=memory[:wanted].reshape(len(queries), len(vectors)))
    return scores
