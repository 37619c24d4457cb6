import dataclasses
import json
import os
import shutil
import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import PixelEncoder

from clipindex.errors import FingerprintError, StoreError
from clipindex.store import (
    ROW_GROUP_ROWS,
    ShardWriter,
    VectorReader,
    open_dataset,
    published_shards,
    read_dataset,
    read_embeddings,
    read_rejects,
)
from clipindex.types import Reject, Sample, Shard, Vectors

SHARD = Shard(url="/data/a.tar", name="data-a-00000000", size=9, version="mtime:1")
REPLACED = dataclasses.replace(SHARD, version="mtime:2")


def sample(at):
    return Sample(key=f"k{at}", member=f"k{at}.jpg", image=bytes(at % 7 + 1), tar_offset=512 * at, label=at % 3,
                  caption=f"c{at}" if at % 2 else None, meta='{"a": 1}')  # fmt: skip


def rows(number, dim=48, seed=0):
    raw = np.random.default_rng(seed).normal(size=(number, dim)).astype(np.float32)
    return raw / np.linalg.norm(raw, axis=1, keepdims=True)


def write(folder, number, *, dtype="float16", shard=SHARD, rejects=(), encoder=None, batch=5000):
    dataset = open_dataset(folder, (encoder or PixelEncoder()).info, dtype, "test")
    writer = ShardWriter(folder, shard, dataset)
    vectors = rows(number)
    for first in range(0, number, batch):
        part = vectors[first : first + batch]
        samples = [sample(first + at) for at in range(len(part))]
        writer.append(samples, Vectors(part, np.full(len(part), 9.5, np.float32)), [(640, 480)] * len(part))
    for reject in rejects:
        writer.reject(reject)
    writer.publish(samples=number + len(rejects), precision="fp32", decoder="exact", device="cpu", seconds=1.0)
    return vectors


def test_the_first_run_to_publish_a_shard_wins_and_the_second_leaves_nothing(tmp_path):
    dataset = open_dataset(tmp_path, PixelEncoder().info, "float16", "test")
    writers = [ShardWriter(tmp_path, SHARD, dataset) for _ in range(2)]
    for number, writer in enumerate(writers, 1):
        for at in range(number):
            writer.reject(dataclasses.replace(REJECT, key=f"k{at}"))
    common = {"precision": "fp32", "decoder": "exact", "device": "cpu", "seconds": 1.0}
    first, is_ours = writers[0].publish(samples=1, **common)
    assert is_ours
    assert writers[1].publish(samples=2, **common) == (first, False)
    assert read_rejects(tmp_path, SHARD.name)["key"].to_pylist() == ["k0"]
    assert published_shards(tmp_path) == {SHARD.name: first}
    assert not list(tmp_path.rglob(".*.tmp"))


@pytest.mark.parametrize(("host", "age_s", "kept"), [("elsewhere", 3600, True), ("elsewhere", 100_000, False)])
def test_another_hosts_temporaries_go_by_age_on_the_file_systems_own_clock(tmp_path, monkeypatch, host, age_s, kept):
    open_dataset(tmp_path, PixelEncoder().info, "float16", "test")
    (tmp_path / "embeddings").mkdir()
    path = tmp_path / "embeddings" / f".x.parquet.{host}.1234.abcd.tmp"
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age_s,) * 2)
    monkeypatch.setattr(time, "time", lambda: 4e9)  # this machine's clock has jumped
    open_dataset(tmp_path, PixelEncoder().info, "float16", "test")
    assert path.exists() is kept


REJECT = Reject(key="bad", member="bad.jpg", stage="decode", reason="empty", tar_offset=77)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 3e-4), ("float32", 0)])
def test_what_is_written_is_read_back_in_order_across_row_groups(tmp_path, dtype, tolerance):
    number = ROW_GROUP_ROWS + 4321
    vectors = write(tmp_path, number, dtype=dtype, rejects=[REJECT])
    batches = list(read_embeddings(tmp_path, ("key", "label", "caption", "meta", "norm", "tar_offset", "width")))
    assert len(batches) > 1
    assert [batch.first_row for batch in batches] == [0, *np.cumsum([len(b.embedding) for b in batches])[:-1]]
    found = np.concatenate([batch.embedding for batch in batches])
    assert found.dtype == dtype
    np.testing.assert_allclose(found, vectors, atol=tolerance, rtol=0)
    assert [k for b in batches for k in b.columns["key"].to_pylist()] == [f"k{at}" for at in range(number)]
    assert batches[0].columns["caption"][:2].to_pylist() == [None, "c1"]
    assert read_rejects(tmp_path, SHARD.name).to_pylist() == [
        {"key": "bad", "member": "bad.jpg", "stage": "decode", "reason": "empty", "tar_offset": 77}
    ]


