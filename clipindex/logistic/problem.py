"""What is to be minimised: the objective and its gradient, and what is known of its shape before a descent begins."""

from collections.abc import Callable, Sequence

import torch

from clipindex.logistic.blocks import Block, Passes, map_blocks
from clipindex.logistic.losses import Loss, Multinomial
from clipindex.products import multiply
from clipindex.threads import one_thread

_RANK_TOLERANCE = 1e-12  # of the largest eigenvalue; in float64, rows that say the same come out at 1e-16 of it


class Problem:
    """Labelled rows, as the objective for any `c` needs them: one pass finds their mean and their second moments.

    Args:
        passes: The rows.
        num_classes: C.
        class_weights: Float32 [C], factors of the losses of each class; ones by default.
        loss: In place of a multinomial one with these weights.
        low: A type whose matrix products are faster on the device than those of float32, if there is one.
    """

    def __init__(
        self,
        passes: Passes,
        num_classes: int,
        *,
        class_weights: torch.Tensor | None = None,
        loss: Loss | None = None,
        low: torch.dtype | None = None,
    ) -> None:
        self.num_classes = num_classes
        self.loss = loss if loss is not None else Multinomial(num_classes, class_weights)
        self.low = low
        self._passes = passes
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
            x = x.mul_(weight.sqrt()[:, None])  # float32: rounded to 8 bits, products hide small moments
            return weight.sum(dtype=torch.float64), first.double(), multiply(x.T, x).double()

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

    def evaluate(self, theta: torch.Tensor, c: float, low: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The objective's parts, float64, and its gradient at weights and intercepts [C, D + 1] of centred rows."""
        weights, intercept = theta[:, :-1], theta[:, -1]
        factor = weights.T.to(self.low if low else theta.dtype)

        def of_block(block: Block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            x = self._centred(block, low)
            losses, residual = self.loss.evaluate(multiply(x, factor).float() + intercept, block.labels)
            return losses, multiply(residual.to(x.dtype).T, x), residual.sum(0)

        loss = torch.zeros(self.loss.num_parts, dtype=torch.float64, device=theta.device)
        gradient = torch.zeros_like(theta)
        for losses, products, sums in map_blocks(of_block, self._passes()):
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
