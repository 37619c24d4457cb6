import numpy as np
import pytest
import torch

from clipindex.nearest import Arithmetic, full_sums, limits, nonzero

CPU = torch.device("cpu")
THRESHOLDS = [0.3, 0.9, 0.95, 0.99, 0.9999]


def pairs(dim, threshold, seed):
    """Unit vectors [n, D] twice, whose cosines lie about a threshold."""
    rng = np.random.default_rng(seed)
    ones = rng.normal(size=(2000, dim)) * np.arange(1, dim + 1) ** -0.5
    ones /= np.linalg.norm(ones, axis=1, keepdims=True)
    aside = rng.normal(size=ones.shape)
    aside -= (aside * ones).sum(axis=1, keepdims=True) * ones
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    cosines = np.clip(threshold + rng.normal(size=(len(ones), 1)) * 0.01, -1, 1)
    return torch.from_numpy(ones), torch.from_numpy(cosines * ones + np.sqrt(1 - cosines**2) * aside)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("dim", [48, 512])
def test_limits_leave_no_pair_on_the_wrong_side(dtype, threshold, dim):
    arithmetic = Arithmetic(CPU, dtype)
    least, sure = limits(threshold, arithmetic, dim)
    ones, others = pairs(dim, threshold, seed=dim)
    cosines = (ones * others).sum(dim=1)
    products = (arithmetic.rounded(ones) @ arithmetic.rounded(others).T).diagonal().float()
    assert (products[cosines >= threshold] >= least).all()
    assert (cosines[products > sure] >= threshold).all()
    assert ((cosines >= threshold) != (products >= threshold)).any() or dtype == torch.float32  # rounding does err


def test_the_error_is_reached_by_the_worst_vectors():
    """All of whose numbers lie half way between two of bf16, and are rounded the same way."""
    arithmetic = Arithmetic(CPU, torch.bfloat16)
    halfway = 1 + 2.0**-8 - 2.0**-20  # down to 1
    vector = torch.full((1, 512), halfway, dtype=torch.float64) * 2.0**-4.5 / halfway * (1 + 2.0**-9)
    unit = vector / vector.norm()
    product = (arithmetic.rounded(unit).double() ** 2).sum()
    assert abs(product - 1) <= arithmetic.error(512)
    assert arithmetic.error(512) < 3 * 2.0**-8


def test_the_error_grows_with_what_is_rounded_away():
    fp32, fp16, bf16 = (Arithmetic(CPU, dtype).error(512) for dtype in (torch.float32, torch.float16, torch.bfloat16))
    assert 0 < fp32 < fp16 < bf16


def test_a_cuda_device_sums_in_float32_meanwhile_and_then_as_before():
    """Settings, which are there without such a device as well."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = True
    try:
        with pytest.raises(ZeroDivisionError), full_sums(torch.device("cuda")):
            assert not matmul.allow_bf16_reduced_precision_reduction and not matmul.allow_tf32
            raise ZeroDivisionError
        assert matmul.allow_bf16_reduced_precision_reduction
        with full_sums(CPU):
            assert matmul.allow_bf16_reduced_precision_reduction
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def test_places_of_what_is_true():
    mask = torch.tensor([[False, True, False], [False, False, False], [True, False, True]])
    assert nonzero(mask).tolist() == mask.nonzero().tolist()
    assert nonzero(mask[:, :0]).shape == (0, 2)