def test_nothing_of_an_embedding_is_nullable_or_compressed(tmp_path):
    write(tmp_path, 10)
    file = pq.ParquetFile(tmp_path / "embeddings" / f"{SHARD.name}.parquet")
    field = file.schema_arrow.field("embedding")
    assert not field.nullable
    assert not field.type.value_field.nullable
    assert field.type.value_type == pa.float16()
    column = file.metadata.row_group(0).column(1)
    assert column.compression == "UNCOMPRESSED"
    assert column.statistics is None


def test_the_law_is_checked_before_a_shard_appears(tmp_path):
    dataset = open_dataset(tmp_path, PixelEncoder().info, "float16", "test")
    writer = ShardWriter(tmp_path, SHARD, dataset)
    writer.append([sample(0)], Vectors(rows(1), np.ones(1, np.float32)), [(1, 1)])
    with pytest.raises(StoreError, match="1 rows \\+ 0 rejects are not 2 samples"):
        writer.publish(samples=2, precision="fp32", decoder="exact", device="cpu", seconds=0.0)
    writer.abort()
    assert published_shards(tmp_path) == {}
    assert list((tmp_path / "embeddings").iterdir()) == []


def test_a_refreshed_shard_without_rejects_leaves_no_old_ones(tmp_path):
    write(tmp_path, 3, rejects=[REJECT])
    write(tmp_path, 4, shard=REPLACED)
    assert published_shards(tmp_path)[SHARD.name].rejects == 0
    assert read_rejects(tmp_path, SHARD.name).num_rows == 0


def test_another_model_or_dtype_is_refused_by_name(tmp_path):
    write(tmp_path, 3)
    other = PixelEncoder(seed=1).info
    with pytest.raises(FingerprintError, match="seed 0.*not of pixels \\(random weights, seed 1\\)"):
        open_dataset(tmp_path, other, "float16", "test")
    with pytest.raises(StoreError, match="float16"):
        open_dataset(tmp_path, PixelEncoder().info, "float32", "test")
    assert read_dataset(tmp_path).model == PixelEncoder().info


def test_a_file_of_another_model_among_the_embeddings_is_refused(tmp_path):
    write(tmp_path / "a", 3)
    write(tmp_path / "b", 3, encoder=PixelEncoder(seed=1))
    name = f"{SHARD.name}.parquet"
    (tmp_path / "a" / "embeddings" / name).write_bytes((tmp_path / "b" / "embeddings" / name).read_bytes())
    with pytest.raises(FingerprintError, match=SHARD.name):
        list(read_embeddings(tmp_path / "a"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
        lambda path: pq.write_table(pa.table({"x": [1]}), path),
        lambda path: path.rename(path.with_name("renamed.parquet")),
    ],
    ids=["cut", "empty", "foreign", "renamed"],
)
def test_a_damaged_or_foreign_file_is_named(tmp_path, damage):
    write(tmp_path, 100)
    damage(tmp_path / "embeddings" / f"{SHARD.name}.parquet")
    with pytest.raises(StoreError, match="parquet"):
        published_shards(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"format_version": 99}', b'{"format_version": 1}'])
def test_a_damaged_dataset_json_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"dataset\.json"):
        read_dataset(tmp_path)


def test_the_footer_says_where_rows_came_from(tmp_path):
    write(tmp_path, 3, rejects=[REJECT])
    metadata = pq.ParquetFile(tmp_path / "embeddings" / f"{SHARD.name}.parquet").metadata.metadata
    record = json.loads(metadata[b"clipindex"])
    assert (record["url"], record["samples"], record["rows"], record["rejects"]) == ("/data/a.tar", 4, 3, 1)


class TestOtherReaders:
    """The files are Parquet for everyone."""

    @pytest.fixture(params=["float16", "float32"])
    def written(self, request, tmp_path):
        vectors = write(tmp_path, 50, dtype=request.param)
        return tmp_path / "embeddings" / f"{SHARD.name}.parquet", vectors, request.param

    def test_pandas(self, written):
        import pandas

        path, vectors, _ = written
        frame = pandas.read_parquet(path)
        assert list(frame["key"][:2]) == ["k0", "k1"]
        np.testing.assert_allclose(np.stack(list(frame["embedding"])), vectors, atol=3e-4)

    def test_polars(self, written):
        import polars

        path, vectors, _ = written
        found = polars.read_parquet(path)["embedding"].to_list()
        np.testing.assert_allclose(np.array(found, np.float32), vectors, atol=3e-4)

    def test_duckdb(self, written):
        import duckdb

        path, vectors, _ = written
        found = duckdb.sql(f"select embedding from '{path}'").fetchall()
        np.testing.assert_allclose(np.array([row[0] for row in found], np.float32), vectors, atol=3e-4)

    @pytest.mark.filterwarnings("ignore")  # the library's own, about its dependencies
    def test_hugging_face_datasets(self, written, tmp_path):
        import datasets

        path, vectors, _ = written
        found = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
        np.testing.assert_allclose(np.array(found["embedding"], np.float32), vectors, atol=3e-4)

    @pytest.mark.skipif(shutil.which("java") is None, reason="Spark runs on Java")
    @pytest.mark.filterwarnings("ignore")  # the library's own, about its dependencies
    def test_pyspark_reads_float32_and_refuses_half_floats(self, written):
        import pyspark.errors
        from pyspark.sql import SparkSession

        path, vectors, dtype = written
        spark = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
        if dtype == "float16":  # why --dtype float32 exists; once this fails, the documentation may say so
            with pytest.raises(pyspark.errors.AnalysisException, match="FLOAT16"):
                spark.read.parquet(str(path))
            return
        found = spark.read.parquet(str(path)).collect()
        np.testing.assert_allclose(np.array([row["embedding"] for row in found], np.float32), vectors)
        spark.stop()


