import itertools

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from clipindex.metrics import ClassificationCounts, retrieval_recall, wilson_interval


@pytest.mark.parametrize("num_classes", [6, 40])
def test_agrees_with_scikit_learn_over_any_batches(num_classes):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(500, num_classes))
    labels = rng.integers(0, num_classes - 1, 500)  # the last class never occurs
    scores[np.arange(500), labels] += 1
    ids = np.argsort(-scores, axis=1)[:, :5].astype(np.int32)
    counts = ClassificationCounts(num_classes)
    for first in range(0, 500, 77):
        counts.add(labels[first : first + 77], ids[first : first + 77])
    overall = counts.overall()
    assert overall["labelled"] == 500
    assert overall["acc1"] == pytest.approx((ids[:, 0] == labels).mean())
    assert overall["acc5"] == pytest.approx(top_k_accuracy_score(labels, scores, k=5, labels=range(num_classes)))
    with pytest.warns(UserWarning, match="y_pred contains classes"):
        assert overall["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(labels, ids[:, 0]))
    assert counts.per_class()[-1] == {"support": 0, "recall": None, "recall5": None}
    assert sum(row["support"] for row in counts.per_class()) == 500


def test_no_acc5_below_five_classes_and_nothing_without_labels():
    counts = ClassificationCounts(3)
    assert counts.overall()["acc1"] is None
    counts.add(np.array([0, 1]), np.array([[0, 1, 2], [2, 1, 0]], np.int32))
    assert counts.overall() == {"labelled": 2, "acc1": 0.5, "acc5": None, "mean_per_class_recall": 0.5}


def test_wilson_intervals_are_those_of_the_literature():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    for hits, total, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        assert wilson_interval(hits, total) == pytest.approx((low, high), abs=1e-4)
    assert wilson_interval(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)


def test_calibration_error_and_confusion_over_any_batches():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 400)
    ids = np.argsort(-rng.random((400, 6)), axis=1)
    confidence = rng.random(400)
    confidence[:3] = (0.0, 1.0, 1 / 15)  # on the edges of bins, which belong to the lower one
    counts = ClassificationCounts(6)
    for first in range(0, 400, 93):
        counts.add(labels[first : first + 93], ids[first : first + 93], confidence[first : first + 93])
    matrix = np.zeros((6, 6), int)
    label, best, samples = counts.confusion()
    matrix[label, best] = samples
    np.testing.assert_array_equal(matrix, confusion_matrix(labels, ids[:, 0]))
    hits, expected = ids[:, 0] == labels, 0.0
    for at in range(15):
        inside = (confidence > at / 15) & (confidence <= (at + 1) / 15) if at else confidence <= 1 / 15
        expected += abs(hits[inside].mean() - confidence[inside].mean()) * inside.sum() / 400
    error, bins = counts.calibration()
    assert error == pytest.approx(expected)
    assert sum(one["samples"] for one in bins) == 400


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6, 9])
def test_answers_of_one_cosine_count_as_the_mean_over_their_orders(k):
    queries = [(0, 1, 1), (2, 1, 1), (1, 4, 1), (0, 5, 3), (2, 3, 2), (7, 2, 1)]  # above, level, right
    shares = []
    for above, level, right in queries:
        orders = list(itertools.permutations([True] * right + [False] * (level - right)))
        shares.append(np.mean([any(([False] * above + list(order))[:k]) for order in orders]))
    assert retrieval_recall(*np.array(queries).T, k) == pytest.approx(np.mean(shares))


def test_an_interval_holds_the_share_itself():
    for total in range(1, 3000):
        for hits in (0, 1, total - 1, total):
            low, high = wilson_interval(hits, total)
            assert 0 <= low <= hits / total <= high <= 1
