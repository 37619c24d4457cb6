"""Classification and retrieval metrics as CLIP_benchmark defines them.

They stand in clip_benchmark/metrics/zeroshot_classification.py and zeroshot_retrieval.py.

And what says how far to trust them: confidence intervals, calibration, which classes are taken for which.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

CALIBRATION_BINS = 15
"""As in Guo et al. 2017."""
_Z_95 = 1.959964
"""Of the normal distribution, 95 % lie within as many standard deviations."""


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """A 95 % confidence interval of a proportion: Wilson's score interval (Wilson 1927, JASA 22).

    Unlike the textbook's it stays within [0, 1] and holds for few samples and for proportions near the ends.
    """
    share, spread = hits / total, _Z_95**2 / total
    centre = (share + spread / 2) / (1 + spread)
    half = _Z_95 * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    # Rounding may put a bound on the wrong side of the share itself.
    return min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share)


def calibrate(
    counts: npt.NDArray[Any], hits: npt.NDArray[Any], confidence: npt.NDArray[Any]
) -> tuple[float, list[tuple[int, float, float]]]:
    """The expected calibration error: the mean over samples of |share of hits - mean confidence| of the sample's bin.

    Guo et al. 2017 (arXiv:1706.04599), equation 5; bins are without their lower bounds.

    Args:
        counts: Samples in each bin.
        hits: Of them, how many were right.
        confidence: Sums of what was said of them.

    Returns:
        The error, 0 without samples; and of each bin that holds some their number, share of hits and mean confidence.
    """
    filled = counts > 0
    number, share, mean = counts[filled], hits[filled] / counts[filled], confidence[filled] / counts[filled]
    error = float((np.abs(share - mean) * number).sum() / number.sum()) if filled.any() else 0.0
    return error, [(int(each), float(hit), float(sure)) for each, hit, sure in zip(number, share, mean, strict=True)]


def mcnemar(only_first: int, only_second: int) -> float:
    """How probable it is that two classifiers, equally good, differ as much or more on the same samples.

    The exact two-sided form of McNemar's test (McNemar 1947, Psychometrika 12): of the samples that only one of them
    gets right, which of the two it is would be a fair coin's throw, so the counts are binomial with 1/2.

    Args:
        only_first: Samples that only the first gets right.
        only_second: Samples that only the second gets right.
    """
    thrown, fewer = only_first + only_second, min(only_first, only_second)
    log_term = math.lgamma(thrown + 1) - math.lgamma(fewer + 1) - math.lgamma(thrown - fewer + 1)
    term = total = 1.0  # relative to the largest, that of `fewer`
    for count in range(fewer, 0, -1):
        term *= count / (thrown - count + 1)
        total += term
        if term < 1e-17 * total:
            break
    return min(1.0, 2 * math.exp(log_term - thrown * math.log(2)) * total)


class ClassificationCounts:
    """Counts from which the metrics follow; batches are added, and nothing of them is kept."""

    def __init__(self, num_classes: int) -> None:
        self.support = np.zeros(num_classes, np.int64)
        self.hits_1 = np.zeros(num_classes, np.int64)
        self.hits_5 = np.zeros(num_classes, np.int64)
        self._pairs = np.empty(0, np.int64)  # label * C + best class, those that occur: of C x C most never do
        self._pair_counts = np.empty(0, np.int64)
        self._bin_counts = np.zeros(CALIBRATION_BINS, np.int64)
        self._bin_hits = np.zeros(CALIBRATION_BINS, np.int64)
        self._bin_confidence = np.zeros(CALIBRATION_BINS)

    def add(
        self,
        labels: npt.NDArray[np.integer[Any]],
        ids: npt.NDArray[np.integer[Any]],
        confidence: npt.NDArray[np.floating[Any]] | None = None,
    ) -> None:
        """Count a batch.

        Args:
            labels: [n].
            ids: Predicted classes [n, K], best first; K is at least min(5, C).
            confidence: The probability given to the best class [n]; `calibration` and `confusion` need it.
        """
        num_classes = len(self.support)
        hits = ids[:, :5] == labels[:, None]
        self.support += np.bincount(labels, minlength=num_classes)
        self.hits_1 += np.bincount(labels[hits[:, 0]], minlength=num_classes)
        self.hits_5 += np.bincount(labels[hits.any(axis=1)], minlength=num_classes)
        if confidence is None:
            return
        pairs = np.concatenate([self._pairs, labels.astype(np.int64) * num_classes + ids[:, 0]])
        weights = np.concatenate([self._pair_counts, np.ones(len(labels), np.int64)])
        self._pairs, places = np.unique(pairs, return_inverse=True)
        self._pair_counts = np.bincount(places, weights).astype(np.int64)
        bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)
        self._bin_counts += np.bincount(bins, minlength=CALIBRATION_BINS)
        self._bin_hits += np.bincount(bins[hits[:, 0]], minlength=CALIBRATION_BINS)
        self._bin_confidence += np.bincount(bins, confidence, minlength=CALIBRATION_BINS)

    def overall(self) -> dict[str, float | int | None]:
        """Top-1 and top-5 accuracy over samples, and recall averaged over the classes that occur.

        acc5 is None below five classes, all None without a label.
        """
        labelled = int(self.support.sum())
        present = self.support > 0
        if not labelled:
            return {"labelled": 0, "acc1": None, "acc5": None, "mean_per_class_recall": None}
        return {
            "labelled": labelled,
            "acc1": float(self.hits_1.sum() / labelled),
            "acc5": float(self.hits_5.sum() / labelled) if len(self.support) >= 5 else None,
            "mean_per_class_recall": float((self.hits_1[present] / self.support[present]).mean()),
        }

    def per_class(self) -> list[dict[str, float | int | None]]:
        """Support, recall (top-1) and top-5 recall of each class, in class order; None where a class does not occur."""
        return [
            {
                "support": int(support),
                "recall": float(hits_1 / support) if support else None,
                "recall5": float(hits_5 / support) if support and len(self.support) >= 5 else None,
            }
            for support, hits_1, hits_5 in zip(self.support, self.hits_1, self.hits_5, strict=True)
        ]

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % confidence intervals of the accuracies over samples."""
        labelled = int(self.support.sum())
        if not labelled:
            return {}
        of_5 = {"acc5": wilson_interval(int(self.hits_5.sum()), labelled)} if len(self.support) >= 5 else {}
        return {"acc1": wilson_interval(int(self.hits_1.sum()), labelled), **of_5}

    def confusion(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The cells of the confusion matrix that are not zero: label, predicted class, samples."""
        return self._pairs // len(self.support), self._pairs % len(self.support), self._pair_counts

    def calibration(self) -> tuple[float, list[dict[str, float | int]]]:
        """The expected calibration error, and the bins that hold samples; 15 of equal width of the confidence."""
        error, bins = calibrate(self._bin_counts, self._bin_hits, self._bin_confidence)
        return error, [{"samples": count, "accuracy": hit, "confidence": sure} for count, hit, sure in bins]


def retrieval_recall(
    above: npt.NDArray[np.int64], level: npt.NDArray[np.int64], right: npt.NDArray[np.int64], k: int
) -> float:
    """Share of queries with a right answer among their `k` best.

    Of answers with one cosine, any order is as good as another (PyTorch's topk, by which CLIP_benchmark ranks, promises
    none): this is the mean over all their orders.

    Args:
        above: Answers [n] that are nearer to the query than its nearest right one.
        level: Answers [n] as near as that, itself included.
        right: Of those, how many [n] are right.
        k: How far down to look.
    """
    places = np.clip(k - above, 0, level)
    missed = np.ones(len(above))
    for drawn in range(int(places.max(initial=0))):  # without putting back
        wrong = np.maximum(level - right - drawn, 0) / np.maximum(level - drawn, 1)
        missed *= np.where(drawn < places, wrong, 1)
    return float(1 - missed.mean())