def test_temporaries_of_dead_runs_are_removed_and_live_ones_kept(tmp_path):
    dataset = open_dataset(tmp_path, PixelEncoder().info, "float16", "test")
    alive = ShardWriter(tmp_path, SHARD, dataset)
    live_name = next((tmp_path / "embeddings").iterdir())
    parts = live_name.name.split(".")
    parts[-3] = "4194304"  # above any process id
    dead = live_name.with_name(".".join(parts))
    dead.write_bytes(b"half")
    for path in (dead, live_name):
        os.utime(path, (time.time() - 60,) * 2)
    open_dataset(tmp_path, PixelEncoder().info, "float16", "test")
    assert not dead.exists()
    assert live_name.exists()
    alive.abort()


def test_reading_never_makes_an_object_of_each_number(tmp_path):
    write(tmp_path, ROW_GROUP_ROWS)
    tracemalloc.start()
    num_rows = sum(len(batch.embedding) for batch in read_embeddings(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]  # of Python's own objects; Arrow's buffers are not among them
    tracemalloc.stop()
    assert num_rows == ROW_GROUP_ROWS
    assert peak < num_rows * 48  # a byte a number, where a float object takes 24


def test_rejects_that_a_crash_left_behind_do_not_count(tmp_path):
    write(tmp_path, 3, rejects=[REJECT])
    old = (tmp_path / "rejects" / f"{SHARD.name}.parquet").read_bytes()
    write(tmp_path, 4, shard=REPLACED)
    (tmp_path / "rejects" / f"{SHARD.name}.parquet").write_bytes(old)  # killed before it was removed
    assert read_rejects(tmp_path, SHARD.name).num_rows == 0
    write(tmp_path, 4, rejects=[REJECT, REJECT])
    (tmp_path / "rejects" / f"{SHARD.name}.parquet").write_bytes(old)
    with pytest.raises(StoreError, match="1 rejects instead of 2"):
        read_rejects(tmp_path, SHARD.name)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    "options",
    [{"data_page_size": 1 << 28}, {}, {"compression": "zstd"}, {"use_dictionary": True}, {"data_page_version": "2.0"}],
    ids=["one page", "many pages", "compressed", "dictionary", "version 2"],
)
def test_vectors_are_the_same_however_their_pages_lie(tmp_path, dtype, options):
    written = write(tmp_path, 20_000, dtype=dtype).astype(dtype)
    path = tmp_path / "embeddings" / f"{SHARD.name}.parquet"
    table = pq.read_table(path)
    footer = pq.read_metadata(path).metadata
    with pq.ParquetWriter(path, table.schema, **{"use_dictionary": False, "compression": "none", **options}) as writer:
        writer.write_table(table, row_group_size=7777)
        writer.add_key_value_metadata({"clipindex": footer[b"clipindex"]})
    batches = list(read_embeddings(tmp_path, ("key",)))
    np.testing.assert_array_equal(np.concatenate([batch.embedding for batch in batches]), written)
    assert [batch.first_row for batch in batches] == [0, 7777, 15554]
    assert batches[1].columns["key"][0].as_py() == "k7777"
    assert all(batch.embedding.flags.aligned and batch.embedding.flags.writeable for batch in batches)
    wanted = np.array([19_999, 0, 7777, 7776, 0])
    np.testing.assert_array_equal(VectorReader(tmp_path).take(SHARD.name, wanted), written[wanted])


def test_rows_that_a_shard_has_not_are_refused(tmp_path):
    write(tmp_path, 5)
    for wrong in ([5], [-1]):
        with pytest.raises(StoreError, match="has 5 rows"):
            VectorReader(tmp_path).take(SHARD.name, np.array(wrong))
