"""Exact search of class vectors, with probabilities."""

import math
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch

from clipindex.products import scratch, widened
from clipindex.types import Float32Array

SCAN_ROWS = 512
"""Queries a block of a scan: their scores against 1,000 vectors are 2 MB. Fewer pay for the interpreter, more for the
cache."""
SCAN_SCORES = 1 << 26
"""Scores a block at most, 256 MiB: a million vectors are met by 67 queries at once, which is as fast as 512. A quarter
of that costs a third of the speed, since fewer queries do not make up for reading all vectors."""
UNIT_TOLERANCE = 1e-3
"""Of a vector's length; float16 storage moves it by less."""


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
    index: faiss.IndexFlatIP, queries: np.ndarray[Any, Any], k: int, *, logit_scale: float, logit_bias: float | None
) -> Neighbours:
    """Search an index exactly, and say how probable each neighbour is among all of its vectors.

    FAISS's own search keeps K scores a query and drops the rest, but a softmax needs them all; asking for all is twelve
    times slower, and a second matrix product doubles the work. So one product serves both. Ids and cosines are those of
    `index.search`.

    Args:
        index: C unit vectors.
        queries: Unit vectors [N, D] of any float type, any number: they are taken `SCAN_ROWS` at a time, or fewer.
        k: Neighbours to keep; C where that is less.
        logit_scale: Multiplies cosines; from the model.
        logit_bias: None for softmax models (CLIP, eq. in figure 3 of arXiv:2103.00020); else added, and each logit goes
            through a sigmoid of its own (SigLIP, arXiv:2303.15343).
    """
    k = min(k, index.ntotal)
    rows = min(SCAN_ROWS, max(1, SCAN_SCORES // index.ntotal))
    blocks = [
        _scan_block(index, queries[at : at + rows], k, logit_scale, logit_bias)
        for at in range(0, max(len(queries), 1), rows)
    ]
    return Neighbours(*(np.concatenate(field) for field in zip(*blocks, strict=True)))


def _scan_block(
    index: faiss.IndexFlatIP, queries: np.ndarray[Any, Any], k: int, logit_scale: float, logit_bias: float | None
) -> Neighbours:
    scores = scratch("scores", len(queries), index.ntotal)
    np.matmul(widened(queries), stored_vectors(index).T, out=scores)
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
    # By PyTorch and to the base of two, which takes half of the time of NumPy's exp.
    others = torch.from_numpy(scores).sub_(torch.from_numpy(top)).mul_(logit_scale * math.log2(math.e)).exp2_()
    total = kept.sum(axis=1, keepdims=True) + others.sum(1, keepdim=True).numpy()
    return Neighbours(ids, cosines, kept / total)
