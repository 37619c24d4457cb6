"""Logistic regression: scikit-learn's objective, minimised in a tenth of the passes over the data.

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

One-vs-rest, for rows with any number of classes, is as many problems as there are classes, each what
sklearn.multiclass.OneVsRestClassifier gives to a LogisticRegression of two classes: one vector of weights, and the
losses of `losses.OneVsRest`. They share the passes and nothing else: each has its own L-BFGS, its own steps, and its
own end. Each begins at the odds of its class, with the Hessian there.

The first passes multiply in bfloat16 where that is faster; what ends the descent is computed in float32, its sums in
float64.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch

from clipindex.losses import Loss, Multinomial
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
RESOLUTION = 2**-24
"""Of the objective: what a step may promise where float32 cannot tell any more whether the gradient gets smaller."""
GRADIENT_TOLERANCE = 1e-4
"""scikit-learn's `tol`: largest component of the gradient of the objective divided by c and the sum of the weights."""

_HISTORY = 10
_RANK_TOLERANCE = 1e-12  # of the largest eigenvalue; in float64, rows that say the same come out at 1e-16 of it
_BACKTRACKS = 6  # none of a part in low precision, which another precision takes over: it costs all others a pass
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
    """Int64 [n]: class ids, or what else the loss knows a row by."""

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
        num_classes: C.
        class_weights: Float32 [C], factors of the losses of each class; ones by default.
        loss: In place of a multinomial one with these weights.
        low: A type whose matrix products are faster on the device than those of float32, if there is one.
        hold: Whether centred rows may be kept in that type.
    """

    def __init__(
        self,
        passes: Passes,
        num_classes: int,
        *,
        class_weights: torch.Tensor | None = None,
        loss: Loss | None = None,
        low: torch.dtype | None = None,
        hold: bool = False,
    ) -> None:
        self.num_classes = num_classes
        self.loss = loss if loss is not None else Multinomial(num_classes, class_weights)
        self.low = low
        self._passes = passes
        self._hold = hold
        self._held: list[Block] | None = None
        self._measure()

    @one_thread()
    def _measure(self) -> None:
        """Weighted mean, and eigenvectors of the weighted second moments about it."""
        few: list[Block] = []
        for block in self._passes():
            few.append(block)
            if 2 * sum(len(one.values) for one in few) > block.values.shape[1]:
                break
        else:
            self._measure_few(few)
            return
        pivot = few[0].features().mean(0)  # near the mean, lest differences of large sums remain

        def of_block(block: Block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            x = block.features().sub_(pivot)
            found = self.loss.row_weights(block.labels)
            weight = x.new_ones(len(x)) if found is None else found
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

    def _measure_few(self, blocks: Sequence[Block]) -> None:
        """The same of fewer rows than dimensions, by their products with each other.

        Weights then stay in the span of the rows, where the minimum is: so eigenvectors of zero are not needed.
        """
        x = torch.cat([block.features() for block in blocks]).double()
        found = self.loss.row_weights(torch.cat([block.labels for block in blocks]))
        weight = x.new_ones(len(x)) if found is None else found.double()
        self.total = weight.sum().item()
        mean = weight @ x / self.total
        self.mean = mean.float()
        x = (x - mean) * weight.sqrt()[:, None]
        values, vectors = torch.linalg.eigh(x @ x.T)
        kept = values > values[-1].clamp(min=torch.finfo(torch.float64).tiny) * _RANK_TOLERANCE
        self._spectrum = values[kept].float()
        self._vectors = (x.T @ vectors[:, kept] / values[kept].sqrt()).float()

    def _centred(self, block: Block, low: bool) -> torch.Tensor:
        x = block.features().sub_(self.mean)
        return x.to(self.low) if low else x

    def _lowered(self) -> list[Block]:
        """Centred rows in the low type, kept."""
        if self._held is None:
            blocks = map_blocks(lambda block: (self._centred(block, low=True), block.labels), self._passes())
            self._held = [Block(x, None, labels) for x, labels in blocks]
        return self._held

    def evaluate(self, theta: torch.Tensor, c: float, low: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The objective's parts, float64, and its gradient at weights and intercepts [C, D + 1] of centred rows."""
        weights, intercept = theta[:, :-1], theta[:, -1]
        factor = weights.T.to(self.low if low else theta.dtype)
        is_held = low and self._hold

        def of_block(block: Block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            x = block.values if is_held else self._centred(block, low)
            losses, residual = self.loss.evaluate((x @ factor).float() + intercept, block.labels)
            return losses, residual.to(x.dtype).T @ x, residual.sum(0)

        loss = torch.zeros(self.loss.num_parts, dtype=torch.float64, device=theta.device)
        gradient = torch.zeros_like(theta)
        for losses, products, sums in map_blocks(of_block, self._lowered() if is_held else self._passes()):
            loss += losses
            gradient[:, :-1] += products
            gradient[:, -1] += sums
        gradient *= c
        gradient[:, :-1] += weights
        penalty = weights.double().square().reshape(self.loss.num_parts, -1).sum(1)
        return c * loss + 0.5 * penalty, gradient

    def preconditioner(self, c: float) -> Callable[[torch.Tensor], torch.Tensor]:
        """The inverse of the Hessian where a descent begins."""
        curvature = c * self.loss.curvature(self.mean.device)[:, None]
        scale = 1 / (1 + self._spectrum * curvature)
        of_intercept = 1 / (self.total * curvature)

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
