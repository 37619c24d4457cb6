"""Classifying among very many classes: the exact product beside the approximate one.

Physics: 512 dimensions are 1,024 FLOP for a row and a class, so both are bound by a matrix product: of float32, or of
bf16 where the CPU has instructions for it. Expected: the ratio of the two products, 3 to 4 on two cores of Zen 5, less
what it takes to look at the scores: 0.8 of it at 100,000 classes.
"""

import collections
import functools
import statistics
import time

import numpy as np
from reporting import Row, arguments, finish

from clipindex.agreement import measure_agreement
from clipindex.index.approximate import approximate_index, scan_approximately
from clipindex.index.exact import flat_index, scan
from clipindex.threads import map_in_order, num_cores
from clipindex.types import Float32Array

DIM = 512
TOP = 5
SCALE = 100.0
CLUSTERS = 500
AGREEMENT_ROWS = 1000
BLOCK = 1 << 14


def main() -> None:
    """Measure, print and, with --save, keep."""
    parser = arguments(__doc__)
    parser.add_argument("--classes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--scores", type=float, default=4e8, help="rows x classes of a round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = [row for number in options.classes for row in _measure(number, int(options.scores), options.rounds)]
    finish("vocabulary", rows, options.save)


def _measure(num_classes: int, num_scores: int, rounds: int) -> list[Row]:
    """Median rows/s of both ways, taken in turns, on all cores; and how far they agree."""
    rng = np.random.default_rng(0)
    images = _clip_like(rng, max(num_scores // num_classes, AGREEMENT_ROWS), gap=0.75).astype(np.float16)
    index = approximate_index(flat_index(_clip_like(rng, num_classes, gap=0.9)))
    ways = {"exact": (scan, index.exact), "approximate": (scan_approximately, index)}
    seconds: dict[str, list[float]] = {what: [] for what in ways}
    for _ in range(rounds + 1):
        for what, (way, among) in ways.items():
            search = functools.partial(way, among, k=TOP, logit_scale=SCALE, logit_bias=None)
            started = time.perf_counter()
            collections.deque(map_in_order(search, np.array_split(images, 2 * num_cores()), num_cores()), 0)
            seconds[what].append(time.perf_counter() - started)
    rates = {what: len(images) / statistics.median(taken[1:]) for what, taken in seconds.items()}
    found = measure_agreement(index, images[:AGREEMENT_ROWS], TOP, logit_scale=SCALE, logit_bias=None)
    assert found is not None
    return [
        {
            "classes": num_classes,
            "search": what,
            "rows_per_s": round(rate),
            "over exact": round(rate / rates["exact"], 2),
            "same best": found.same_top1 if what == "approximate" else 1.0,
            "same best 5": found.same_top_k if what == "approximate" else 1.0,
            "probability off by": round(found.most_probability_off, 5) if what == "approximate" else 0.0,
        }
        for what, rate in rates.items()
    ]


def _clip_like(rng: np.random.Generator, number: int, gap: float) -> Float32Array:
    """Unit vectors [n, D] in clusters that images and texts share, each around a mean of its own: the modality gap."""
    shared = np.random.default_rng(1)
    scales = np.arange(1, DIM + 1) ** -0.5
    scales /= np.linalg.norm(scales)
    centres = shared.normal(size=(CLUSTERS, DIM)) * scales
    mean = np.random.default_rng(int(100 * gap)).normal(size=DIM)
    vectors = np.empty((number, DIM), np.float32)
    for first in range(0, number, BLOCK):
        part = vectors[first : first + BLOCK]
        noise = rng.normal(size=part.shape) * scales
        part[:] = gap * mean / np.linalg.norm(mean) + 0.4 * centres[rng.integers(0, CLUSTERS, len(part))] + 0.4 * noise
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


if __name__ == "__main__":
    main()
