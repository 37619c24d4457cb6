"""Directories of features before the projection, alone and beside those after it, and of plain backbones."""

import json
import logging
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from command_line import run_cli
from conftest import CUDA
from corpus import encoded, labelled, picture, write_tar

from clipindex import (
    classify,
    compare_encoders,
    embed,
    evaluate_probe,
    export_embeddings,
    few_shot_curve,
    import_embeddings,
    read_embeddings,
    read_probe,
    search,
    train_probe,
    verify,
)
from clipindex.errors import FingerprintError, ModelError, StoreError, UsageError
from clipindex.models.recipes import DEMO_DIR
from clipindex.probing import write_predictions
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


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["both", "timm"])
def test_both_columns_and_backbones_on_cuda_are_those_of_the_cpu(folders, tmp_path, name):
    which = {"both": {"features": "both", "model": "demo"}, "timm": {"model": "timm:test_resnet", "random_init": 0}}
    how = {"precision": "fp32", "device": CUDA, "decode": "cpu", **which[name]}
    # 49 images: the last batch has one, in memory for sixteen.
    for run in ("first", "second"):
        assert embed(str(folders / "corpus"), tmp_path / run, batch_size=16, **how).rows == 49
    embed(str(folders / "corpus"), tmp_path / "whole", batch_size=64, **how)
    for column in ("embedding", PRE_PROJECTION)[: 2 if name == "both" else 1]:
        unit, norms = vectors(tmp_path / "first", column)
        again = vectors(tmp_path / "second", column)
        assert np.array_equal(unit, again[0]) and np.array_equal(norms, again[1])
        # Sums in another order: of what is stored as half floats, the last bit, at most 5e-4, may be another one.
        for other, their_norms in (vectors(tmp_path / "whole", column), vectors(folders / name, column)):
            np.testing.assert_allclose(unit.astype(np.float32), other.astype(np.float32), atol=1e-3)
            np.testing.assert_allclose(norms, their_norms, rtol=1e-3)
    checked = verify(tmp_path / "first", deep=True, precision="fp32", device=CUDA)
    assert (checked.faults, checked.least_cosine > 0.9999) == ([], True)


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
        ("projected", "pre-projection", FingerprintError, "holds projected features .* pass --features projected"),
        ("pre-projection", "projected", FingerprintError, "512-d, before the .* pass --features pre-projection"),
        ("projected", "both", StoreError, "holds no features before the projection; name .* pass --features projected"),
        ("both", "projected", StoreError, "holds also features before the projection; name .* pass --features both"),
    ],
)
def test_kinds_of_features_are_not_mixed(folders, name, features, error, message):
    with pytest.raises(error, match=message):
        embed(str(folders / "corpus"), folders / name, features=features, **DEMO)


def test_a_directory_of_both_is_gone_on_with_by_another_name_of_the_model(folders, tmp_path):
    embed(str(folders / "corpus" / "0.tar"), tmp_path / "out", features="both", **DEMO)
    renamed = tmp_path / "renamed"
    shutil.copytree(DEMO_DIR, renamed)
    summary = embed(str(folders / "corpus"), tmp_path / "out", features="both", model=str(renamed), **HOW)
    assert (summary.shards_done_before, summary.shards_embedded) == (1, 1)


def test_a_backbone_has_no_projection(folders, tmp_path):
    with pytest.raises(ModelError, match="timm:test_resnet: its image tower ends in no projection"):
        embed(str(folders / "corpus"), tmp_path / "out", features="both", model="timm:test_resnet", random_init=0)
    assert not (tmp_path / "out").exists()


def test_probes_of_both_kinds_are_those_of_the_single_directories(folders, tmp_path):
    alone = train_probe(folders / "pre-projection", held_out=0.3, out=tmp_path / "alone")
    beside = train_probe(folders / "both", held_out=0.3, pre_projection=True, out=tmp_path / "beside")
    assert (alone.vectors, beside.vectors) == ("pre-projection", "pre-projection")
    assert beside.training["objective"] == pytest.approx(alone.training["objective"], rel=1e-3)
    probe = read_probe(tmp_path / "beside")
    assert probe.weights.shape[1] == 512
    first, second = (evaluate_probe(folders / name, probe) for name in ("pre-projection", "both"))
    assert first.acc1 == second.acc1
    write_predictions(folders / "both", probe, tmp_path / "predictions.parquet")
    assert pq.read_table(tmp_path / "predictions.parquet").num_rows == 49
    with pytest.raises(FingerprintError, match="not of .*512-d, before the projection"):
        evaluate_probe(folders / "projected", probe)
    with pytest.raises(UsageError, match="embed with --features both, or leave --pre-projection out"):
        train_probe(folders / "projected", held_out=0.3, pre_projection=True)
    with pytest.raises(UsageError, match="holds no features before a projection"):
        train_probe(folders / "timm", held_out=0.3, pre_projection=True)


