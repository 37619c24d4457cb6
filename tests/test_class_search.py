import faiss
import numpy as np
import pytest
from scipy.special import expit, softmax

from clipindex.agreement import measure_agreement
from clipindex.index.approximate import approximate_index, scan_approximately
from clipindex.index.exact import SCAN_SCORES, flat_index, scan, stored_vectors


def unit(number, dim, seed=0):
    raw = np.random.default_rng(seed).normal(size=(number, dim)).astype(np.float32)
    return raw / np.linalg.norm(raw, axis=1, keepdims=True)


@pytest.mark.parametrize(("num_classes", "k"), [(1, 1), (3, 3), (1000, 5), (17, 5)])
def test_neighbours_are_those_of_faiss_and_probabilities_those_of_a_full_softmax(num_classes, k):
    queries, vectors = unit(300, 64), unit(num_classes, 64, seed=1)
    index = flat_index(vectors)
    found = scan(index, queries, k, logit_scale=100.0, logit_bias=None)
    cosines, ids = index.search(queries, k)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_allclose(found.cosines, cosines, atol=1e-6)
    logits = 100.0 * queries.astype(np.float64) @ vectors.T.astype(np.float64)
    expected = np.take_along_axis(softmax(logits, axis=1), ids, axis=1)
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-5, rtol=1e-4)


def test_sigmoid_models_have_a_probability_for_each_class():
    queries, vectors = unit(20, 64), unit(9, 64, seed=1)
    found = scan(flat_index(vectors), queries, 4, logit_scale=117.3, logit_bias=-12.9)
    np.testing.assert_allclose(found.probabilities, expit(117.3 * found.cosines - 12.9), atol=1e-6)


def test_it_is_an_inner_product_index_of_unit_vectors():
    vectors = unit(7, 32)
    index = flat_index(vectors)
    assert index.metric_type == faiss.METRIC_INNER_PRODUCT
    np.testing.assert_array_equal(stored_vectors(index), vectors)
    with pytest.raises(AssertionError, match="unit norm"):
        flat_index(2 * vectors)


def test_many_classes_are_met_by_few_queries_at_once():
    vectors = unit(SCAN_SCORES // 100, 4)
    queries = unit(103, 4, seed=1)
    found = scan(flat_index(vectors), queries, 1, logit_scale=1.0, logit_bias=None)
    for at in (0, 99, 100, 102):  # at both ends of both blocks
        scores = vectors @ queries[at]
        assert scores[found.ids[at, 0]] == pytest.approx(scores.max(), abs=1e-6)
        expected = np.exp(scores.max()) / np.exp(scores.astype(np.float64)).sum()
        assert found.probabilities[at, 0] == pytest.approx(expected, rel=1e-3)


def clip_like(number, dim, seed):
    """Unit vectors around a mean that is most of each, as texts have."""
    mean = 3 * unit(1, dim, seed=99)
    raw = mean + unit(number, dim, seed)
    return raw / np.linalg.norm(raw, axis=1, keepdims=True)


@pytest.mark.parametrize(("num_classes", "k"), [(1, 1), (5, 7), (2048, 5), (20_011, 5), (20_011, 40), (3000, 3000)])
def test_approximate_neighbours_are_nearly_the_exact_ones(num_classes, k):
    vectors, queries = clip_like(num_classes, 64, seed=1), unit(600, 64, seed=2).astype(np.float16)
    index = flat_index(vectors)
    exact = scan(index, queries, k, logit_scale=60.0, logit_bias=None)
    found = scan_approximately(approximate_index(index), queries, k, logit_scale=60.0, logit_bias=None)
    assert found.ids.shape == exact.ids.shape
    assert {field.dtype for field in found} == {field.dtype for field in exact}
    assert (found.ids[:, 0] == exact.ids[:, 0]).mean() > 0.995
    np.testing.assert_allclose(found.cosines, exact.cosines, atol=1e-3 if k == 40 else 2e-4)
    np.testing.assert_allclose(found.probabilities, exact.probabilities, atol=0.005)
    assert (found.probabilities.sum(axis=1) < 1 + 1e-5).all()
    if k >= num_classes:
        np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, atol=1e-5)
    rows = np.arange(600)[:, None]
    cosines = (queries.astype(np.float32) @ vectors.T)[rows, found.ids]
    np.testing.assert_allclose(found.cosines, cosines, atol=1e-6)  # what is found has its exact cosine


def test_approximate_probabilities_survive_large_logits_and_sigmoids():
    vectors = np.vstack([clip_like(3000, 64, seed=1), -clip_like(3000, 64, seed=1)])
    queries = vectors[:50]
    index = approximate_index(flat_index(vectors))
    found = scan_approximately(index, queries, 2, logit_scale=1000.0, logit_bias=None)
    exact = scan(index.exact, queries, 2, logit_scale=1000.0, logit_bias=None)
    np.testing.assert_allclose(found.probabilities, exact.probabilities, atol=0.01)
    found = scan_approximately(index, queries, 2, logit_scale=117.3, logit_bias=-112.9)
    np.testing.assert_allclose(found.probabilities, expit(117.3 * found.cosines - 112.9), atol=1e-5)


def test_agreement_tells_an_index_of_other_vectors_from_its_own():
    vectors, queries = clip_like(5000, 64, seed=1), unit(300, 64, seed=2)
    index = approximate_index(flat_index(vectors))
    good = measure_agreement(index, queries, 5, logit_scale=60.0, logit_bias=None)
    assert (good.rows, good.k) == (300, 5)
    assert good.same_top1 > 0.99 and good.same_top_k > 0.95 and good.most_probability_off < 0.005
    other = index._replace(centred=index.centred.flip(0))
    bad = measure_agreement(other, queries, 5, logit_scale=60.0, logit_bias=None)
    assert bad.same_top1 < 0.1 and bad.same_top_k < 0.1
    twins = approximate_index(flat_index(np.repeat(vectors[:1000], 5, axis=0)))
    same = measure_agreement(twins, queries, 5, logit_scale=60.0, logit_bias=None)
    assert same.same_top1 > 0.99 and same.same_top_k > 0.95  # whichever of five it is
    assert measure_agreement(index, queries[:0], 5, logit_scale=60.0, logit_bias=None) is None
