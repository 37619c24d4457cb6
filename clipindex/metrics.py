"""Classification and retrieval metrics as CLIP_benchmark defines them.

They stand in clip_benchmark/metrics/zeroshot_classification.py and zeroshot_retrieval.py.
"""

from typing import Any

import numpy as np
import numpy.typing as npt


class ClassificationCounts:
    """Counts from which the metrics follow; batches are added, and nothing of them is kept."""

    def __init__(self, num_classes: int) -> None:
        self.support = np.zeros(num_classes, np.int64)
        self.hits_1 = np.zeros(num_classes, np.int64)
        self.hits_5 = np.zeros(num_classes, np.int64)

    def add(self, labels: npt.NDArray[np.integer[Any]], ids: npt.NDArray[np.integer[Any]]) -> None:
        """Count labels [n] against predicted class ids [n, K], best first; K is at least min(5, C)."""
        num_classes = len(self.support)
        hits = ids[:, :5] == labels[:, None]
        self.support += np.bincount(labels, minlength=num_classes)
        self.hits_1 += np.bincount(labels[hits[:, 0]], minlength=num_classes)
        self.hits_5 += np.bincount(labels[hits.any(axis=1)], minlength=num_classes)

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
