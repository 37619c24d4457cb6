"""Samples with any number of classes: read from tars, kept in Parquet, taken to other tools and back."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import encoded, picture, write_tar

from clipindex import embed, export_embeddings, import_embeddings, list_shards, read_embeddings, read_rejects, verify
from clipindex.labels import MAX_LABELS
from clipindex.shards import MAX_TEXT_BYTES, read_samples
from clipindex.types import Reject

HERE = {"model": "demo", "device": "cpu", "precision": "fp32", "batch_size": 16}
JPEG = encoded()


def npy(values, dtype=np.float32, **options):
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values, dtype), **options)
    return buffer.getvalue()


def sample_of(tmp_path, *members):
    path = write_tar(tmp_path / "t.tar", [("k.jpg", JPEG), *members])
    (found,) = read_samples(list_shards([str(path)])[0])
    return found


PICKLED = io.BytesIO()
np.save(PICKLED, np.array([{"a": 1}], object), allow_pickle=True)


@pytest.mark.parametrize("dtype", ["?", "u1", "i1", "<i8", ">i4", "<f2", "f4", ">f8"])
def test_a_multi_hot_of_any_type_of_numbers(tmp_path, dtype):
    found = sample_of(tmp_path, ("k.npy", npy([0, 1, 0, 1, 1], dtype)))
    assert (found.label, found.labels) == (None, (1, 3, 4))


def test_a_later_version_of_the_format(tmp_path):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.array([0, 1], np.uint8), version=(2, 0))
    assert sample_of(tmp_path, ("k.npy", buffer.getvalue())).labels == (1,)


@pytest.mark.parametrize(
    ("members", "label", "labels", "meta"),
    [
        ([("k.cls", b"[17, 3]\n")], None, (3, 17), None),
        ([("k.cls", b" [3,3,3]")], None, (3,), None),
        ([("k.cls", b"[]")], None, (), None),
        ([("k.npy", npy([0, 0]))], None, (), None),
        ([("k.npy", npy([]))], None, (), None),
        ([("k.json", b"[2, 5]")], None, (2, 5), "[2, 5]"),
        ([("k.json", b'{"x": [1]}')], None, None, '{"x": [1]}'),
        ([("k.json", b'[{"x": 1}]')], None, None, '[{"x": 1}]'),
        # Nothing in it tells a box from four classes: a list alone is of classes, whatever is called by a name is not.
        ([("k.json", b"[12, 40, 200, 310]")], None, (12, 40, 200, 310), "[12, 40, 200, 310]"),
        ([("k.json", b"[12, 40, 200, 310.0]")], None, None, "[12, 40, 200, 310.0]"),
        ([("k.json", b"[[12, 40, 200, 310]]")], None, None, "[[12, 40, 200, 310]]"),
        ([("k.json", b'{"labels": [1, 2]}')], None, None, '{"labels": [1, 2]}'),
        ([("k.box.json", b"[12, 40, 200, 310]")], None, None, None),
        ([("k.cls", b"7"), ("k.json", b"[12, 40, 200, 310]")], 7, None, "[12, 40, 200, 310]"),
        ([("k.json", b"[0, 0, 1, 0, 1]")], None, None, "[0, 0, 1, 0, 1]"),
        ([("k.json", b"[1, true]")], None, None, "[1, true]"),
        ([("k.json", b"[1, ")], None, None, "[1, "),
        ([("k.json", b"[" * 100_000)], None, None, "[" * 100_000),
        # One member tells, and .cls before all others: an array may be anything, where there is a label.
        ([("k.cls", b"7"), ("k.npy", b"what"), ("k.json", b"[1]")], 7, None, "[1]"),
        ([("k.cls", b"[7]"), ("k.npy", npy([1, 1]))], None, (7,), None),
        ([("k.npy", npy([0, 1])), ("k.json", b"[5]")], None, (1,), "[5]"),
        ([("k.txt", b"[1]")], None, None, None),
        # Arrays and lists that are no classes are none of our business.
        ([("k.json", b"[-7]")], None, None, "[-7]"),
        ([("k.npy", npy([[1, 0]]))], None, None, None),
        ([("k.npy", npy(1))], None, None, None),
        ([("k.npy", npy(["a"], "U1"))], None, None, None),
        ([("k.npy", npy([1], "f4").replace(b"<f4", b"<f3"))], None, None, None),
        ([("k.npy", PICKLED.getvalue())], None, None, None),
        ([("k.npy", npy([0, 0.5]))], None, None, None),
        ([("k.npy", npy([0, -1], "i1"))], None, None, None),
        ([("k.npy", npy([0, np.nan]))], None, None, None),
        ([("k.npy", npy(np.ones(MAX_LABELS + 1), "?"))], None, None, None),
        ([("k.npy", bytes(MAX_TEXT_BYTES + 1))], None, None, None),
        ([("k.npy", npy([[1, 0]])), ("k.json", b"[5]")], None, (5,), "[5]"),
    ],
)
def test_where_labels_come_from(tmp_path, members, label, labels, meta):
    found = sample_of(tmp_path, *members)
    assert (found.label, found.labels, found.meta) == (label, labels, meta)


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (("k.cls", b"[1, 2.5]"), "no list of class numbers"),
        (("k.cls", b'["cat"]'), "no list of class numbers"),
        (("k.cls", b"[1, null]"), "no list of class numbers"),
        (("k.cls", b"[[1]]"), "no list of class numbers"),
        (("k.cls", b"[1"), "no list of class numbers"),
        (("k.cls", b"[" * 500_000), "no list of class numbers"),
        (("k.cls", b"[" + b"0," * 600_000 + b"0]"), "no list of class numbers"),
        (("k.cls", b"[-1, 4]"), "-1 is no class number"),
        (("k.cls", b"[4294967296]"), "4294967296 is no class number"),
        (("k.npy", b"what"), "no .npy file"),
        (("k.npy", npy([1, 0])[:60]), "no .npy file, or cut short"),
        (("k.npy", npy([1, 0])[:-1]), "7 bytes, where its header says 8"),
        (("k.npy", npy([1, 0]) + b"\0"), "9 bytes, where its header says 8"),
        (("k.npy", npy([1, 0]).replace(b"(2,), }       ", b"(99999999,), }")), "where its header says 399999996"),
    ],
)
def test_what_cannot_be_understood_is_a_reject(tmp_path, member, reason):
    found = sample_of(tmp_path, member)
    assert isinstance(found, Reject)
    assert found.stage == "label"
    assert reason in found.reason


LISTS = [(0, 2), (1,), (), None, (2,), (0, 1, 2)]


def tar_with_labels(path):
    members = []
    for at, classes in enumerate(LISTS):
        members.append((f"k{at}.jpg", encoded(picture(seed=at))))
        if classes is not None and at % 2:
            members.append((f"k{at}.cls", json.dumps(classes).encode()))
        elif classes is not None:
            members.append((f"k{at}.npy", npy([one in classes for one in range(3)])))
    return write_tar(path, [*members, ("k9.jpg", JPEG), ("k9.npy", npy([0, 1])[:-1]), ("n.jpg", JPEG), ("n.cls", b"1")])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    tar_with_labels(folder / "t.tar")
    summary = embed(str(folder / "t.tar"), folder / "out", **HERE)
    assert (summary.samples, summary.rows, summary.rejects_by_stage) == (8, 7, {"label": 1})
    return folder


def column(folder, name):
    return [value for batch in read_embeddings(folder, (name,)) for value in batch.columns[name].to_pylist()]


def test_rows_have_lists_or_a_label(made):
    assert column(made / "out", "labels") == [*(None if one is None else list(one) for one in LISTS), None]
    assert column(made / "out", "label") == [None] * 6 + [1]
    (path,) = (made / "out" / "embeddings").glob("*.parquet")
    assert read_rejects(made / "out", path.stem)["reason"].to_pylist() == ["k9.npy: 7 bytes, where its header says 8"]
    field = pq.read_schema(path).field("labels")
    assert field.type == pa.list_(pa.field("element", pa.int32(), nullable=False))
    assert verify(made / "out", deep=True, device="cpu", precision="fp32").faults == []


def rewritten(source, out, change):
    """A copy of a directory of one shard, with another table in it."""
    (path,) = (source / "embeddings").glob("*.parquet")
    table = pq.read_table(path)
    (out / "embeddings").mkdir(parents=True)
    (out / "dataset.json").write_bytes((source / "dataset.json").read_bytes())
    if (source / "rejects").exists():
        (out / "rejects").mkdir()
        (out / "rejects" / path.name).write_bytes((source / "rejects" / path.name).read_bytes())
    footer = {b"clipindex": pq.read_metadata(path).metadata[b"clipindex"]}
    pq.write_table(change(table).replace_schema_metadata(footer), out / "embeddings" / path.name, use_dictionary=False)
    return out


def test_verify_finds_labels_of_other_rows(made, tmp_path):
    def swapped(table):
        at = table.schema.names.index("labels")
        return table.set_column(at, table.schema.field(at), table["labels"].take([1, 0, *range(2, 7)]))

    out = rewritten(made / "out", tmp_path / "out", swapped)
    faults = verify(out, deep=True, device="cpu", precision="fp32").faults
    assert any("(key 'k0') is not the tar's: labels differ" in fault.what for fault in faults)


@pytest.mark.parametrize("labels", [[3, 3], [2, 1], [-1, 4]])
def test_verify_finds_lists_that_are_no_sets_of_classes(made, tmp_path, labels):
    def changed(table):
        at = table.schema.names.index("labels")
        lists = pa.array([[0, 2], labels, *table["labels"].to_pylist()[2:]], table.schema.field(at).type)
        return table.set_column(at, table.schema.field(at), lists)

    (fault,) = verify(rewritten(made / "out", tmp_path / "out", changed)).faults
    assert "row 1 (key 'k1') has labels that are no ascending class numbers" in fault.what


def test_directories_of_before_there_were_lists_are_read(made, tmp_path):
    out = rewritten(made / "out", tmp_path / "out", lambda table: table.drop_columns(["labels"]))
    assert column(out, "labels") == [None] * 7
    assert column(out, "label")[-1] == 1
    assert verify(out).faults == []
    export_embeddings(out, tmp_path / "x", format="parquet")


@pytest.mark.parametrize("form", ["npy", "parquet", "arrow"])
def test_lists_go_out(made, tmp_path, form):
    import datasets

    export_embeddings(made / "out", tmp_path / "x", format=form)
    if form == "arrow":
        found = datasets.load_from_disk(str(tmp_path / "x"))["labels"]
    else:
        (path,) = (tmp_path / "x" / ("metadata" if form == "npy" else ".")).glob("*.parquet")
        found = pq.read_table(path)["labels"].to_pylist()
    assert list(found) == column(made / "out", "labels")


def test_lists_come_in(made, tmp_path):
    export_embeddings(made / "out", tmp_path / "x", format="npy")
    import_embeddings(tmp_path / "x", tmp_path / "back", model="demo")
    assert column(tmp_path / "back", "labels") == column(made / "out", "labels")


def test_lists_of_others_come_in_or_are_rejects(tmp_path):
    given = [[5, 1], None, [], [2, None], [-1], [2**40]]
    vectors = np.random.default_rng(0).normal(size=(len(given), 64)).astype(np.float32)
    np.save(tmp_path / "v.npy", vectors)
    rows = pa.table({"key": [f"k{at}" for at in range(len(given))], "labels": pa.array(given, pa.list_(pa.int64()))})
    pq.write_table(rows, tmp_path / "ids.parquet")
    summary = import_embeddings(tmp_path / "v.npy", tmp_path / "out", model="demo", ids=tmp_path / "ids.parquet")
    assert summary.rejects_by_stage == {"label": 3}
    assert column(tmp_path / "out", "labels") == [[1, 5], None, []]
