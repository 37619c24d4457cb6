import threading

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from clipindex.products import multiply
from clipindex.threads import map_in_order, one_thread


def matrix(rows, columns, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(rows * columns).normal(size=(rows, columns))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows, shared, columns", [(1, 512, 300), (65, 64, 65), (300, 1, 7), (0, 8, 3), (3, 0, 5)])
def test_products_are_those_of_pytorch(rows, shared, columns, dtype):
    left, right = matrix(rows, shared, dtype), matrix(shared, columns, dtype)
    found = multiply(left, right)
    assert found.dtype == dtype
    torch.testing.assert_close(found, left @ right, rtol=1e-5, atol=1e-4)


def test_it_does_not_matter_how_factors_lie_in_memory():
    wide = matrix(40, 41)
    for left in (wide[:, :-1], wide.T[:-1], wide[:, 1:][::2], wide[:, :40:2], wide[:1].expand(40, 41)[:, 1:]):
        for right in (wide[: left.shape[1]], matrix(80, left.shape[1]).T, matrix(left.shape[1] * 2, 30)[::2]):
            torch.testing.assert_close(multiply(left, right), left @ right)


def test_gradients_are_kept_where_they_are_asked_for():
    weights = matrix(3, 4).requires_grad_()
    multiply(matrix(5, 3), weights).sum().backward()
    torch.testing.assert_close(weights.grad, matrix(5, 3).sum(0)[:, None].expand(3, 4))
    with torch.inference_mode():
        inferred = multiply(matrix(5, 3), matrix(3, 4))
    torch.testing.assert_close(inferred, matrix(5, 3) @ matrix(3, 4))


def test_what_is_no_number_stays_so_without_a_warning():
    left = torch.tensor([[torch.inf, 0.0], [torch.nan, 1.0], [3e38, 3e38]])
    found = multiply(left, torch.tensor([[0.0], [10.0]]))
    assert not found[:2].isfinite().any() and found[2].isinf()


def blas_threads():
    return {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"}


@pytest.mark.skipif(max(blas_threads()) < 2, reason="BLAS has one thread in any case")
def test_blas_has_one_thread_until_the_last_who_wants_it_has_gone():
    before, torch_before = blas_threads(), torch.get_num_threads()
    first, second = map_in_order(str, range(9), 2), map_in_order(str, range(9), 2)
    next(first), next(second)
    first.close()
    assert blas_threads() == {1}
    with one_thread():
        second.close()
        other = threading.Thread(target=lambda: list(map_in_order(str, range(9), 2)))
        other.start()
        other.join()
        assert blas_threads() == {1} and torch.get_num_threads() == 1
    assert blas_threads() == before
    torch.set_num_threads(torch_before)  # those of PyTorch come back only in the order of nesting