def test_encoders_are_compared_by_the_features_before_the_projection_where_there_are_any(folders, tmp_path, caplog):
    paths = [folders / name for name in ("both", "timm", "projected")]
    how = {"shots": [1], "seeds": 1, "out": tmp_path / "compare", "names": ["a", "b", "c"], **HOW}
    both, backbone, projected = compare_encoders(paths, pre_projection=True, **how).encoders
    assert [one.vectors for one in (both, backbone, projected)] == ["pre-projection", "pooled", "projected"]
    assert [one.dim for one in (both, backbone, projected)] == [512, 96, 64]
    assert f"{folders / 'projected'} holds no features before a projection" in caplog.text
    # Class names are compared with the projected features in either case.
    assert both.zero_shot == projected.zero_shot
    assert backbone.zero_shot is None
    assert backbone.no_zero_shot == "its embeddings lie in no space with texts"
    as_it_is = compare_encoders(paths[:2], **how).encoders[0]
    assert (as_it_is.vectors, as_it_is.zero_shot) == ("projected", both.zero_shot)


def test_a_directory_is_compared_with_itself_before_and_after_its_projection(folders, tmp_path):
    how = {"shots": [1, 2], "seeds": 2, "out": tmp_path / "compare", "names": ["a", "b", "c"], **HOW}
    flags = {"pre_projection": True, "projected": True}
    test = shutil.copytree(folders / "both", tmp_path / "test")
    for tests in ([], [test]):
        after, before = compare_encoders([folders / "both"], tests=tests, **flags, **how).encoders
        assert (after.vectors, after.dim, after.name) == ("projected", 64, "demo projected")
        assert (before.vectors, before.dim, before.name) == ("pre-projection", 512, "demo pre-projection")
        assert (after.folder, after.zero_shot) == (before.folder, before.zero_shot)
    # The same as of two directories with one kind each.
    two = [folders / "projected", folders / "pre-projection"]
    found = compare_encoders([folders / "both"], **flags, **how).encoders
    for own, other in zip(found, compare_encoders(two, **how).encoders, strict=True):
        assert (own.fingerprint, own.few_shot, own.probe) == (other.fingerprint, other.few_shot, other.probe)
    notes = []
    three = compare_encoders(
        [folders / "both", folders / "timm"], on_progress=lambda *note: notes.append(note), **flags, **how
    ).encoders
    assert [one.vectors for one in three] == ["projected", "pre-projection", "pooled"]
    assert [one.no_zero_shot is None for one in three] == [True, True, False]
    assert {total for _, total, _ in notes} == {3}
    for folder, options, message in [
        ("both", {}, "two or more .*, or --pre-projection --projected for one that was embedded with --features both"),
        ("both", {"pre_projection": True}, "two or more"),
        ("pre-projection", flags, "two or more"),
        ("projected", flags, "no directory holds features before a projection"),
    ]:
        with pytest.raises(UsageError, match=message):
            compare_encoders([folders / folder], **options, **how)
    with pytest.raises(UsageError, match="given twice: .* --pre-projection --projected compares"):
        compare_encoders([folders / "both"] * 2, pre_projection=True, **how)


def test_the_command_compares_a_directory_with_itself(folders, tmp_path):
    flags = ["--pre-projection", "--projected", "--shots", "none", "--device", "cpu"]
    done = run_cli("compare", folders / "both", *flags, "--out", tmp_path / "out", "--plot", tmp_path / "c.svg")
    assert done.returncode == 0, done.stderr
    _, _, after, before, pair, *_ = [line.split() for line in done.stdout.splitlines()]
    assert after[1:4] == ["demo", "projected", "64"] and before[1:4] == ["demo", "pre-projection", "512"]
    assert " ".join(pair).startswith("full probes: only demo p")


def test_a_few_shot_curve_before_the_projection_beside_zero_shot_after_it(folders, tmp_path):
    how = {"held_out": 0.3, "names": ["a", "b", "c"], "seeds": 3, "device": "cpu", "precision": "fp32"}
    curves = [
        few_shot_curve(folders / "both", [1, 2, 4], pre_projection=flag, out=tmp_path / str(flag), **how)
        for flag in (False, True)
    ]
    assert curves[0].zero_shot == curves[1].zero_shot is not None
    assert curves[0].points != curves[1].points
    assert [curve.vectors for curve in curves] == ["projected", "pre-projection"]


def test_rows_before_the_projection_that_are_not_their_images_are_found(folders, tmp_path):
    shutil.copytree(folders / "both", tmp_path / "out")
    path = min((tmp_path / "out" / "embeddings").glob("*.parquet"))
    table = pq.read_table(path)
    at = table.schema.get_field_index(PRE_PROJECTION)
    rolled = table.column(at).take([len(table) - 1, *range(len(table) - 1)])
    footer = {b"clipindex": pq.read_metadata(path).metadata[b"clipindex"]}
    changed = table.set_column(at, table.schema.field(at), rolled).replace_schema_metadata(footer)
    pq.write_table(changed, path, use_dictionary=False)
    assert verify(tmp_path / "out").faults == []
    found = verify(tmp_path / "out", deep=True, **HOW)
    (fault,) = found.faults
    assert fault.path == str(path)
    assert "40 of 40 images embedded anew differ" in fault.what
    assert found.least_cosine < 0.999


