import numpy as np
import pytest
import torch
from conftest import CUDA
from probe_data import features
from sklearn.linear_model import LogisticRegression

from clipindex.logistic import Block, Problem, block_rows, fit


def problem(x, y, *, at_once=300, **options):
    x, y = torch.from_numpy(x), torch.from_numpy(y)

    def passes():
        for first in range(0, len(x), at_once):
            rows = slice(first, first + at_once)
            yield Block(x[rows], None, y[rows])

    return Problem(passes, int(y.max()) + 1, **options)


def objective(weights, intercept, x, y, c, class_weights=None):
    """Of scikit-learn, in float64."""
    logits = x.astype(np.float64) @ np.asarray(weights, np.float64).T + np.asarray(intercept, np.float64)
    most = logits.max(1)
    losses = np.log(np.exp(logits - most[:, None]).sum(1)) + most - logits[np.arange(len(y)), y]
    if class_weights is not None:
        losses = losses * class_weights[y]
    return c * losses.sum() + 0.5 * (np.asarray(weights, np.float64) ** 2).sum()


def reference(x, y, c, **options):
    return LogisticRegression(C=c, max_iter=10_000, tol=1e-7, **options).fit(x.astype(np.float64), y)


@pytest.mark.parametrize("low", [None, torch.bfloat16])
@pytest.mark.parametrize("c", [1e-5, 0.01, 0.316, 30.0])
def test_the_minimum_is_scikit_learns(c, low):
    x, y = features(700)
    found, expected = fit(problem(x, y, low=low), c), reference(x, y, c)
    best = objective(expected.coef_, expected.intercept_, x, y, c)
    assert found.converged
    assert objective(found.weights, found.intercept, x, y, c) == pytest.approx(best, rel=1e-5)
    assert found.objective == pytest.approx(best, rel=1e-5)
    ours = torch.softmax(torch.from_numpy(x) @ found.weights.T + found.intercept, 1).numpy()
    np.testing.assert_allclose(ours, expected.predict_proba(x.astype(np.float64)), atol=0.01)


def test_two_classes_have_scikit_learns_single_vector_of_weights():
    x, y = features(800, classes=2)
    found, expected = fit(problem(x, y), 0.316), reference(x, y, 0.316)
    np.testing.assert_allclose((found.weights[1] - found.weights[0])[None], expected.coef_, atol=0.01)
    logits = x.astype(np.float64) @ expected.coef_[0] + expected.intercept_[0]
    losses = np.logaddexp(0, np.where(y == 1, -logits, logits))
    assert found.objective == pytest.approx(0.316 * losses.sum() + 0.5 * (expected.coef_**2).sum(), rel=1e-5)


def test_balanced_classes_count_as_scikit_learns_do():
    x, y = features(2000)
    kept = (y != 3) | (np.arange(2000) % 8 == 0)
    x, y = x[kept], y[kept]
    counts = np.bincount(y)
    weights = (len(y) / (len(counts) * counts)).astype(np.float32)
    found = fit(problem(x, y, class_weights=torch.from_numpy(weights)), 0.1)
    expected = reference(x, y, 0.1, class_weight="balanced")
    best = objective(expected.coef_, expected.intercept_, x, y, 0.1, weights)
    assert objective(found.weights, found.intercept, x, y, 0.1, weights) == pytest.approx(best, rel=1e-5)


def test_blocks_their_order_and_scale_do_not_matter():
    x, y = features(900)
    whole = fit(problem(x, y, at_once=900), 0.316)
    order = np.argsort(y)  # as corpora lie that were packed class by class
    parts = fit(problem(x[order], y[order], at_once=77), 0.316)
    assert parts.objective == pytest.approx(whole.objective, rel=1e-5)
    norms = torch.from_numpy(np.linalg.norm(x, axis=1))
    scaled = Problem(lambda: [Block(torch.from_numpy(x) / norms[:, None], norms, torch.from_numpy(y))], 7)
    assert fit(scaled, 0.316).objective == pytest.approx(whole.objective, rel=1e-5)


def test_a_fit_begins_where_another_ended():
    x, y = features(1500)
    posed = problem(x, y)
    cold = fit(posed, 1.0)
    warm = fit(posed, 1.0, start=fit(posed, 0.9))
    assert warm.passes < cold.passes
    assert warm.objective == pytest.approx(cold.objective, rel=1e-5)


def test_far_fewer_passes_than_scikit_learn_and_lower():
    x, y = features(3000, dim=96, classes=10)
    found = fit(problem(x, y), 0.316)
    theirs = LogisticRegression(C=0.316, max_iter=1000).fit(x, y)
    assert found.passes < theirs.n_iter_[0] / 3
    assert found.objective < objective(theirs.coef_, theirs.intercept_, x, y, 0.316)


@pytest.mark.parametrize("c", [0.316, 1e6])
def test_fewer_rows_than_dimensions_and_classes_that_a_line_parts(c):
    x, y = features(30, dim=64, classes=3, noise=0)
    found = fit(problem(x, y), c)
    assert np.isfinite(found.objective)
    assert ((torch.from_numpy(x) @ found.weights.T + found.intercept).argmax(1).numpy() == y).all()


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("c", [0.01, 0.316, 30.0])
def test_far_fewer_rows_than_dimensions_in_any_blocks(c, repeats):
    x, y = features(40 // repeats, dim=512, classes=4)
    x, y = np.tile(x, (repeats, 1)), np.tile(y, repeats)  # rows that come again have no rank of their own
    counts = np.bincount(y)
    weights = (len(y) / (len(counts) * counts)).astype(np.float32)
    expected = reference(x, y, c, class_weight="balanced")
    best = objective(expected.coef_, expected.intercept_, x, y, c, weights)
    for at_once in (7, 300):
        found = fit(problem(x, y, at_once=at_once, class_weights=torch.from_numpy(weights)), c)
        assert found.converged
        assert objective(found.weights, found.intercept, x, y, c, weights) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("low", [None, torch.bfloat16])
@pytest.mark.parametrize("c", [1e6])
def test_a_weak_penalty_does_not_leave_a_fit_where_it_began(c, low):
    x, y = features(320, dim=64, classes=10, noise=0)
    # A spectrum of six decades in directions of no axis: rounded to 8 bits, its moments are lost in each other.
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0]
    x = ((x @ basis) * np.logspace(0.5, -2.5, 64) @ basis.T).astype(np.float32)
    found = fit(problem(x, y, low=low), c)
    right = (torch.from_numpy(x) @ found.weights.T + found.intercept).argmax(1).numpy() == y
    assert right.mean() > 0.9
    assert found.objective < 0.5 * c * len(y) * np.log(10)


def test_passes_end_where_they_are_bounded():
    x, y = features(1500)
    found = fit(problem(x, y), 100.0, max_passes=3)
    assert (found.passes, found.converged) == (3, False)


def test_blocks_are_smaller_for_many_classes():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert block_rows(100_000, cpu) < block_rows(2000, cpu) < block_rows(2, cpu) < block_rows(2, gpu)


@pytest.mark.cuda
@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_a_gpu_finds_the_same_minimum(low):
    x, y = features(3000)
    here = fit(problem(x, y), 0.316)
    rows, labels = torch.from_numpy(x).to(CUDA), torch.from_numpy(y).to(CUDA)
    there = fit(Problem(lambda: [Block(rows, None, labels)], 7, low=low), 0.316)
    assert there.objective == pytest.approx(here.objective, rel=1e-5)
    assert there.weights.device.type == CUDA
