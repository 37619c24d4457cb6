"""Probes of classes that do not exclude each other: a logistic regression for each, all of them in the same passes.

A class that all rows to learn from have, or none, has no regression of its own. It gets weights of zero and the odds
(k + 1/2) : (n - k + 1/2) of its k rows among n, whatever the image: finite, so that a probability is never 0 or 1.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from clipindex.errors import ClassesError
from clipindex.logistic import Fit, OneVsRest, Problem, block_rows, fit
from clipindex.probing.lists import split_rows
from clipindex.probing.protocols import Setting, describe_search, search_strength
from clipindex.probing.ranking import rank_classes
from clipindex.probing.rows import Ids, Rows
from clipindex.probing.task import Task


class _Posed(NamedTuple):
    """The regressions of those classes that have one."""

    problem: Problem
    is_varied: torch.Tensor
    """Whether some rows have the class, and not all [C]."""
    odds: torch.Tensor
    """Logarithms [C], for the others."""

    def of_all_classes(self, found: Fit) -> Fit:
        """A fit of `problem`, with those classes that have none."""
        weights = found.weights.new_zeros(len(self.odds), found.weights.shape[1])
        weights[self.is_varied] = found.weights
        intercept = self.odds.clone()
        intercept[self.is_varied] = found.intercept
        return replace(found, weights=weights, intercept=intercept)

    def of_its_classes(self, found: Fit) -> Fit:
        """The other way around."""
        return replace(found, weights=found.weights[self.is_varied], intercept=found.intercept[self.is_varied])


def train_one_vs_rest(
    task: Task, rows: Rows, c: float | None, fraction: float, seed: int, setting: Setting
) -> tuple[Fit, dict[str, Any]]:
    """Fit all classes of a task of lists.

    Args:
        task: What is to be learned.
        rows: Its rows, perhaps in memory.
        c: scikit-learn's C, of all classes; None to search the one of the best mAP on validation rows.
        fraction: Of the training rows, to validate on.
        seed: Of drawing them.
        setting: What fits share.

    Returns:
        The fit, and what is to be recorded of it.

    Raises:
        ClassesError: No class is there to be learned.
    """
    found: dict[str, Any] = {}
    start = None
    if c is None:
        kept, out = split_rows(len(task.training), fraction, seed)
        start, found = _search(task, rows, task.training[kept], task.training[out], setting)
        c = start.c
    posed = _pose(task, rows, task.training, setting)
    setting.on_pass("fit")
    note = f"fit, C {c:.4g}"
    began = None if start is None else posed.of_its_classes(start)
    done = posed.of_all_classes(fit(posed.problem, c, start=began, on_pass=lambda: setting.on_pass(note)))
    constant = [label for label, varied in zip(task.classes, posed.is_varied.tolist(), strict=True) if not varied]
    return done, {**found, "constant_classes": constant}


def _search(task: Task, rows: Rows, training: Ids, validation: Ids, setting: Setting) -> tuple[Fit, dict[str, Any]]:
    assert task.lists is not None
    posed = _pose(task, rows, training, setting)
    lists = task.lists.to(setting.device)
    held_out = rows.passes(validation, block_rows(setting.num_classes, setting.device))

    def score(draft: Fit) -> float:
        whole = posed.of_all_classes(draft)
        return rank_classes(held_out, lists, (whole.weights, whole.intercept)).mean()

    best, trials = search_strength(posed.problem, score, setting.on_pass)
    described = describe_search(trials, "mean_average_precision")
    return posed.of_all_classes(best), {"validation_rows": len(validation), "search": described}


def _pose(task: Task, rows: Rows, training: Ids, setting: Setting) -> _Posed:
    assert task.lists is not None
    num_rows = len(training)
    counts = task.lists.counts(torch.from_numpy(training), setting.num_classes)
    is_varied = (counts > 0) & (counts < num_rows)
    if not is_varied.any():
        raise ClassesError(
            f"{task.folder}: each class is that of all {num_rows:,} rows to learn from, or of none: there is nothing to"
            " tell apart"
        )
    kept = counts[is_varied]
    loss = OneVsRest(
        task.lists.keep(is_varied).to(setting.device), kept.to(setting.device), num_rows, balanced=setting.balanced
    )
    passes = rows.passes(training, block_rows(len(kept), setting.device))
    problem = Problem(passes, len(kept), loss=loss, low=setting.low)
    odds = ((counts + 0.5) / (num_rows - counts + 0.5)).log().float()
    return _Posed(problem, is_varied.to(setting.device), odds.to(setting.device))
