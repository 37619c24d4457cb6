"""The linear probe of CLIP_benchmark: AdamW on unit features (facts of clip_benchmark/metrics/linear_probe.py, 1.6).

Its rows are shuffled by another generator than PyTorch's loaders use there, and its products are float32 where it uses
float16 on CUDA: so numbers agree as two runs of it with different seeds do.
"""

import math
from collections.abc import Callable

import torch

from clipindex.logistic import Linear
from clipindex.probing.protocols import Trial, measure, search_peak
from clipindex.probing.rows import Held, Ids
from clipindex.threads import one_thread

RATE = 0.1
EPOCHS = 10
BATCH = 64
_STRONGEST = 2
"""Weight decays are 10 ** (-6 … 2), 97 of them."""


@one_thread()
def train_adamw(
    rows: Held, chosen: Ids | None, num_classes: int, decay: float, seed: int, on_epoch: Callable[[], None]
) -> Linear:
    """Ten epochs of batches of 64 at a rate that falls from 0.1 to 0 along a cosine, step by step.

    Args:
        rows: Of unit features.
        chosen: Which of them; all by default.
        num_classes: C.
        decay: AdamW's decoupled weight decay, of weights and intercepts.
        seed: Of the first weights and the order of rows.
        on_epoch: Called after each.
    """
    device = rows.embedding.device
    numbers = torch.arange(len(rows.labels)) if chosen is None else torch.from_numpy(chosen)
    random = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(rows.embedding.shape[1])  # of torch.nn.Linear's first weights and intercepts
    weights, intercept = (
        ((torch.rand(shape, generator=random) * 2 - 1) * bound).to(device).requires_grad_()
        for shape in ((num_classes, rows.embedding.shape[1]), (num_classes,))
    )
    optimizer = torch.optim.AdamW([weights, intercept], lr=RATE, weight_decay=decay, fused=True)
    steps = EPOCHS * math.ceil(len(numbers) / BATCH)
    step = 0
    for _ in range(EPOCHS):
        order = numbers[torch.randperm(len(numbers), generator=random)].to(device)
        for first in range(0, len(order), BATCH):
            batch = order[first : first + BATCH]
            optimizer.param_groups[0]["lr"] = 0.5 * (1 + math.cos(math.pi * step / steps)) * RATE
            logits = torch.nn.functional.linear(rows.embedding[batch].float(), weights, intercept)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, rows.labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
        on_epoch()
    return weights.detach(), intercept.detach()


def search_decay(
    rows: Held, training: Ids, validation: Ids, num_classes: int, seed: int, on_epoch: Callable[[], None]
) -> tuple[float, list[Trial]]:
    """The weight decay that is best on validation rows, by CLIP's search; equal peaks go to the weakest, as there."""
    held_out = rows.passes(validation)
    trials: list[Trial] = []

    def accuracy(point: int) -> float:
        decay = 10 ** (_STRONGEST - point / 12)
        acc1 = measure(held_out, *train_adamw(rows, training, num_classes, decay, seed, on_epoch))
        trials.append(Trial(strength=decay, score=acc1, passes=EPOCHS, converged=True))
        return acc1

    return 10 ** (_STRONGEST - search_peak(accuracy) / 12), trials
