"""Files whose columns are not those of their directory, met by what reads columns without their vectors."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from probe_data import features, model, write_directory

from clipindex import classify, compare_encoders, embed, train_probe
from clipindex.demo import DATA
from clipindex.errors import StoreError
from clipindex.store import LABELS_TYPE, read_columns

CPU = {"device": "cpu"}


@pytest.fixture
def folders(tmp_path):
    """The same rows, with a label and with a list of them, by two encoders."""
    raw, labels = features(120)
    lists = [(int(label), 9) for label in labels]
    return {
        "d": write_directory(tmp_path / "d", raw, labels),
        "e": write_directory(tmp_path / "e", raw[:, :16], labels, info=model(16, seed=1)),
        "lists": write_directory(tmp_path / "lists", raw, lists),
    }


def spoil(folder, change):
    """Another table in the directory's last file, under the same record."""
    path = max((folder / "embeddings").glob("*.parquet"))
    footer = {b"clipindex": pq.read_metadata(path).metadata[b"clipindex"]}
    pq.write_table(change(pq.read_table(path)).replace_schema_metadata(footer), path, use_dictionary=False)
    return path


def retyped(name, kind, change=lambda values: values):
    def to(table):
        at = table.schema.get_field_index(name)
        return table.set_column(at, pa.field(name, kind), pa.array(change(table[name].to_pylist()), kind))

    return to


SPOILT = {
    "no label": lambda table: table.drop_columns(["label"]),
    "no key": lambda table: table.drop_columns(["key"]),
    "no labels and no label": lambda table: table.drop_columns(["labels", "label"]),
    "labels that are strings": retyped("labels", pa.string(), lambda values: ["1"] * len(values)),
    "lists with nulls": retyped("labels", pa.list_(pa.int32()), lambda values: [[1, None]] * len(values)),
    "lists of 64 bits": retyped("labels", pa.list_(pa.field("element", pa.int64(), nullable=False))),
    "a label that is a string": retyped("label", pa.string(), lambda values: ["1"] * len(values)),
    "keys that may be null": retyped("key", pa.string(), lambda values: [None, *values[1:]]),
    "a column more": lambda table: table.append_column("more", table["label"]),
}


@pytest.mark.parametrize("name", SPOILT)
def test_columns_are_those_of_the_directory(folders, tmp_path, name):
    path = spoil(folders["d"], SPOILT[name])
    with pytest.raises(StoreError, match="columns are not those of 32-d float16 embeddings") as caught:
        list(read_columns(folders["d"], ("key", "label", "labels")))
    assert str(path) in str(caught.value)
    with pytest.raises(StoreError, match="columns are not those of"):
        train_probe(folders["d"], **CPU)
    with pytest.raises(StoreError, match="columns are not those of"):
        compare_encoders([folders["e"], folders["d"]], out=tmp_path / "out", shots=[], seeds=1, **CPU)
    spoil(folders["lists"], SPOILT[name])
    with pytest.raises(StoreError, match="columns are not those of"):
        train_probe(folders["lists"], label="labels", **CPU)
    assert not any((folder / "probe").exists() for folder in folders.values())


@pytest.mark.parametrize("name", ["no label", "lists with nulls", "labels that are strings"])
def test_classification_says_so_too(tmp_path, name):
    digits = DATA / "wds_digits"
    embed(str(digits), tmp_path / "d", model="demo", device="cpu")
    spoil(tmp_path / "d", SPOILT[name])
    with pytest.raises(StoreError, match="columns are not those of 64-d"):
        classify(tmp_path / "d", classes=digits / "classnames.txt", templates=["{c}"], device="cpu")
    assert not (tmp_path / "d" / "predictions").exists()


def test_files_of_before_labels_were_lists_have_none(folders):
    spoil(folders["lists"], lambda table: table.drop_columns(["labels"]))
    found = list(read_columns(folders["lists"], ("labels",)))
    assert [len(columns["labels"]) for _, columns in found] == [60, 60]
    assert found[1][1]["labels"].null_count == 60
    assert found[1][1]["labels"].type == LABELS_TYPE
    assert train_probe(folders["lists"], label="labels", **CPU).left_out == 60
