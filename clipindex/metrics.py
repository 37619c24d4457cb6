"""Classification metrics as CLIP_benchmark defines them (clip_benchmark/metrics/zeroshot_classification.py)."""

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
