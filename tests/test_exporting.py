import json
import re
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import labelled, write_tar

from clipindex import embed, export_embeddings, import_embeddings, read_embeddings, verify
from clipindex.cli import commands
from clipindex.errors import FingerprintError, StoreError, UsageError
from clipindex.exchange import FORMATS
from clipindex.store import published_shards

HERE = {"device": "cpu", "precision": "fp32", "batch_size": 16}
COLUMNS = ("key", "norm", "label", "caption", "meta", "width", "height", "tar_offset", "tar_size")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three tars, of which the middle one has nothing but rejects, and their embeddings in half and in full floats."""
    folder = tmp_path_factory.mktemp("made")
    members = list(labelled([f"a{at:02}" for at in range(30)]))
    members.insert(3, ("a00.json", b'{"url": "https://example.org/0.jpg"}'))
    write_tar(folder / "a.tar", members)
    write_tar(folder / "b.tar", [("x.jpg", b"no image"), ("y.jpg", b"nor this")])
    write_tar(folder / "c.tar", labelled([f"c{at}" for at in range(7)], seed=40))
    embed(str(folder), folder / "out", model="demo", **HERE)
    embed(str(folder), folder / "wide", model="demo", dtype="float32", **HERE)
    return folder


def rows_of(out):
    """All rows as dicts with their shard, in order, and their vectors."""
    batches = list(read_embeddings(out, COLUMNS))
    rows = [
        {**row, "shard": batch.shard.name, "tar_url": batch.shard.url}
        for batch in batches
        for row in pa.table(batch.columns).to_pylist()
    ]
    return rows, np.concatenate([batch.embedding for batch in batches])


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_npy_as_clip_retrieval_and_autofaiss_read_it(made, tmp_path):
    summary = export_embeddings(made / "out", tmp_path / "x", format="npy")
    assert (summary.rows, summary.shards, summary.shards_empty, summary.dtype) == (37, 2, 1, "float16")
    # Their readers sort files by name, and pair them by their place: a shard without rows must have neither.
    assert files(tmp_path / "x") == [
        "_export.json",
        "img_emb/img_emb_0000.npy",
        "img_emb/img_emb_0001.npy",
        "metadata/metadata_0000.parquet",
        "metadata/metadata_0001.parquet",
    ]
    expected, vectors = rows_of(made / "out")
    found = [np.load(path) for path in sorted((tmp_path / "x" / "img_emb").iterdir())]
    assert [one.shape for one in found] == [(30, 64), (7, 64)]
    assert np.array_equal(np.concatenate(found), vectors) and found[0].dtype == np.float16
    table = pd.concat(pd.read_parquet(path) for path in sorted((tmp_path / "x" / "metadata").iterdir()))
    assert table["image_path"].tolist() == table["key"].tolist() == [row["key"] for row in expected]
    for column in ("caption", "label", "shard", "tar_url", "tar_offset", "tar_size", "width", "height", "norm"):
        assert table[column].tolist() == [row[column] for row in expected], column
    # embedding-reader looks for its shape and type in the first line of a file, within 300 bytes
    first_line = (tmp_path / "x" / "img_emb" / "img_emb_0000.npy").read_bytes()[:300].split(b"\n")[0]
    assert re.search(rb"'shape': \(30, 64\)", first_line) and b"'descr': '<f2'" in first_line


def test_there_and_back(made, tmp_path):
    export_embeddings(made / "out", tmp_path / "x", format="npy")
    import_embeddings(tmp_path / "x", tmp_path / "back", model="demo")
    expected, vectors = rows_of(made / "out")
    found, again = rows_of(tmp_path / "back")
    assert np.array_equal(vectors, again)
    for column in ("key", "label", "caption", "norm", "width", "height"):
        assert [row[column] for row in found] == [row[column] for row in expected], column
    metas = [json.loads(row["meta"]) for row in found]
    assert metas[0]["url"] == "https://example.org/0.jpg"
    for column in ("shard", "tar_url", "tar_offset", "tar_size"):
        assert [meta[column] for meta in metas] == [row[column] for row in expected]
    assert verify(tmp_path / "back").faults == []
    # A second time around nothing is added: where a row was first is what stays.
    export_embeddings(tmp_path / "back", tmp_path / "x2", format="npy")
    table = pq.read_table(tmp_path / "x2" / "metadata" / "metadata_0001.parquet")
    assert set(table["tar_url"].to_pylist()) == set(table["tar_size"].to_pylist()) == {None}
    import_embeddings(tmp_path / "x2", tmp_path / "back2", model="demo")
    assert [json.loads(row["meta"]) for row in rows_of(tmp_path / "back2")[0]] == metas


@pytest.mark.parametrize("source", ["out", "wide"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_that_come_home_are_there_already(made, tmp_path, source, dtype):
    own = {"out": "float16", "wide": "float32"}[source]
    shutil.copytree(made / source, tmp_path / "emb")
    before = files(tmp_path / "emb")
    names = [record.name for record in published_shards(tmp_path / "emb").values() if record.rows]
    export_embeddings(tmp_path / "emb", tmp_path / "x", format="npy", dtype=dtype)
    found = import_embeddings(tmp_path / "x", tmp_path / "emb", model="demo", dtype=own)
    assert (found.shards, found.shards_imported, found.shards_failed, found.rows) == (2, 0, {}, 0)
    assert list(found.shards_there.values()) == names
    assert files(tmp_path / "emb") == before
    # As a job does every night: export what has grown, into a new folder, and import it where the rest is already.
    import_embeddings(tmp_path / "x", tmp_path / "back", model="demo", dtype=own)
    write_tar(tmp_path / "d.tar", labelled(["d0", "d1"]))
    embed(str(tmp_path / "d.tar"), tmp_path / "emb", model="demo", dtype=own, **HERE)
    export_embeddings(tmp_path / "emb", tmp_path / "x2", format="npy", dtype=dtype)
    again = import_embeddings(tmp_path / "x2", tmp_path / "back", model="demo", dtype=own)
    assert (again.shards_imported, len(again.shards_there), again.rows) == (1, 2, 2)
    keys = [row["key"] for row in rows_of(tmp_path / "back")[0]]
    assert sorted(keys) == sorted(row["key"] for row in rows_of(tmp_path / "emb")[0])


def test_rows_of_a_tar_with_rejects_come_home(made, tmp_path):
    members = list(labelled(["a", "b", "c"]))
    write_tar(tmp_path / "r.tar", [("0.jpg", b"no image"), *members, ("z.jpg", b"no image")])
    embed(str(tmp_path / "r.tar"), tmp_path / "emb", model="demo", **HERE)
    (record,) = published_shards(tmp_path / "emb").values()
    assert (record.rows, record.rejects) == (3, 2)
    export_embeddings(tmp_path / "emb", tmp_path / "x", format="npy")
    found = import_embeddings(tmp_path / "x", tmp_path / "emb", model="demo")
    assert (found.shards_imported, list(found.shards_there.values())) == (0, [record.name])


def test_a_directory_with_both_features_takes_nothing_back(made, tmp_path):
    embed(str(made / "c.tar"), tmp_path / "emb", model="demo", features="both", **HERE)
    export_embeddings(tmp_path / "emb", tmp_path / "x", format="npy")
    before = files(tmp_path / "emb")
    with pytest.raises(StoreError, match="holds also features before the projection; name another --out"):
        import_embeddings(tmp_path / "x", tmp_path / "emb", model="demo")
    assert files(tmp_path / "emb") == before
    assert import_embeddings(tmp_path / "x", tmp_path / "other", model="demo").rows == 7


def test_a_lone_file_is_of_no_export_that_lies_nearby(made, tmp_path, monkeypatch):
    export_embeddings(made / "out", tmp_path / "x", format="npy")
    note = {"fingerprint": "another", "vectors": "projected"}
    (tmp_path / "x" / "_export.json").write_text(json.dumps(note))
    (tmp_path / "x" / "mine").mkdir()
    shutil.copy(tmp_path / "x" / "_export.json", tmp_path / "x" / "mine")
    for place in ("mine", "."):
        shutil.copy(tmp_path / "x/img_emb/img_emb_0001.npy", tmp_path / "x" / place / "x.npy")
    ids = tmp_path / "x/metadata/metadata_0001.parquet"
    assert import_embeddings(tmp_path / "x/mine/x.npy", tmp_path / "1", model="demo", ids=ids).rows == 7
    assert import_embeddings(tmp_path / "x/x.npy", tmp_path / "2", model="demo", ids=ids).rows == 7
    monkeypatch.chdir(tmp_path / "x" / "img_emb")
    with pytest.raises(FingerprintError, match="is an export of embeddings"):
        import_embeddings("img_emb_0001.npy", tmp_path / "3", model="demo", ids=ids)


def test_an_export_comes_back_as_its_own_models_only(made, tmp_path):
    export_embeddings(made / "out", tmp_path / "x", format="npy")
    for source, options in (
        (tmp_path / "x", {}),
        (tmp_path / "x/img_emb/img_emb_0000.npy", {"ids": tmp_path / "x/metadata/metadata_0000.parquet"}),
    ):
        with pytest.raises(FingerprintError, match="is an export of embeddings .*, not of RN50 .* _export.json names"):
            import_embeddings(source, tmp_path / "back", model="RN50", random_init=0, **options)
    assert not (tmp_path / "back").exists()
    (tmp_path / "x" / "_export.json").write_text("{")
    with pytest.raises(StoreError, match="_export.json is damaged"):
        import_embeddings(tmp_path / "x", tmp_path / "back", model="demo")
    (tmp_path / "x" / "_export.json").write_text('["somebody else\'s"]')
    assert import_embeddings(tmp_path / "x", tmp_path / "back", model="demo").rows == 37


@pytest.mark.parametrize("source", ["out", "wide"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_npy_in_either_dtype(made, tmp_path, source, dtype):
    export_embeddings(made / source, tmp_path / "x", format="npy", dtype=dtype)
    found = np.load(tmp_path / "x" / "img_emb" / "img_emb_0000.npy")
    assert np.array_equal(found, rows_of(made / source)[1][:30].astype(dtype)) and found.dtype == dtype
    import_embeddings(tmp_path / "x", tmp_path / "back", model="demo", dtype=dtype)
    assert np.array_equal(rows_of(tmp_path / "back")[1][:30], found)


def test_parquet_as_everybody_reads_it(made, tmp_path):
    import datasets
    import duckdb
    import polars

    summary = export_embeddings(made / "out", tmp_path / "x", format="parquet")
    assert summary.dtype == "float32"
    names = [record.name for record in published_shards(made / "out").values() if record.rows]
    assert files(tmp_path / "x") == ["_export.json", *(f"{name}.parquet" for name in names)]
    expected, vectors = rows_of(made / "out")
    path = tmp_path / "x" / f"{names[0]}.parquet"
    assert str(pq.read_schema(path).field("embedding").type) == "list<element: float>"
    for table in (pd.read_parquet(path), polars.read_parquet(path).to_pandas(), duckdb.read_parquet(str(path)).df()):
        assert np.array_equal(np.stack(table["embedding"].tolist()), vectors[:30].astype(np.float32))
        for column in ("key", "label", "caption", "shard", "tar_url", "tar_offset", "width"):
            assert table[column].tolist() == [row[column] for row in expected[:30]]
    # A folder of them is one table, and the note no part of it.
    assert pq.read_table(tmp_path / "x").num_rows == 37
    assert datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "hf")).num_rows == 30


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_arrow_as_hugging_face_datasets_open_it(made, tmp_path, dtype):
    import datasets

    export_embeddings(made / "out", tmp_path / "x", format="arrow", dtype=dtype)
    assert files(tmp_path / "x") == [
        "_export.json",
        "data-00000-of-00002.arrow",
        "data-00001-of-00002.arrow",
        "dataset_info.json",
        "state.json",
    ]
    expected, vectors = rows_of(made / "out")
    found = datasets.load_from_disk(tmp_path / "x")
    assert found.num_rows == 37
    assert found.features["embedding"].length == 64 and found.features["embedding"].feature.dtype == dtype
    assert np.array_equal(found.with_format("numpy")["embedding"][:], vectors.astype(dtype))
    for column in (*COLUMNS, "shard", "tar_url"):
        assert list(found[column]) == [row[column] for row in expected], column
    assert found.filter(lambda row: row["label"] == 1)[0]["key"] == "a01"
    torch_row = found.with_format("torch")[36]
    assert torch_row["embedding"].shape == (64,)
    found.save_to_disk(tmp_path / "again")
    assert datasets.load_from_disk(tmp_path / "again")["key"][36] == "c6"


@pytest.mark.parametrize("form", ["npy", "parquet", "arrow"])
def test_what_was_stopped_is_finished(made, tmp_path, form):
    def stop(rows, total):
        if rows >= 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_embeddings(made / "out", tmp_path / "x", format=form, on_progress=stop)
    assert not list((tmp_path / "x").rglob("*.tmp"))
    seen = []
    export_embeddings(
        made / "out", tmp_path / "x", format=form, on_progress=lambda rows, total: seen.append((rows, total))
    )
    assert seen[-1] == (37, 37)
    again = export_embeddings(made / "out", tmp_path / "x", format=form)
    assert (again.shards_done_before, again.shards, again.rows) == (2, 2, 37)
    export_embeddings(made / "out", tmp_path / "whole", format=form)
    for name in files(tmp_path / "whole"):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_half_of_a_pair_is_written_again(made, tmp_path):
    export_embeddings(made / "out", tmp_path / "x", format="npy")
    (tmp_path / "x" / "metadata" / "metadata_0001.parquet").unlink()
    again = export_embeddings(made / "out", tmp_path / "x", format="npy")
    assert again.shards_done_before == 1
    assert pq.read_table(tmp_path / "x" / "metadata" / "metadata_0001.parquet")["key"].to_pylist()[0] == "c0"


def test_some_shards_only(made, tmp_path):
    first, empty, last = published_shards(made / "out")
    export_embeddings(made / "out", tmp_path / "x", format="parquet", shards=[last])
    assert files(tmp_path / "x") == ["_export.json", f"{last}.parquet"]
    export_embeddings(made / "out", tmp_path / "y", format="parquet", shards=["*-a-*", last])
    assert len(files(tmp_path / "y")) == 3
    with pytest.raises(UsageError, match="no shard is called 'd'"):
        export_embeddings(made / "out", tmp_path / "z", format="parquet", shards=["d"])
    with pytest.raises(StoreError, match="no rows to export"):
        export_embeddings(made / "out", tmp_path / "z", format="parquet", shards=[empty])
    assert not (tmp_path / "z").exists() and first


def test_what_holds_something_else_is_refused(made, tmp_path):
    out = tmp_path / "x"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(StoreError, match="holds something that is no export"):
        export_embeddings(made / "out", out, format="npy")
    assert files(out) == ["mine.txt"]
    with pytest.raises(StoreError, match="is a file"):
        export_embeddings(made / "out", out / "mine.txt", format="npy")
    with pytest.raises(StoreError, match="holds something"):
        export_embeddings(made / "out", made / "out", format="npy")
    export_embeddings(made / "out", tmp_path / "y", format="npy")
    for options in (
        {"format": "parquet"},
        {"format": "npy", "dtype": "float32"},
        {"format": "npy", "shards": ["*-c-*"]},
    ):
        with pytest.raises(StoreError, match="holds another export"):
            export_embeddings(made / "out", tmp_path / "y", **options)
    (tmp_path / "y" / "_export.json").write_text("{")
    with pytest.raises(StoreError, match="_export.json is damaged"):
        export_embeddings(made / "out", tmp_path / "y", format="npy")


def test_a_directory_that_grew_is_another_export(made, tmp_path):
    shutil.copytree(made / "out", tmp_path / "emb")
    export_embeddings(tmp_path / "emb", tmp_path / "x", format="npy")
    write_tar(tmp_path / "d.tar", labelled(["d"]))
    embed(str(tmp_path / "d.tar"), tmp_path / "emb", model="demo", **HERE)
    with pytest.raises(StoreError, match="or the directory has changed since"):
        export_embeddings(tmp_path / "emb", tmp_path / "x", format="npy")


def test_a_shard_that_is_made_anew_meanwhile_is_no_half_of_an_export(made, tmp_path):
    write_tar(tmp_path / "t" / "0.tar", labelled(["a", "b"]))
    write_tar(tmp_path / "t" / "1.tar", labelled(["c", "d"]))
    embed(str(tmp_path / "t"), tmp_path / "emb", model="demo", **HERE)

    def change(rows, total):
        write_tar(tmp_path / "t" / "1.tar", labelled(["c", "d", "e"]))
        embed(str(tmp_path / "t"), tmp_path / "emb", model="demo", refresh=True, **HERE)

    with pytest.raises(StoreError, match="made anew while it was exported"):
        export_embeddings(tmp_path / "emb", tmp_path / "x", format="npy", on_progress=change)
    assert files(tmp_path / "x") == ["_export.json", "img_emb/img_emb_0000.npy", "metadata/metadata_0000.parquet"]


def test_mistakes_and_damage_are_told(made, tmp_path):
    with pytest.raises(UsageError, match="choose one of npy, parquet, arrow"):
        export_embeddings(made / "out", tmp_path / "x", format="csv")
    with pytest.raises(UsageError, match="choose one of float16, float32"):
        export_embeddings(made / "out", tmp_path / "x", format="npy", dtype="int8")
    with pytest.raises(StoreError, match="no embedding directory"):
        export_embeddings(tmp_path, tmp_path / "x", format="npy")
    shutil.copytree(made / "out", tmp_path / "emb")
    (path,) = (tmp_path / "emb" / "embeddings").glob("*-c-*")
    footer = pq.read_metadata(path).metadata
    table = pq.read_table(path)
    # keys that are no UTF-8
    bad = pa.array([b"\xff\xfe"] * 7, pa.binary()).view(pa.string())
    table = table.set_column(0, table.schema.field(0), bad)
    pq.write_table(table.replace_schema_metadata({b"clipindex": footer[b"clipindex"]}), path, use_dictionary=False)
    with pytest.raises(StoreError, match="is damaged"):
        export_embeddings(tmp_path / "emb", tmp_path / "x", format="npy")
    assert not list((tmp_path / "x").rglob("*.tmp"))
    assert files(tmp_path / "x") == ["_export.json", "img_emb/img_emb_0000.npy", "metadata/metadata_0000.parquet"]


def test_formats_are_those_of_the_module_that_the_command_line_does_not_load():
    (option,) = [one for one in commands.commands["export"].params if one.name == "form"]
    assert tuple(option.type.choices) == FORMATS


def test_the_command(made, tmp_path, capsys):
    arguments = ["export", str(made / "out"), str(tmp_path / "x"), "--format", "arrow", "--shards", "*-c-*"]
    assert not commands.main(arguments, standalone_mode=False)
    assert f"7 rows of 1 shards -> {tmp_path / 'x'}" in capsys.readouterr().out
    assert not commands.main([*arguments, "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["shards_done_before"] == 1
