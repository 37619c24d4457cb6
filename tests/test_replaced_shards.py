"""Shards that are replaced by as many rows in another order while a probe learns or is tested."""

import os

import pyarrow.parquet as pq
import pytest
from probe_data import features, model, write_directory

from clipindex import compare_encoders, evaluate_probe, few_shot_curve, read_probe, train_probe
from clipindex.errors import StoreError

CPU = {"device": "cpu"}
CHANGED = "changed while it was read; run again when nothing writes to it"


@pytest.fixture
def folder(tmp_path):
    raw, labels = features(400)
    return write_directory(tmp_path / "d", raw, labels, shards=3)


def turn(folder):
    """Let the last shard have its rows from back to front, as a run that embeds it again would: at once."""
    path = max((folder / "embeddings").glob("*.parquet"))
    table = pq.read_table(path)
    footer = {b"clipindex": pq.read_metadata(path).metadata[b"clipindex"]}
    turned = table.take(list(range(len(table)))[::-1]).replace_schema_metadata(footer)
    pq.write_table(turned, folder / "turned", use_dictionary=False)
    os.replace(folder / "turned", path)


class Once:
    """A callback that does something when it is first called, or when it is first told of what is awaited."""

    def __init__(self, action, folder, awaited=""):
        self.action = action
        self.folder = folder
        self.awaited = awaited
        self.done = False

    def __call__(self, *told):
        if not self.done and self.awaited in str(told[-1]):
            self.action(self.folder)
            self.done = True


def train(folder, callback, **options):
    return train_probe(folder, out=folder / "probe", on_progress=callback, memory_bytes=1, **options, **CPU)


def test_training_stops(folder):
    with pytest.raises(StoreError, match=CHANGED):
        train(folder, Once(turn, folder))
    assert not (folder / "probe").exists()


def test_training_on_lists_stops(tmp_path):
    raw, labels = features(400)
    lists = [(int(label),) if row % 9 else (0, int(label) + 1) for row, label in enumerate(labels)]
    write_directory(tmp_path / "d", raw, lists, shards=3)
    with pytest.raises(StoreError, match=CHANGED):
        train(tmp_path / "d", Once(turn, tmp_path / "d"), label="labels")
    assert not (tmp_path / "d" / "probe").exists()


def test_evaluation_stops(folder):
    train_probe(folder, out=folder / "probe", **CPU)
    turning = Once(turn, folder)
    with pytest.raises(StoreError, match=CHANGED):
        evaluate_probe(folder, read_probe(folder / "probe"), on_progress=turning, **CPU)
    assert turning.done


def test_few_shot_curves_stop(folder):
    with pytest.raises(StoreError, match=CHANGED):
        few_shot_curve(folder, [1], held_out=0.3, on_progress=Once(turn, folder, "reading"), **CPU)


def test_comparisons_stop(folder, tmp_path):
    raw, labels = features(400)
    write_directory(tmp_path / "e", raw[:, :16], labels, info=model(16, seed=1), shards=2)
    turning = Once(turn, folder, "shot")
    how = {"out": tmp_path / "out", "shots": [1], "seeds": 1, "memory_bytes": 1, **CPU}
    with pytest.raises(StoreError, match=CHANGED):
        compare_encoders([folder, tmp_path / "e"], on_progress=turning, **how)
    assert turning.done


def test_shards_that_come_meanwhile_are_none_of_these(folder):
    def add(_):
        raw, labels = features(40, seed=9)
        write_directory(folder, raw, labels, shards={"zzz": range(40)})

    adding = Once(add, folder)
    alone, beside = train(folder, lambda note: None), train(folder, adding)
    assert adding.done
    assert (alone.rows, alone.training["objective"]) == (beside.rows, beside.training["objective"])
