"""Products of float32 matrices: on a CPU by NumPy; rows widened for them, and memory to put them in."""

import threading
from typing import Any

import numpy as np
import torch

from clipindex.types import Float32Array


def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right``; float32 matrices on a CPU by NumPy, on the memory of the tensors.

    PyTorch's wheels multiply float32 by MKL, which keeps its AVX-512 kernels from AMD's cores; the OpenBLAS of NumPy's
    wheels has them for all. On one core of an EPYC (Zen 5), [2048, 512] by [512, 100]: 213 against 97 GFLOP/s, and 331
    against 109 of a matrix by its own transpose, of which NumPy computes one half. Where OpenBLAS has no more than
    AVX2: 119 against 97, and 201. Processors of other makers were not measured.

    To be called from within `threads.map_in_order` or `threads.one_thread`. Elsewhere OpenBLAS has a team of threads,
    which spin for a while after a product and take the cores from PyTorch's: together they took twice to three times as
    long as PyTorch alone.

    Args:
        left: [n, d], contiguous or the transpose of what is; of others there is a copy.
        right: [d, m], likewise.

    Returns:
        [n, m], of the same type and on the same device. It has no gradient where the factors were float32 on a CPU and
        needed none themselves.
    """
    if any(_is_other(matrix) for matrix in (left, right)):
        return left @ right
    with np.errstate(all="ignore"):  # what is no number is for the caller to find, as in a tensor
        return torch.from_numpy(np.matmul(_array(left), _array(right)))


def _is_other(matrix: torch.Tensor) -> bool:
    return matrix.device.type != "cpu" or matrix.dtype != torch.float32 or matrix.requires_grad


def _array(matrix: torch.Tensor) -> Float32Array:
    """A view, of what BLAS can read: NumPy multiplies anything else number by number."""
    rows, columns = matrix.stride()
    is_plain = (columns == 1 and rows >= matrix.shape[1]) or (rows == 1 and columns >= matrix.shape[0])
    array: Float32Array = (matrix if is_plain else matrix.contiguous()).numpy()
    return array


def widened(queries: np.ndarray[Any, Any]) -> Float32Array:
    """Queries [N, D] in float32; PyTorch widens half floats ten times as fast as NumPy."""
    wide = scratch("queries", *queries.shape)
    torch.from_numpy(wide).copy_(torch.from_numpy(queries))
    return wide


_memory = threading.local()


def scratch(name: str, rows: int, columns: int) -> Float32Array:
    """Memory [rows, columns] that a thread uses again: faulting fresh pages in costs a fifth of the product."""
    memory: Float32Array | None = getattr(_memory, name, None)
    if memory is None or memory.size < rows * columns:
        memory = np.empty(rows * columns, np.float32)
        setattr(_memory, name, memory)
    return memory[: rows * columns].reshape(rows, columns)
