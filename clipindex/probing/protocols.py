"""How probes are trained and their regularisation is found, in the ways that papers and benchmarks use."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from clipindex.errors import UsageError
from clipindex.logistic import Fit, Passes, Problem, block_rows, fit, map_blocks
from clipindex.probing.rows import Ids, Rows
from clipindex.products import multiply
from clipindex.threads import one_thread

README_C = 0.316
PROTOCOLS = {
    "openai-readme": "L2-regularised logistic regression at C = 0.316 on raw features, intercepts free:"
    " the linear-probe example in the README of github.com/openai/CLIP",
    "clip-a3": "Radford et al. 2021 (arXiv:2103.00020), appendix A.3: L2-regularised logistic regression whose"
    " lambda = 1/C is found on validation rows by a parametric binary search among 97 values from 1e-6 to 1e6, 8 a"
    " decade; then fitted to training and validation rows, measured once",
    "clip-benchmark": "github.com/LAION-AI/CLIP_benchmark, clip_benchmark/metrics/linear_probe.py: unit features,"
    " AdamW at rate 0.1 with a cosine to 0, 10 epochs of batches of 64; weight decay found on validation rows by the"
    " same search among 97 values from 1e-6 to 1e2",
    "logistic": "L2-regularised logistic regression at a C of one's own",
    "one-vs-rest": "for rows with any number of classes: L2-regularised logistic regression of each class against all"
    " rows without it, all at one C, intercepts free; a C that is searched is the best by mAP on validation rows, found"
    " as in clip-a3",
}
"""By name, what each is and who says so."""

SEARCH_POINTS = 97
"""From lambda 1e-6 to 1e6 in eighths of a decade."""
DRAFT_PASSES = 15
"""Where regularisation is too weak to bound the weights, a fit has no end, and no use: it is far beyond the peak."""
_COARSE = 16
"""Steps between the first points: two decades."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One regularisation that was tried."""

    strength: float
    """lambda = 1/C, or the weight decay."""
    score: float
    """acc1 on the validation rows, or mAP where rows have any number of classes."""
    passes: int
    """Over the training rows."""
    converged: bool
    """Whether the fit met its tolerance; False where it was stopped before, at `DRAFT_PASSES`."""


def check_c(c: float | None) -> None:
    """Refuse what is no C; None is to be searched.

    Raises:
        UsageError: It is not positive, or no number.
    """
    if c is not None and not 0 < c < float("inf"):
        raise UsageError(f"c {c:g}: give a positive number, or auto")


def name_protocol(c: float, features: str) -> str:
    """What a fit at a given C is called."""
    return "openai-readme" if c == README_C and features == "raw" else "logistic"


def search_peak(accuracy: Callable[[int], float], coarse: int = _COARSE) -> int:
    """The parametric binary search of CLIP's appendix A.3 over points 0 … 96, the strongest regularisation at 96.

    It begins with every 16th point, then halves the interval around the peak until its step is one. The paper does not
    say which of several equal peaks is taken; here it is the strongest regularisation.

    Args:
        accuracy: Of a point; called once for each, from the strongest on.
        coarse: Steps between the first points.
    """
    found: dict[int, float] = {}

    def peak(points: list[int]) -> int:
        for point in sorted(set(points) - set(found), reverse=True):
            found[point] = accuracy(point)
        return max(points, key=lambda point: (found[point], point))

    best = peak(list(range(0, SEARCH_POINTS, coarse)))
    step = coarse // 2
    while step:
        best = peak([max(best - step, 0), best, min(best + step, SEARCH_POINTS - 1)])
        step //= 2
    return best


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What every fit of a training shares."""

    num_classes: int
    balanced: bool
    """Whether losses have the factor n / (C * rows of the class), as scikit-learn's class_weight='balanced'."""
    low: torch.dtype | None
    """For products in the first passes; see `logistic.Problem`."""
    device: torch.device
    on_pass: Callable[[str], None]
    """Called after each pass, with what is being done."""


