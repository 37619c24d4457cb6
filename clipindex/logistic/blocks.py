"""Rows in blocks, over which passes are made."""

import itertools
from collections.abc import Callable, Generator, Iterable
from typing import NamedTuple, TypeVar

import torch

from clipindex.threads import map_in_order, num_cores, one_thread

Result = TypeVar("Result")

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


def block_rows(num_classes: int, device: torch.device) -> int:
    """How many rows a block may have."""
    most, logits = _AT_ONCE["cpu" if device.type == "cpu" else "cuda"]
    return max(256, min(most, logits // num_classes))


def map_blocks(function: Callable[[Block], Result], blocks: Iterable[Block]) -> Generator[Result, None, None]:
    """Results in order. On a CPU each core has a block of its own: teams of threads wait for each other."""
    blocks = iter(blocks)
    first = list(itertools.islice(blocks, 2))
    if first and first[0].values.device.type != "cpu":
        yield from map(function, itertools.chain(first, blocks))
    elif len(first) < 2:
        with one_thread():
            yield from map(function, first)
    else:
        yield from map_in_order(function, itertools.chain(first, blocks), num_cores())
