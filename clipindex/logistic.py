"""Multinomial logistic regression: scikit-learn's objective, minimised in a tenth of the passes over the data.

Minimised over weights W [C, D] and intercepts b [C] is what sklearn.linear_model.LogisticRegression(C=c) minimises,

    c * sum over rows of w[label] * (logsumexp(W x + b) - (W x + b)[label])  +  0.5 * ||W||^2,

whose intercepts are not penalised. Two classes are the exception: there scikit-learn has one vector of weights v with
the penalty 0.5 * ||v||^2. The shortest pair with that difference is (-v/2, v/2), whose penalty is half of it, so that
minimising with c / 2 gives the same classifier, and half the objective.

The objective is convex, and hard for a plain L-BFGS only because features are badly scaled: CLIP's have a mean far
longer than what tells images apart, and a decaying spectrum. Both are taken out. Rows are centred, which the free
intercepts make up for; and L-BFGS starts from the inverse of ``X'X * c / C + 1`` in each class and of ``c * n / C``
for the intercepts: the inverse of the Hessian where all classes are equally probable (Böhning 1992, Annals of the
Institute of Statistical Mathematics 44, bounds the Hessian by such a product everywhere). It was chosen by measuring:
on the features of benchmarks/probe.py it takes about 16 passes to within 1e-6 of the minimum, where scikit-learn's
L-BFGS takes 100 to 150 and ends 2e-3 above it. Newton's method with conjugate gradients would need a pass for each
product with the Hessian, which leaves little to gain.

The first passes multiply in bfloat16 where that is faster; what ends the descent is computed in float32, its sums in
float64.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch

from clipindex.threads import map_in_order, num_cores, one_thread

Result = TypeVar("Result")

TOLERANCE = 1e-6
"""Of the objective: what a step still promises to take off it when the descent ends."""
LOW_TOLERANCE = 1e-4
"""Where passes in low precision give way to those in float32: further on they lose themselves in its rounding."""
DRAFT_TOLERANCE = 1e-3
"""Where drafts end; scikit-learn's default tolerance ends 2e-3 above the minimum on features of benchmarks/probe.py."""
NEARLY = 1e-4
"""Of the objective: what the last step may promise where float32 cannot tell any more whether it goes down."""
GRADIENT_TOLERANCE = 1e-4
"""scikit-learn's `tol`: largest component of the gradient of the objective divided by c and the sum of the weights."""

_HISTORY = 10
_BACKTRACKS = 6
_SUFFICIENT = 1e-4  # of the promised decrease, Nocedal & Wright 2006, section 3.1
_AT_ONCE = {"cpu": (2048, 1 << 21), "cuda": (65_536, 1 << 26)}
"""Rows and logits of a block: what a core's cache holds, and what keeps a GPU busy (256 MiB of float32)."""


class Block(NamedTuple):
    """Some rows, on one device; what is costly about them is left to the thread that works on them."""

    values: torch.Tensor
    """[n, D], of any floating type."""
    scale: torch.Tensor | None
    """Float32 [n], by which values are to be multiplied; None where they are not."""
    labels: torch.Tensor
    """Class ids, int64 [n]."""

    def features(self) -> torch.Tensor:
        """Float32 [n, D], in memory of its own."""
        features = self.values.to(torch.float32, copy=True)
        return features if self.scale is None else features.mul_(self.scale[:, None])


Passes = Callable[[], Iterable[Block]]
"""Begins a pass over all rows, in blocks of at most `block_rows`, the same ones in each."""


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


