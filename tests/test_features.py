"""Directories of features before the projection, alone and beside those after it, and of plain backbones."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpus import encoded, labelled, picture, write_tar

from clipindex import classify, embed, read_embeddings, search, verify
from clipindex.errors import FingerprintError, ModelError, StoreError
from clipindex.retrieval import Query
from clipindex.store import NORM_COLUMNS, PRE_PROJECTION, find_vectors, read_dataset

HOW = {"precision": "fp32", "device": "cpu"}
DEMO = {"model": "demo", **HOW}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("features")
    write_tar(root / "corpus" / "0.tar", labelled([f"k{at}" for at in range(40)]))
    write_tar(root / "corpus" / "1.tar", labelled([f"l{at}" for at in range(9)], seed=7))
    for features in ("projected", "pre-projection", "both"):
        embed(str(root / "corpus"), root / features, features=features, **DEMO)
    embed(str(root / "corpus"), root / "timm", model="timm:test_resnet", random_init=0, **HOW)
    return root


def vectors(folder, column="embedding"):
    """Unit vectors and norms of all rows."""
    batches = list(read_embeddings(folder, (NORM_COLUMNS[column],), vectors=column))
    return (
        np.concatenate([batch.embedding for batch in batches]),
        np.concatenate([batch.columns[NORM_COLUMNS[column]].to_numpy() for batch in batches]),
    )


def test_both_columns_hold_what_the_single_directories_do(folders):
    both = folders / "both"
    for folder, column in (("projected", "embedding"), ("pre-projection", PRE_PROJECTION)):
        unit, norms = vectors(folders / folder)
        there, their_norms = vectors(both, column)
        np.testing.assert_allclose(there.astype(np.float32), unit.astype(np.float32), atol=2e-3)
        np.testing.assert_allclose(their_norms, norms, rtol=1e-3)
        assert find_vectors(both, read_dataset(both), read_dataset(folders / folder).model) == column
    assert vectors(folders / "pre-projection")[0].shape == (49, 512)
    with pytest.raises(FingerprintError, match="timm:test_resnet"):
        find_vectors(both, read_dataset(both), read_dataset(folders / "timm").model)


@pytest.mark.parametrize("name", ["projected", "pre-projection", "both", "timm"])
def test_each_kind_of_directory_verifies_and_its_images_find_themselves(folders, tmp_path, name):
    summary = verify(folders / name, [str(folders / "corpus")], deep=True, **HOW)
    assert (summary.rows, summary.faults) == (49, [])
    assert summary.least_cosine > 0.9999
    (tmp_path / "k.jpg").write_bytes(encoded(picture(68, 48, seed=4), quality=90))
    (hits,) = search(folders / name, [Query(images=(tmp_path / "k.jpg",))], k=3, **HOW)
    assert hits[0].key == "k4"
    assert hits[0].cosine > 0.999


def test_a_bad_vector_before_the_projection_is_found(folders, tmp_path):
    embed(str(folders / "corpus" / "1.tar"), tmp_path / "out", features="both", **DEMO)
    (path,) = (tmp_path / "out" / "embeddings").glob("*.parquet")
    table = pq.read_table(path)
    flat = table.column(PRE_PROJECTION).combine_chunks().flatten().to_numpy().copy()
    flat[512 * 4 : 512 * 5] = 0
    at = table.schema.get_field_index(PRE_PROJECTION)
    kind = table.schema.field(at).type
    lists = type(table.column(at).combine_chunks()).from_arrays(flat, type=kind)
    footer = {b"clipindex": pq.read_metadata(path).metadata[b"clipindex"]}
    changed = table.set_column(at, table.schema.field(at), lists).replace_schema_metadata(footer)
    pq.write_table(changed, path, use_dictionary=False)
    (fault,) = verify(tmp_path / "out").faults
    assert "row 4 (key 'l4') has a pre_projection of length 0" in fault.what


@pytest.mark.parametrize(
    ("name", "message"), [("pre-projection", "pre-projection features"), ("timm", "pooled features")]
)
def test_texts_are_refused_where_there_is_no_space_for_them(folders, name, message):
    with pytest.raises(ModelError, match=f"{message}, which share no space with texts"):
        classify(folders / name, classes=["cat", "dog"])
    with pytest.raises(ModelError, match=message):
        search(folders / name, [Query(texts=("a cat",))])


@pytest.mark.parametrize(
    ("name", "features", "error", "message"),
    [
        ("projected", "pre-projection", FingerprintError, "not of .*512-d, before the projection"),
        ("pre-projection", "projected", FingerprintError, "512-d, before the projection"),
        ("projected", "both", StoreError, "holds no features before the projection; pass --features projected"),
        ("both", "projected", StoreError, "holds also features before the projection; pass --features both"),
    ],
)
def test_kinds_of_features_are_not_mixed(folders, name, features, error, message):
    with pytest.raises(error, match=message):
        embed(str(folders / "corpus"), folders / name, features=features, **DEMO)


def test_a_backbone_has_no_projection(folders, tmp_path):
    with pytest.raises(ModelError, match="timm:test_resnet: its image tower ends in no projection"):
        embed(str(folders / "corpus"), tmp_path / "out", features="both", model="timm:test_resnet", random_init=0)
    assert not (tmp_path / "out").exists()
