import faiss
import numpy as np
import pytest
from scipy.special import expit, softmax

from clipindex.index.exact import flat_index, scan, stored_vectors


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