def block_rows(num_classes: int, device: torch.device) -> int:
    """How many rows a block may have."""
    most, logits = _AT_ONCE["cpu" if device.type == "cpu" else "cuda"]
    return max(256, min(most, logits // num_classes))


def map_blocks(function: Callable[[Block], Result], blocks: Iterable[Block]) -> Iterator[Result]:
    """Results in order. On a CPU each core has a block of its own: teams of threads wait for each other."""
    blocks = iter(blocks)
    first = list(itertools.islice(blocks, 2))
    if len(first) < 2 or first[0].values.device.type != "cpu":
        return map(function, itertools.chain(first, blocks))
    return map_in_order(function, itertools.chain(first, blocks), num_cores())


class Problem:
    """Labelled rows, as the objective for any `c` needs them: one pass finds their mean and their second moments.

    Args:
        passes: The rows.
        num_classes: C, at least 2.
        class_weights: Float32 [C], factors of the losses of each class; ones by default.
        low: A type whose matrix products are faster on the device than those of float32, if there is one.
        hold: Whether centred rows may be kept in that type.
    """

    def __init__(
        self,
        passes: Passes,
        num_classes: int,
        *,
        class_weights: torch.Tensor | None = None,
        low: torch.dtype | None = None,
        hold: bool = False,
    ) -> None:
        assert num_classes >= 2
        self.num_classes = num_classes
        self.low = low
        self._passes = passes
        self._class_weights = class_weights
        self._hold = hold
        self._held: list[Block] | None = None
        self._measure()

    @one_thread()
    def _measure(self) -> None:
        """Weighted mean, and eigenvectors of the weighted second moments about it."""
        pivot = next(iter(self._passes())).features().mean(0)  # near the mean, lest differences of large sums remain

        def of_block(block: Block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            x = block.features().sub_(pivot)
            weight = x.new_ones(len(x)) if self._class_weights is None else self._class_weights[block.labels]
            first = weight @ x
            x = x.mul_(weight.sqrt()[:, None]).to(self.low or x.dtype)
            return weight.sum(dtype=torch.float64), first.double(), (x.T @ x).double()

        total, first, second = (pivot.new_zeros((), dtype=torch.float64) for _ in range(3))
        for weight, sums, products in map_blocks(of_block, self._passes()):
            total, first, second = total + weight, first + sums, second + products
        shift = first / total
        self.mean = (pivot + shift).float()
        self.total = total.item()
        values, vectors = torch.linalg.eigh((second - total * torch.outer(shift, shift)).float())
        self._spectrum, self._vectors = values.clamp(min=0), vectors

    def _centred(self, block: Block, low: bool) -> torch.Tensor:
        x = block.features().sub_(self.mean)
        return x.to(self.low) if low else x

    def _lowered(self) -> list[Block]:
        """Centred rows in the low type, kept."""
        if self._held is None:
            blocks = map_blocks(lambda block: (self._centred(block, low=True), block.labels), self._passes())
            self._held = [Block(x, None, labels) for x, labels in blocks]
        return self._held

    def evaluate(self, theta: torch.Tensor, c: float, low: bool = False) -> tuple[float, torch.Tensor]:
        """The objective and its gradient at weights and intercepts [C, D + 1] of centred rows."""
        weights, intercept = theta[:, :-1], theta[:, -1]
        factor = weights.T.to(self.low if low else theta.dtype)
        is_held = low and self._hold

        def of_block(block: Block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            x = block.values if is_held else self._centred(block, low)
            labels = block.labels
            logits = (x @ factor).float() + intercept
            normaliser = torch.logsumexp(logits, 1)
            losses = normaliser - logits.gather(1, labels[:, None])[:, 0]
            residual = logits.sub_(normaliser[:, None]).exp_()
            residual.scatter_add_(1, labels[:, None], -torch.ones_like(residual[:, :1]))
            if self._class_weights is not None:
                losses = losses * self._class_weights[labels]
                residual *= self._class_weights[labels][:, None]
            return losses.sum(dtype=torch.float64), residual.to(x.dtype).T @ x, residual.sum(0)

        loss = torch.zeros((), dtype=torch.float64, device=theta.device)
        gradient = torch.zeros_like(theta)
        for losses, products, sums in map_blocks(of_block, self._lowered() if is_held else self._passes()):
            loss += losses
            gradient[:, :-1] += products
            gradient[:, -1] += sums
        gradient *= c
        gradient[:, :-1] += weights
        return c * loss.item() + 0.5 * weights.double().square().sum().item(), gradient

    def preconditioner(self, c: float) -> Callable[[torch.Tensor], torch.Tensor]:
        """The inverse of the Hessian where all classes are equally probable, in the space where rows sum up to zero."""
        scale = 1 / (1 + self._spectrum * (c / self.num_classes))
        of_intercept = self.num_classes / (c * self.total)

        def apply(gradient: torch.Tensor) -> torch.Tensor:
            weights = (gradient[:, :-1] @ self._vectors * scale) @ self._vectors.T
            return torch.cat([weights, gradient[:, -1:] * of_intercept], 1)

        return apply


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
        start: A fit for another `c`, to begin at; zeros by default.
        draft: Whether to stop at `DRAFT_TOLERANCE`, in low precision where there is one.
        max_passes: After which to stop in any case.
        on_pass: Called after each pass over the data.
    """
    halves = 2 if problem.num_classes == 2 else 1
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
        objective=descent.value * halves,
        gradient=descent.largest_gradient(),
        passes=descent.passes,
        converged=descent.converged,
    )


class _Descent:
    """L-BFGS (Nocedal & Wright 2006, algorithm 7.5), preconditioned; its history outlives a change of precision."""

    def __init__(
        self, problem: Problem, c: float, start: Fit | None, max_passes: int, on_pass: Callable[[], None]
    ) -> None:
        self._problem = problem
        self._c = c
        self._precondition = problem.preconditioner(c)
        self._history: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=_HISTORY)
        self._passes_left = max_passes
        self._max_passes = max_passes
        self._on_pass = on_pass
        self._gradient = torch.empty(0)
        self.value = 0.0
        self.converged = False
        mean = problem.mean
        self.theta = mean.new_zeros(problem.num_classes, len(mean) + 1)
        if start is not None:
            centred = start.intercept.double() + start.weights.double() @ mean.double()
            self.theta = torch.cat([start.weights, centred.float()[:, None]], 1)

    @property
    def passes(self) -> int:
        return self._max_passes - self._passes_left

    def largest_gradient(self) -> float:
        return self._gradient.abs().max().item() / (self._c * self._problem.total)

    def run(self, *, low: bool, tolerance: float) -> None:
        """Descend until a step promises no more than `tolerance` of the objective, or none goes down any more."""
        self.value, self._gradient = self._evaluate(self.theta, low)
        self.converged = False
        while self._passes_left > 0:
            direction = self._direction()
            promised = -(direction * self._gradient).sum().item()
            if promised <= tolerance * self.value and (low or self.largest_gradient() <= GRADIENT_TOLERANCE):
                self.converged = True
                return
            if not self._step(direction, promised, low):
                # The precision of the products is used up: as low as they can tell, if passes are left.
                self.converged = self._passes_left > 0 and promised <= NEARLY * self.value
                return

    def _step(self, direction: torch.Tensor, promised: float, low: bool) -> bool:
        """Go along a direction as far as goes down enough; whether anywhere does."""
        length = 1.0
        for _ in range(_BACKTRACKS):
            step = direction * length
            value, gradient = self._evaluate(self.theta + step, low)
            missed = value - self.value + length * promised
            if value <= self.value - _SUFFICIENT * length * promised:
                change = gradient - self._gradient
                if (step * change).sum() > 0:
                    self._history.append((step, change))
                self.theta, self.value, self._gradient = self.theta + step, value, gradient
                return True
            if self._passes_left <= 0:
                return False
            # The minimum of the parabola through what is known.
            length *= min(max(0.5 * length * promised / missed, 0.1), 0.5)
        return False

    def _direction(self) -> torch.Tensor:
        towards = -self._gradient
        parts = []
        for step, change in reversed(self._history):
            part = (step * towards).sum() / (step * change).sum()
            towards = towards - part * change
            parts.append(part)
        towards = self._precondition(towards)
        if self._history:
            step, change = self._history[-1]
            towards = towards * ((step * change).sum() / (change * self._precondition(change)).sum())
        for (step, change), part in zip(self._history, reversed(parts), strict=True):
            towards = towards + step * (part - (change * towards).sum() / (step * change).sum())
        return towards

    def _evaluate(self, theta: torch.Tensor, low: bool) -> tuple[float, torch.Tensor]:
        self._passes_left -= 1
        value, gradient = self._problem.evaluate(theta, self._c, low)
        self._on_pass()
        return value, gradient
