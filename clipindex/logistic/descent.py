"""The way down to the minimum: L-BFGS, in low precision first where that is faster."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from clipindex.logistic.problem import Problem
from clipindex.threads import one_thread

TOLERANCE = 1e-6
"""Of the objective: what a step still promises to take off it when the descent ends."""
LOW_TOLERANCE = 1e-4
"""Where passes in low precision give way to those in float32: further on they lose themselves in its rounding."""
DRAFT_TOLERANCE = 1e-3
"""Where drafts end; scikit-learn's default tolerance ends 2e-3 above the minimum on features of benchmarks/probe.py."""
NEARLY = 1e-4
"""Of the objective: what the last step may promise where float32 cannot tell any more whether it goes down."""
RESOLUTION = 2**-24
"""Of the objective: what a step may promise where float32 cannot tell any more whether the gradient gets smaller."""
GRADIENT_TOLERANCE = 1e-4
"""scikit-learn's `tol`: largest component of the gradient of the objective divided by c and the sum of the weights."""

_HISTORY = 10
_BACKTRACKS = 6  # none of a part in low precision, which another precision takes over: it costs all others a pass
_SUFFICIENT = 1e-4  # of the promised decrease, Nocedal & Wright 2006, section 3.1


Linear = tuple[torch.Tensor, torch.Tensor]
"""A linear classifier: weights [C, D] and intercept [C]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """A minimum, and how well it is one."""

    c: float
    weights: torch.Tensor
    """Float32 [C, D]."""
    intercept: torch.Tensor
    """Float32 [C]."""
    objective: float
    """As scikit-learn counts it; of a draft, in low precision."""
    gradient: float
    """As in `GRADIENT_TOLERANCE`."""
    passes: int
    """Over the data, in this fit."""
    converged: bool
    """Whether both tolerances were met, as far as float32 can tell."""


@one_thread()
def fit(
    problem: Problem,
    c: float,
    *,
    start: Fit | None = None,
    draft: bool = False,
    max_passes: int = 1000,
    on_pass: Callable[[], None] = lambda: None,
) -> Fit:
    """Minimise the objective.

    Args:
        problem: The rows.
        c: scikit-learn's C, the inverse of the strength of the penalty.
        start: A fit for another `c`, to begin at; weights of zero by default.
        draft: Whether to stop at `DRAFT_TOLERANCE`, in low precision where there is one.
        max_passes: After which to stop in any case.
        on_pass: Called after each pass over the data.
    """
    halves = problem.loss.halves
    descent = _Descent(problem, c / halves, start, max_passes, on_pass)
    if problem.low is not None:
        descent.run(low=True, tolerance=DRAFT_TOLERANCE if draft else LOW_TOLERANCE)
    if problem.low is None or not draft:
        descent.run(low=False, tolerance=DRAFT_TOLERANCE if draft else TOLERANCE)
    weights = descent.theta[:, :-1].contiguous()
    offset = weights.double() @ problem.mean.double()
    return Fit(
        c=c,
        weights=weights,
        intercept=(descent.theta[:, -1].double() - offset).float(),
        objective=descent.values.sum().item() * halves,
        gradient=descent.largest_gradients().max().item(),
        passes=descent.passes,
        converged=descent.converged,
    )


class _Descent:
    """L-BFGS (Nocedal & Wright 2006, algorithm 7.5), preconditioned; its history outlives a change of precision.

    Of each of the loss's parts on its own: inner products, steps and ends are vectors with a component a part, and of a
    part that has ended, or that a step did not move, the pairs in the history are zero.
    """

    def __init__(
        self, problem: Problem, c: float, start: Fit | None, max_passes: int, on_pass: Callable[[], None]
    ) -> None:
        self._problem = problem
        self._c = c
        self._precondition = problem.preconditioner(c)
        self._history: deque[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = deque(maxlen=_HISTORY)
        self._passes_left = max_passes
        self._max_passes = max_passes
        self._on_pass = on_pass
        self._gradient = torch.empty(0)
        self.values = torch.empty(0)
        self.converged = False
        mean = problem.mean
        self.theta = mean.new_zeros(problem.num_classes, len(mean) + 1)
        self.theta[:, -1] = problem.loss.start(mean.device)
        self._scale = mean.new_ones(problem.loss.num_parts)
        if start is not None:
            centred = start.intercept.double() + start.weights.double() @ mean.double()
            self.theta = torch.cat([start.weights, centred.float()[:, None]], 1)

    @property
    def passes(self) -> int:
        return self._max_passes - self._passes_left

    def largest_gradients(self) -> torch.Tensor:
        """Of each part, as in `GRADIENT_TOLERANCE`."""
        largest = self._gradient.abs().reshape(self._problem.loss.num_parts, -1).amax(1)
        return largest / (self._c * self._problem.total)

    def run(self, *, low: bool, tolerance: float) -> None:
        """Descend until a step promises no more than `tolerance` of each part, or none goes down any more."""
        self.values, self._gradient = self._evaluate(self.theta, low)
        going = torch.ones_like(self.values, dtype=torch.bool)
        converged = ~going
        while self._passes_left > 0:
            direction = self._direction()
            promised = -self._product(direction, self._gradient).double()
            small = promised <= tolerance * self.values
            if not low:
                is_flat = self.largest_gradients() <= GRADIENT_TOLERANCE
                small &= is_flat | (promised <= RESOLUTION * self.values)
            converged |= going & small
            going &= ~small
            if not going.any():
                break
            stuck = self._step(direction, promised, going, low)
            # The precision of the products is used up: as low as they can tell, if passes are left.
            if self._passes_left > 0:
                converged |= stuck & (promised <= NEARLY * self.values)
            going &= ~stuck
        self.converged = bool(converged.all())

    def _step(self, direction: torch.Tensor, promised: torch.Tensor, going: torch.Tensor, low: bool) -> torch.Tensor:
        """Go along a direction as far as goes down enough, in the parts that are `going`; which of them go nowhere."""
        length = torch.ones_like(promised)
        pending = going.clone()
        moved = torch.zeros_like(direction)
        values, gradient = self.values, self._gradient
        for _ in range(1 if low and len(promised) > 1 else _BACKTRACKS):
            step = direction * (length * pending)[:, None].to(direction.dtype)
            found, slope = self._evaluate(self.theta + step, low)
            enough = pending & (found <= self.values - _SUFFICIENT * length * promised)
            moved = torch.where(enough[:, None], step, moved)
            values, gradient = torch.where(enough, found, values), torch.where(enough[:, None], slope, gradient)
            pending &= ~enough
            if self._passes_left <= 0 or not pending.any():
                break
            # The minimum of the parabola through what is known.
            missed = found - self.values + length * promised
            length *= (0.5 * length * promised / missed).nan_to_num(0.1).clamp(0.1, 0.5)
        self._remember(moved, gradient - self._gradient)
        self.theta, self.values, self._gradient = self.theta + moved, values, gradient
        return pending

    def _remember(self, step: torch.Tensor, change: torch.Tensor) -> None:
        product = self._product(step, change)
        is_convex = product > 0
        if is_convex.any():
            self._history.append((step, change, torch.where(is_convex, 1 / product, 0)))
            length = product / self._product(change, self._precondition(change))
            self._scale = torch.where(is_convex, length, self._scale)

    def _direction(self) -> torch.Tensor:
        towards = -self._gradient
        parts = []
        for step, change, inverse in reversed(self._history):
            part = self._product(step, towards) * inverse
            towards = towards - part[:, None] * change
            parts.append(part)
        towards = self._precondition(towards) * self._scale[:, None]
        for (step, change, inverse), part in zip(self._history, reversed(parts), strict=True):
            towards = towards + step * (part - self._product(change, towards) * inverse)[:, None]
        return towards

    def _product(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Inner products of the parts of two arrays [C, D + 1]."""
        return (one * other).reshape(self._problem.loss.num_parts, -1).sum(1)

    def _evaluate(self, theta: torch.Tensor, low: bool) -> tuple[torch.Tensor, torch.Tensor]:
        self._passes_left -= 1
        found = self._problem.evaluate(theta, self._c, low)
        self._on_pass()
        return found
