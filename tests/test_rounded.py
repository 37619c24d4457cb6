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


MATMUL = torch.backends.cuda.matmul
SUMS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
FEWER = "allow_fp16_accumulation"


@pytest.fixture
def settings():
    """Of a CUDA device, which are there without one as well; put back as PyTorch has them at first."""
    yield MATMUL
    for name in SUMS:
        setattr(MATMUL, name, True)
    if hasattr(MATMUL, FEWER):
        setattr(MATMUL, FEWER, False)
    MATMUL.allow_tf32 = False
    if hasattr(MATMUL, "fp32_precision"):
        MATMUL.fp32_precision = "none"


def test_a_cuda_device_sums_in_float32_meanwhile_and_then_as_before(settings):
    names = [name for name in (*SUMS, FEWER, "allow_tf32") if name != FEWER or hasattr(settings, FEWER)]
    for name in names:
        setattr(settings, name, True)
    tf32 = getattr(settings, "fp32_precision", None)
    with pytest.raises(ZeroDivisionError), full_sums(torch.device("cuda")):
        assert not any(getattr(settings, name) for name in names[:-1])
        assert getattr(settings, "fp32_precision", "ieee") == "ieee" and (tf32 or not settings.allow_tf32)
        raise ZeroDivisionError
    assert all(getattr(settings, name) for name in names)
    assert getattr(settings, "fp32_precision", None) == tf32
    with full_sums(CPU):
        assert all(getattr(settings, name) for name in names)


@pytest.mark.skipif(not hasattr(MATMUL, "fp32_precision"), reason="this PyTorch has allow_tf32 alone")
def test_who_sets_the_precision_of_float32_by_its_newer_name_is_served(settings):
    settings.fp32_precision = "tf32"
    with pytest.raises(RuntimeError, match="mix of the legacy and new"):
        _ = settings.allow_tf32
    with full_sums(torch.device("cuda")):
        assert settings.fp32_precision == "ieee"
    assert settings.fp32_precision == "tf32"


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.skipif(not hasattr(MATMUL, f"{SUMS[0]}_split_k"), reason="this PyTorch has no such setting")
def test_sums_that_were_not_to_be_split_are_not_afterwards(settings, name):
    setattr(settings, name, (False, False))
    with full_sums(torch.device("cuda")):
        assert not getattr(settings, name)
    assert not getattr(settings, name) and not getattr(settings, f"{name}_split_k")


def test_places_of_what_is_true():
    mask = torch.tensor([[False, True, False], [False, False, False], [True, False, True]])
    assert nonzero(mask).tolist() == mask.nonzero().tolist()
    assert nonzero(mask[:, :0]).shape == (0, 2)
