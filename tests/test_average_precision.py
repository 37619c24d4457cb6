import threading

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from clipindex.average_precision import ScoreBlock, measure_average_precision
from clipindex.errors import StoreError


def by_sorting(scores, truth):
    """The definition, class by class; equal scores in the order of their rows."""
    found = np.zeros(truth.shape[1])
    for one in range(truth.shape[1]):
        right = truth[np.argsort(-scores[:, one], kind="stable"), one]
        precision = np.cumsum(right) / np.arange(1, len(right) + 1)
        found[one] = precision[right].sum() / max(right.sum(), 1)
    return found


def blocks(scores, truth, at_once):
    for first in range(0, len(scores), at_once):
        part, rows = scores[first : first + at_once], truth[first : first + at_once]
        at, classes = np.nonzero(rows)
        yield ScoreBlock(part.T.copy(), classes, at)


def measured(scores, truth, at_once=100, **options):
    return measure_average_precision(
        truth.shape[1], lambda: blocks(scores, truth, at_once), lambda block: block, **options
    )


def drawn(rows, classes, levels, seed=0):
    """Scores with as many ties as the number of levels makes, and classes of very different frequency."""
    rng = np.random.default_rng(seed)
    truth = rng.random((rows, classes)) < np.linspace(0, 1, classes) ** 3
    scores = rng.normal(size=(rows, classes)) + truth
    return (np.round(scores * levels) / levels).astype(np.float32), truth


@pytest.mark.parametrize("at_once", [1, 7, 100, 10_000])
@pytest.mark.parametrize("levels", [0.4, 3, 1e9])
def test_it_is_that_of_sorting_all_rows(at_once, levels):
    scores, truth = drawn(700, 9, levels)
    found = measured(scores, truth, at_once)
    np.testing.assert_allclose(found.per_class(), by_sorting(scores, truth), rtol=1e-12)
    assert (found.support == truth.sum(0)).all()
    assert found.support[0] == 0 and found.per_class()[0] == 0
    assert found.support[-1] == 700 and found.per_class()[-1] == 1
    assert found.mean() == pytest.approx(by_sorting(scores, truth).mean())


def test_without_ties_it_is_scikit_learns():
    scores, truth = drawn(2000, 6, 1e9, seed=1)
    theirs = [average_precision_score(truth[:, one], scores[:, one]) for one in range(1, 6)]
    np.testing.assert_allclose(measured(scores, truth).per_class()[1:], theirs, rtol=1e-9)


def test_equal_scores_keep_the_order_of_rows():
    truth = np.array([[0], [1], [0], [1]], bool)
    assert measured(np.zeros((4, 1), np.float32), truth).per_class() == pytest.approx([(1 / 2 + 2 / 4) / 2])


def test_no_rows_and_no_positives_are_zero():
    assert measured(np.zeros((0, 3), np.float32), np.zeros((0, 3), bool)).mean() == 0
    assert measured(np.ones((5, 3), np.float32), np.zeros((5, 3), bool)).per_class().tolist() == [0, 0, 0]


def test_passes_that_differ_are_noticed():
    scores, truth = drawn(300, 4, 3)
    for second in (200, 299, 301):
        sizes = iter([300, second])

        def begin(sizes=sizes):
            size = next(sizes)
            return blocks(np.resize(scores, (size, 4)), np.resize(truth, (size, 4)), 100)

        with pytest.raises(StoreError, match="changed while they were read"):
            measure_average_precision(4, begin, lambda block: block)


def test_one_by_one_it_is_the_same_in_the_callers_thread():
    scores, truth = drawn(700, 9, 3)
    threads = set()

    def score(block):
        threads.add(threading.get_ident())
        return block

    found = measure_average_precision(9, lambda: blocks(scores, truth, 100), score, one_by_one=True)
    assert threads == {threading.get_ident()}
    assert (found.per_class() == measured(scores, truth).per_class()).all()


def test_progress_is_of_both_passes():
    told = []
    measured(*drawn(250, 3, 3), on_rows=told.append)
    assert told == [100, 200, 250, 350, 450, 500]