def test_features_of_another_models_projection_are_refused(folders, tmp_path):
    shutil.copytree(folders / "both", tmp_path / "out")
    told = json.loads((tmp_path / "out" / "dataset.json").read_bytes())
    told["pre_projection"]["fingerprint"] = "0" * 64
    (tmp_path / "out" / "dataset.json").write_text(json.dumps(told))
    with pytest.raises(FingerprintError, match="fingerprint 000000000000"):
        verify(tmp_path / "out", deep=True, **HOW)


def opened_by_datasets(folder):
    import datasets

    return datasets.load_from_disk(folder)


@pytest.mark.parametrize("form", ["npy", "parquet", "arrow"])
def test_either_kind_is_exported(folders, tmp_path, form, caplog):
    caplog.set_level(logging.INFO)
    read = {
        "npy": lambda out: np.concatenate([np.load(path) for path in sorted(out.glob("img_emb/*.npy"))]),
        "parquet": lambda out: np.stack(pq.read_table(out)["embedding"].to_pylist()),
        "arrow": lambda out: opened_by_datasets(out).with_format("numpy")["embedding"][:],
    }[form]
    norms = {
        "npy": lambda out: pq.read_table(out / "metadata")["norm"],
        "parquet": lambda out: pq.read_table(out)["norm"],
        "arrow": lambda out: opened_by_datasets(out)["norm"],
    }[form]
    said = "the features before the projection are not exported; --pre-projection exports them"
    for before, column in ((False, "embedding"), (True, PRE_PROJECTION)):
        out = tmp_path / column
        caplog.clear()
        summary = export_embeddings(folders / "both", out, format=form, dtype="float32", pre_projection=before)
        unit, lengths = vectors(folders / "both", column)
        assert np.array_equal(read(out), unit.astype(np.float32))
        assert np.array_equal(np.array(norms(out)), lengths)
        assert summary.vectors == json.loads((out / "_export.json").read_bytes())["vectors"]
        assert summary.vectors == ("pre-projection" if before else "projected")
        assert (said in caplog.text) is not before
    with pytest.raises(StoreError, match="holds another export"):
        export_embeddings(folders / "both", tmp_path / "embedding", format=form, dtype="float32", pre_projection=True)


@pytest.mark.parametrize("source", ["both", "pre-projection"])
def test_features_before_the_projection_come_back_as_what_they_are(folders, tmp_path, source):
    export_embeddings(folders / source, tmp_path / "x", format="npy", pre_projection=True)
    found = import_embeddings(tmp_path / "x", tmp_path / "back", model="demo")
    info = read_dataset(folders / source).before_projection()
    assert read_dataset(tmp_path / "back").model == info
    assert (found.fingerprint, found.rows, found.shards_failed) == (info.fingerprint, 49, {})
    assert verify(tmp_path / "back").faults == []
    column = PRE_PROJECTION if source == "both" else "embedding"
    for one, other in zip(vectors(folders / source, column), vectors(tmp_path / "back", "embedding"), strict=True):
        assert np.array_equal(one, other)
    # One file of them too; and no directory of projected ones takes them.
    one = tmp_path / "x" / "img_emb" / "img_emb_0000.npy"
    ids = tmp_path / "x" / "metadata" / "metadata_0000.parquet"
    import_embeddings(one, tmp_path / "one", model="demo", ids=ids)
    assert read_dataset(tmp_path / "one").model == info
    for name in ("projected", "both"):
        with pytest.raises(FingerprintError, match="holds projected features of demo .*, not pre-projection ones"):
            import_embeddings(tmp_path / "x", folders / name, model="demo")
    with pytest.raises(ModelError, match="share no space with texts"):
        search(tmp_path / "back", [Query(texts=("a cat",))])


def test_exporting_what_there_is_not(folders, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for name in ("projected", "timm"):
        done = run_cli("export", folders / name, tmp_path / "x", "--format", "npy", "--pre-projection")
        assert done.returncode == 2
        assert f"{folders / name} holds no features before a projection" in done.stderr
    assert not (tmp_path / "x").exists()
    # Where they are the only ones, they are meant in either case.
    options = ("--format", "npy", "--pre-projection", "--json")
    done = run_cli("export", folders / "pre-projection", tmp_path / "x", *options)
    assert json.loads(done.stdout)["vectors"] == "pre-projection"
    again = export_embeddings(folders / "pre-projection", tmp_path / "x", format="npy")
    assert again.shards_done_before == again.shards == 2
    assert "are not exported" not in caplog.text
