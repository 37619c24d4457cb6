"""How far approximate classification agrees with exact classification, measured on rows.

Classes of one cosine are one here: names that a model cannot tell apart have no order.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from clipindex.index.approximate import ApproximateIndex, scan_approximately
from clipindex.index.exact import scan

SAME = 1e-6
"""Cosines this near are one: sums in float32, in another order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Of the rows that were classified both ways."""

    rows: int
    k: int
    """Classes that were compared for each row."""
    same_top1: float
    """Share of the rows whose best class is the same."""
    same_top_k: float
    """Share of the rows whose best `k` classes are the same."""
    most_probability_off: float
    """Largest deviation of a probability, of the best k at their places."""


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
    as_near = found.cosines >= exact.cosines - SAME
    return Agreement(
        rows=len(embeddings),
        k=exact.ids.shape[1],
        same_top1=float(as_near[:, 0].mean()),
        same_top_k=float(as_near.all(axis=1).mean()),
        most_probability_off=float(np.abs(found.probabilities - exact.probabilities).max()),
    )
