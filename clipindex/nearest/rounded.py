"""Products of unit vectors in a few bits, and what they say for sure of cosines."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from clipindex.types import IntArray


class Arithmetic(NamedTuple):
    """Where vectors are multiplied, and what they are rounded to for that."""

    device: torch.device
    dtype: torch.dtype

    @property
    def unit_roundoff(self) -> float:
        """Of a number, the share by which rounding moves it at most: 2^-8 in bf16."""
        return torch.finfo(self.dtype).eps / 2

    def rounded(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors [n, D] on the device, rounded."""
        return vectors.to(self.device, self.dtype)

    def error(self, dim: int) -> float:
        """By how much a product of two rounded unit vectors differs from their cosine, before it is rounded itself.

        Rounding moves a unit vector by the unit roundoff u at most, since it moves each number by that share: and so,
        by Cauchy and Schwarz, the product of two by 2 u + u^2. To that comes a sum of D products in float32, in
        whatever order, with additions that round (2^-24) or cut off (2^-23); twice that covers what is too small for
        fp16 as well.
        """
        return 2 * self.unit_roundoff + self.unit_roundoff**2 + dim * 2.0**-22


class Limits(NamedTuple):
    """What a rounded product says of a cosine and a threshold."""

    possible: float
    """No cosine is at the threshold whose product is below this."""
    sure: float
    """Every cosine is whose product is above this."""


def limits(threshold: float, arithmetic: Arithmetic, dim: int) -> Limits:
    """Both sides of a threshold between which the product leaves open where the cosine is.

    Rounding keeps the order of numbers: so a product, which is rounded once it is summed, is compared with limits that
    are rounded as well, and its own rounding adds nothing to the error.
    """
    sides = torch.tensor([threshold - arithmetic.error(dim), threshold + arithmetic.error(dim)]).to(arithmetic.dtype)
    return Limits(*sides.tolist())


def nonzero(mask: torch.Tensor) -> IntArray:
    """Places [k, 2] where a mask [n, m] is true; few, for which NumPy takes a sixth of PyTorch's time on a CPU."""
    if mask.device.type != "cpu":
        places: IntArray = mask.nonzero().cpu().numpy()
        return places
    return np.stack(np.divmod(np.flatnonzero(mask.numpy()), mask.shape[1]), axis=1)


@contextlib.contextmanager
def full_sums(device: torch.device) -> Iterator[None]:
    """Meanwhile a CUDA device sums products in float32, as `Arithmetic.error` supposes; a CPU does so anyway."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    full = _full_settings()
    before = {name: _setting(name) for name in full}
    try:
        for name, value in full.items():
            setattr(matmul, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)


def _full_settings() -> dict[str, Any]:
    """Of `torch.backends.cuda.matmul`, those that this version of PyTorch has."""
    matmul = torch.backends.cuda.matmul
    names = ["allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"]
    names += ["allow_fp16_accumulation"] if hasattr(matmul, "allow_fp16_accumulation") else []  # since 2.7
    # Since 2.9, where reading allow_tf32 is an error once its user has set the other.
    full = {"fp32_precision": "ieee"} if hasattr(matmul, "fp32_precision") else {"allow_tf32": False}
    return {**dict.fromkeys(names, False), **full}


def _setting(name: str) -> Any:  # noqa: ANN401
    """As it has to be given to be as it is: setting one of two alone would set the other, which is on by default."""
    matmul = torch.backends.cuda.matmul
    value, split = getattr(matmul, name), getattr(matmul, f"{name}_split_k", None)
    return value if split is None else (value, split)
