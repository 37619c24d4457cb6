"""How good a probe of many independent classes is: average precision, decisions at one half, calibration."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clipindex.average_precision import BLOCK_SCORES, AveragePrecision, ScoreBlock, measure_average_precision
from clipindex.logistic import Block, ClassLists, Linear, Passes, map_blocks
from clipindex.metrics import CALIBRATION_BINS, calibrate
from clipindex.products import multiply

RANKING_PASSES = 2
EVALUATION_PASSES = RANKING_PASSES + 1
"""Over rows; what is said of progress counts each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MultiLabelEvaluation:
    """What a probe got right on rows with any number of classes."""

    labelled: int
    """Rows that were measured."""
    left_out: int
    """Rows without a list of labels."""
    unseen: dict[int, int]
    """Labels that the probe was not trained on, and how many rows have them: their average precision is 0."""
    mean_average_precision: float
    """Over all classes of the probe and those that are unseen; see `average_precision`."""
    calibration_error: float
    """Expected calibration error of all decisions, of each row on each class, in 15 bins of the probability."""
    calibration: list[dict[str, float | int]]
    """Its bins: decisions, share of positives, mean probability."""
    per_class: list[dict[str, Any]]
    """Label, name, support, average_precision; precision, recall and f1 of the decisions at a probability of one half,
    None where they are not defined."""


def rank_classes(
    passes: Passes, lists: ClassLists, linear: Linear, on_rows: Callable[[int], None] = lambda rows: None
) -> AveragePrecision:
    """How well logits rank rows in each class; `lists` are on the device of the rows.

    `on_rows` is called with the number of rows that were looked at, `RANKING_PASSES` times each.
    """
    weights, intercept = linear
    at_once = max(1, BLOCK_SCORES // len(intercept))

    def pieces() -> Iterator[Block]:
        for block in passes():
            for first in range(0, len(block.labels), at_once):
                rows = slice(first, first + at_once)
                scale = None if block.scale is None else block.scale[rows]
                yield Block(block.values[rows], scale, block.labels[rows])

    def score(block: Block) -> ScoreBlock:
        rows, classes = lists.entries(block.labels)
        scores = multiply(weights, block.features().T) + intercept[:, None]
        return ScoreBlock(scores.cpu().numpy(), classes.cpu().numpy(), rows.cpu().numpy())

    is_cpu = weights.device.type == "cpu"
    return measure_average_precision(len(intercept), pieces, score, on_rows, one_by_one=not is_cpu)


class DecisionCounts:
    """Counts of decisions at a probability of one half, and of probabilities in bins.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        self.support = np.zeros(num_classes, np.int64)
        self.chosen = np.zeros(num_classes, np.int64)
        self.right = np.zeros(num_classes, np.int64)
        self._bins = np.zeros((3, CALIBRATION_BINS))

    def add_all(
        self,
        passes: Passes,
        lists: ClassLists,
        linear: Linear,
        on_rows: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """Count rows; `lists` are on their device. `on_rows` is called with their number so far."""
        weights, intercept = linear

        def of_block(block: Block) -> tuple[int, list[npt.NDArray[np.int64]], npt.NDArray[np.float64]]:
            rows, classes = lists.entries(block.labels)
            probabilities = torch.sigmoid(multiply(block.features(), weights.T) + intercept)
            is_true = torch.zeros_like(probabilities, dtype=torch.bool)
            is_true[rows, classes] = True
            is_chosen = probabilities > 0.5
            counts = [one.sum(0).cpu().numpy() for one in (is_true, is_chosen, is_true & is_chosen)]
            bins = (probabilities * CALIBRATION_BINS).ceil().long().sub_(1).clamp_(0, CALIBRATION_BINS - 1).flatten()
            flat = (torch.ones_like(probabilities), is_true.float(), probabilities)
            sums = [torch.bincount(bins, one.flatten().double(), CALIBRATION_BINS) for one in flat]
            return len(block.labels), counts, torch.stack(sums).cpu().numpy()

        done = 0
        for count, (support, chosen, right), sums in map_blocks(of_block, passes()):
            self.support += support
            self.chosen += chosen
            self.right += right
            self._bins += sums
            done += count
            on_rows(done)

    def calibration(self) -> tuple[float, list[dict[str, float | int]]]:
        """The expected calibration error, and the bins that hold decisions (`metrics.calibrate`)."""
        error, bins = calibrate(*self._bins)
        return error, [{"decisions": count, "positives": share, "probability": mean} for count, share, mean in bins]

    def per_class(self) -> list[dict[str, float | int | None]]:
        """Support, precision, recall and f1 of each class."""
        return [
            {
                "support": support,
                "precision": right / chosen if chosen else None,
                "recall": right / support if support else None,
                "f1": 2 * right / (chosen + support) if chosen + support else None,
            }
            for support, chosen, right in zip(
                self.support.tolist(), self.chosen.tolist(), self.right.tolist(), strict=True
            )
        ]


def evaluate_lists(
    passes: Passes,
    lists: ClassLists,
    linear: Linear,
    classes: Sequence[int],
    names: Sequence[str] | None,
    unseen: dict[int, int],
    left_out: int,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> MultiLabelEvaluation:
    """Measure a linear classifier of `classes` on rows with `lists`, on one device.

    `on_rows` is called with the number of rows that were looked at, `EVALUATION_PASSES` times each.
    """
    ranked = rank_classes(passes, lists, linear, on_rows)
    counts = DecisionCounts(len(classes))
    counts.add_all(passes, lists, linear, lambda done: on_rows(RANKING_PASSES * ranked.num_rows + done))
    error, bins = counts.calibration()
    precisions = ranked.per_class()
    per_class: list[dict[str, Any]] = [
        {"label": label, "name": names[at] if names else None, **row, "average_precision": float(precisions[at])}
        for at, (label, row) in enumerate(zip(classes, counts.per_class(), strict=True))
    ]
    nothing: dict[str, Any] = {"name": None, "precision": None, "recall": 0.0, "f1": 0.0, "average_precision": 0.0}
    per_class += [{"label": label, "support": support, **nothing} for label, support in unseen.items()]
    return MultiLabelEvaluation(
        labelled=ranked.num_rows,
        left_out=left_out,
        unseen=unseen,
        mean_average_precision=float(precisions.sum() / len(per_class)),
        calibration_error=error,
        calibration=bins,
        per_class=per_class,
    )
