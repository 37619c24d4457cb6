"""Search of very many class vectors by a bf16 product, the best of which are then computed in float32.

A CPU with bf16 instructions multiplies such matrices four times as fast as float32 ones. What that costs is kept small
by three things. The mean of all vectors, which is most of each, is taken out before they are rounded: it moves all
scores of a query alike. The cosines of the best are computed again in float32. And the softmax is over all vectors: the
best with their float32 cosines, the others with their bf16 scores, whose errors average out.
"""

import math
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch

from clipindex.index.exact import SCAN_ROWS, SCAN_SCORES, Neighbours, stored_vectors
from clipindex.products import scratch, widened

TILE = 2048
"""Vectors multiplied at once: scores of 512 queries are 2 MB, which stay in the cache while they are looked at."""
GROUP = 8
"""Scores of which only the best is looked at first."""
LEAST_CANDIDATES = 16
"""Vectors whose cosines are computed in float32; of more than 8 neighbours, twice as many as those."""


class ApproximateIndex(NamedTuple):
    """An exact index, and its vectors in bf16."""

    exact: faiss.IndexFlatIP
    """C unit vectors."""
    mean: torch.Tensor
    """[D], of the vectors."""
    centred: torch.Tensor
    """[C, D] in bf16, less the mean; zeros after those, up to whole tiles."""


def approximate_index(exact: faiss.IndexFlatIP) -> ApproximateIndex:
    """Round the vectors of an exact index; takes half of its memory again."""
    vectors = torch.from_numpy(stored_vectors(exact))
    mean = vectors.mean(dim=0)
    centred = torch.zeros(-(-len(vectors) // TILE) * TILE, exact.d, dtype=torch.bfloat16)
    for first in range(0, len(vectors), TILE):
        part = vectors[first : first + TILE]
        centred[first : first + len(part)] = part - mean
    return ApproximateIndex(exact, mean, centred)


def scan_approximately(
    index: ApproximateIndex,
    queries: np.ndarray[Any, Any],
    k: int,
    *,
    logit_scale: float,
    logit_bias: float | None,
) -> Neighbours:
    """Search nearly as `exact.scan` does, with the same arguments; the cosines of what is found are exact."""
    rows = min(SCAN_ROWS, max(1, SCAN_SCORES // len(index.centred)))
    blocks = [
        _scan_block(index, queries[at : at + rows], k, logit_scale, logit_bias)
        for at in range(0, max(len(queries), 1), rows)
    ]
    return Neighbours(*(np.concatenate(field) for field in zip(*blocks, strict=True)))


def _scan_block(
    index: ApproximateIndex, queries: np.ndarray[Any, Any], k: int, logit_scale: float, logit_bias: float | None
) -> Neighbours:
    k = min(k, index.exact.ntotal)
    wide = torch.from_numpy(widened(queries))
    exponent = logit_scale * math.log2(math.e)
    scores, bests, top, others = _product(index, wide.bfloat16(), exponent)
    ids = _candidates(scores, bests, min(max(LEAST_CANDIDATES, 2 * k), index.exact.ntotal))
    vectors = torch.from_numpy(stored_vectors(index.exact))
    cosines = torch.einsum("nkd,nd->nk", vectors[ids], wide)
    best, order = cosines.topk(k, dim=1)
    found = ids.gather(1, order).to(torch.int32).numpy()
    if logit_bias is not None:
        return Neighbours(found, best.numpy(), torch.sigmoid(logit_scale * best + logit_bias).numpy())
    offset = (wide @ index.mean + top)[:, None]
    rough = torch.exp2((_scores_at(scores, ids) - top[:, None]) * exponent).sum(dim=1)
    exact = torch.exp2((cosines - offset) * exponent).sum(dim=1)
    total = (others - rough).clamp_min(0) + exact
    return Neighbours(found, best.numpy(), (torch.exp2((best - offset) * exponent) / total[:, None]).numpy())


def _product(
    index: ApproximateIndex, queries: torch.Tensor, exponent: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """All scores [tiles, n, TILE] and what follows from them for each of n queries.

    The best [n, groups] of each group, which is what stands in the same place of the eighths of a tile, since maxima
    over that run at memory speed; the best of all [n]; and the sum [n] of 2^(exponent (score - best)).
    """
    num_tiles, shape = len(index.centred) // TILE, (len(queries), TILE)
    memory = scratch("rough", num_tiles, len(queries) * TILE // 2)
    scores = torch.from_numpy(memory).view(torch.bfloat16).view(num_tiles, *shape)
    bests = torch.empty(len(queries), num_tiles, TILE // GROUP)
    tops, sums = torch.empty(len(queries), num_tiles), torch.empty(len(queries), num_tiles)
    powers = torch.from_numpy(scratch("powers", *shape))
    for at, tile in enumerate(scores):
        torch.mm(queries, index.centred[at * TILE : (at + 1) * TILE].T, out=tile)
        tile[:, index.exact.ntotal - at * TILE :] = -torch.inf
        bests[:, at] = tile.view(len(queries), GROUP, -1).amax(dim=1)
        tops[:, at] = bests[:, at].amax(dim=1)
        sums[:, at] = powers.copy_(tile).sub_(tops[:, at, None]).mul_(exponent).exp2_().sum(dim=1)
    top = tops.amax(dim=1)
    return scores, bests.flatten(1), top, (sums * torch.exp2((tops - top[:, None]) * exponent)).sum(dim=1)


def _candidates(scores: torch.Tensor, bests: torch.Tensor, number: int) -> torch.Tensor:
    """Places [n, number] of the best scores in the groups that have the best."""
    groups = bests.topk(min(number, bests.shape[1]), dim=1).indices
    first = groups // (TILE // GROUP) * TILE + groups % (TILE // GROUP)
    members = (first[:, :, None] + torch.arange(0, TILE, TILE // GROUP)).flatten(1)
    return members.gather(1, _scores_at(scores, members).topk(number, dim=1).indices)


def _scores_at(scores: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Scores [n, m] at each query's own places [n, m]."""
    return scores[places // TILE, torch.arange(len(places))[:, None], places % TILE].float()
