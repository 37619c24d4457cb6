"""How far approximate classification agrees with exact classification, measured on rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from clipindex.index.approximate import ApproximateIndex, scan_approximately
from clipindex.index.exact import scan


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Of the rows that were classified both ways."""

    rows: int
    k: int
    """Classes that were compared for each row."""
    same_top1: float
    """Share of the rows whose best class is the same."""
    same_top_k: float
    """Share of the rows whose best `k` classes are the same, in any order."""
    most_probability_off: float
    """Largest deviation of a probability, of classes among the best k both ways."""


def measure_agreement(
    index: ApproximateIndex,
    embeddings: np.ndarray[Any, Any],
    k: int,
    *,
    logit_scale: float,
    logit_bias: float | None,
) -> Agreement | None:
    """Classify unit embeddings [n, D] both ways and compare the best `k`; None of no rows."""
    if not len(embeddings):
        return None
    exact = scan(index.exact, embeddings, k, logit_scale=logit_scale, logit_bias=logit_bias)
    found = scan_approximately(index, embeddings, k, logit_scale=logit_scale, logit_bias=logit_bias)
    num_shared, off = [], [0.0]
    for row, pair in enumerate(zip(found.ids, exact.ids, strict=True)):
        shared, ours, theirs = np.intersect1d(*pair, assume_unique=True, return_indices=True)
        num_shared.append(len(shared))
        off += np.abs(found.probabilities[row, ours] - exact.probabilities[row, theirs]).tolist()
    return Agreement(
        rows=len(embeddings),
        k=exact.ids.shape[1],
        same_top1=float((found.ids[:, 0] == exact.ids[:, 0]).mean()),
        same_top_k=float((np.array(num_shared) == exact.ids.shape[1]).mean()),
        most_probability_off=max(off),
    )