def pose(rows: Rows, chosen: Ids | None, setting: Setting) -> Problem:
    """The fit of some rows, measured but not yet solved."""
    class_ids = rows.class_ids if chosen is None else rows.class_ids[chosen]
    return Problem(
        rows.passes(chosen, block_rows(setting.num_classes, setting.device)),
        setting.num_classes,
        class_weights=_balance(class_ids, setting) if setting.balanced else None,
        low=setting.low,
    )


def _balance(class_ids: Ids, setting: Setting) -> torch.Tensor:
    counts = torch.bincount(torch.from_numpy(class_ids), minlength=setting.num_classes)
    return (len(class_ids) / (setting.num_classes * counts.clamp(min=1))).float().to(setting.device)


def search_c(rows: Rows, training: Ids, validation: Ids, setting: Setting) -> tuple[Fit, list[Trial]]:
    """Find C as CLIP's appendix A.3 does; each fit begins at that of the nearest strength before it.

    The fits are drafts, to `logistic.DRAFT_TOLERANCE`, which is what scikit-learn's default tolerance reaches on such
    features, or of `DRAFT_PASSES`. So the search takes about three times as long as one fit does.

    Returns:
        The draft at the peak, and what was tried, in order.
    """
    held_out = rows.passes(validation, block_rows(setting.num_classes, setting.device))
    return search_strength(
        pose(rows, training, setting), lambda found: measure(held_out, found.weights, found.intercept), setting.on_pass
    )


@one_thread()
def search_strength(
    problem: Problem, score: Callable[[Fit], float], on_pass: Callable[[str], None]
) -> tuple[Fit, list[Trial]]:
    """The same of a problem that is posed, with a score of one's own on the validation rows."""
    fits: dict[int, Fit] = {}
    trials: list[Trial] = []

    def accuracy(point: int) -> float:
        strength = 10 ** (-6 + point / 8)
        # From the stronger side, as far as there is one: weights grow as the penalty shrinks.
        before = min(fits, key=lambda other: (abs(other - point), -other), default=None)
        start = None if before is None else fits[before]
        note = f"search, lambda {strength:.3g}"
        found = fit(
            problem,
            1 / strength,
            start=start,
            draft=True,
            max_passes=DRAFT_PASSES,
            on_pass=lambda: on_pass(note),
        )
        fits[point] = found
        reached = score(found)
        trials.append(Trial(strength=strength, score=reached, passes=found.passes, converged=found.converged))
        return reached

    best = search_peak(accuracy)
    return fits[best], trials


def fit_at(
    rows: Rows, training: Ids, c: float | None, searched: tuple[Ids, Ids] | None, setting: Setting
) -> tuple[Fit, list[Trial]]:
    """The fit to some rows at `c`; where it is None, at the one that `search_c` finds.

    Args:
        rows: Of which `training` and `searched` are numbers.
        training: What to fit to.
        c: scikit-learn's C.
        searched: What a search trains on, and what it validates on.
        setting: What all its fits share.

    Returns:
        The fit, and what a search tried.
    """
    start: Fit | None = None
    trials: list[Trial] = []
    if c is None:
        assert searched is not None
        start, trials = search_c(rows, *searched, setting)
        c = start.c
    problem = pose(rows, training, setting)
    note = f"fit, C {c:.4g}"
    setting.on_pass("fit")
    return fit(problem, c, start=start, on_pass=lambda: setting.on_pass(note)), trials


def measure(passes: Passes, weights: torch.Tensor, intercept: torch.Tensor) -> float:
    """Top-1 accuracy."""
    hits, rows = 0, 0
    for right in map_blocks(
        lambda block: (multiply(block.features(), weights.T) + intercept).argmax(1) == block.labels, passes()
    ):
        hits += int(right.sum())
        rows += len(right)
    return hits / rows


def describe_search(trials: list[Trial], score: str = "acc1") -> dict[str, Any]:
    """What of a search is recorded with its probe; `score` is what its score is called."""
    described = [
        {score if name == "score" else name: value for name, value in asdict(trial).items()} for trial in trials
    ]
    return {"trials": described, "passes": sum(trial.passes for trial in trials)}
