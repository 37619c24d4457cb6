import dataclasses
import functools
import json
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
from command_line import run_cli, run_process
from conftest import CUDA, DEVICES
from directories import INFO, clustered, write_directory, write_shard

from clipindex import build_index, search, verify
from clipindex.errors import ClipindexError, FingerprintError, IndexingError, StoreError, UsageError
from clipindex.index import build
from clipindex.nearest import Filter, scan
from clipindex.retrieval import Query
from clipindex.store import published_shards, read_embeddings

HERE = {"device": "cpu", "precision": "fp32"}
KINDS = ["flat", "hnsw", "ivf", "ivfsq", "ivfpq"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Six thousand rows in three shards."""
    folder = tmp_path_factory.mktemp("made")
    write_directory(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "emb"))


@pytest.fixture(scope="module")
def built(made, tmp_path_factory):
    """The same with an index, built once for all tests that begin with one like it, and the summary."""

    @functools.cache
    def build_once(**options):
        folder = shutil.copytree(made, tmp_path_factory.mktemp("built") / "emb")
        return folder, build_index(folder, **options, **HERE)

    return build_once


@pytest.fixture
def indexed(built, tmp_path):
    """A copy of one of these to work on, and its summary."""

    def copied(**options):
        template, summary = built(**options)
        return Path(shutil.copytree(template, tmp_path / "emb")), summary

    return copied


def stored(folder):
    batches = list(read_embeddings(folder, ("key",)))
    keys = [key for batch in batches for key in batch.columns["key"].to_pylist()]
    return np.concatenate([batch.embedding for batch in batches]).astype(np.float32), keys


def index_faults(folder):
    return [fault for fault in verify(folder).faults if "/index" in fault.path]


def search_keys(folder, keys, k=10, **options):
    return search(folder, [Query(keys=(key,)) for key in keys], k=k, **HERE, **options)


def found_of_truth(folder, keys, k=10):
    """Share of the rows of an exact search that a search through the index finds; both cosines must be the same."""
    truth, found = search_keys(folder, keys, k, exact=True), search_keys(folder, keys, k)
    cosines = {(at, hit.key): hit.cosine for at, hits in enumerate(truth) for hit in hits}
    both = [((at, hit.key), hit.cosine) for at, one in enumerate(found) for hit in one if (at, hit.key) in cosines]
    np.testing.assert_allclose([cosines[at] for at, _ in both], [cosine for _, cosine in both], atol=1e-5)
    return len(both) / len(cosines)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_reaches_its_target_and_says_so_truly(indexed, kind):
    folder, summary = indexed(kind=kind, target_recall=0.9)
    assert (summary.kind, summary.rows, summary.shards, summary.is_new) == (kind, 6000, 3, True)
    recall = summary.recall["image"]
    assert recall.recall_at_10 >= 0.9
    assert recall.queries == 1000
    others = [f"s{at % 3}-{at}" for at in range(5, 605, 3)]
    assert found_of_truth(folder, others) == pytest.approx(recall.recall_at_10, abs=0.06)
    assert summary.index_bytes == sum(
        path.stat().st_size for path in (folder / "index").iterdir() if path.name != "metadata.json"
    )
    document = json.loads((folder / "index" / "metadata.json").read_text())
    assert document["recall"]["image"]["recall_at_10"] == recall.recall_at_10
    assert not index_faults(folder)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["ivf", "ivfpq"])
def test_an_index_of_cudas_centroids_finds_as_much_with_as_little_effort(indexed, tmp_path, kind):
    folder, here = indexed(kind=kind, target_recall=0.9)
    there = build_index(folder, kind=kind, target_recall=0.9, rebuild=True, device=CUDA)
    assert there.recall["image"].recall_at_10 >= 0.9
    # Other centroids out of the same beginning: in bf16, with sums in any order. A CPU's float32 asks for as many.
    assert here.effort.probes / 2 <= there.effort.probes <= here.effort.probes * 2
    others = [f"s{at % 3}-{at}" for at in range(5, 605, 3)]
    assert found_of_truth(folder, others) == pytest.approx(there.recall["image"].recall_at_10, abs=0.06)
    assert not index_faults(folder)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("where", [Filter(), Filter(labels=(3, 4))])
def test_all_rows_are_looked_at_on_any_device(made, device, where):
    rows, _ = stored(made)
    asked = rows[::11] / np.linalg.norm(rows[::11], axis=1, keepdims=True)
    passing = np.flatnonzero(np.isin(np.arange(6000) % 2000 % 10, where.labels or range(10)))
    cosines = asked @ rows[passing].T
    found = scan(made, asked, 101, where=where, device=device)
    # Sums in float32, in another order.
    np.testing.assert_allclose(found.cosines, -np.sort(-cosines, axis=1)[:, :101], atol=1e-5)
    places = found.rows + 2000 * np.array([int(name[1:]) for name in found.names])[found.shards]
    assert np.isin(places, passing).all()
    np.testing.assert_allclose(np.take_along_axis(asked @ rows.T, places, axis=1), found.cosines, atol=1e-5)


def test_the_effort_is_the_least_that_reaches_the_target(folder):
    few = build_index(folder, kind="ivf", target_recall=0.7, **HERE)
    most = build_index(folder, kind="ivf", target_recall=1.0, **HERE)
    assert 0.7 <= few.recall["image"].recall_at_10 < most.recall["image"].recall_at_10 == 1
    assert few.effort.probes < most.effort.probes
    assert not most.is_new  # it was trained already


def test_what_faiss_alone_reads_gives_the_same_rows(indexed):
    folder, _ = indexed(kind="ivf")
    (path,) = (folder / "index").glob("index-*.faiss")
    program = f"""
import faiss, numpy as np
index = faiss.read_index({str(path)!r}, faiss.IO_FLAG_ONDISK_SAME_DIR)
faiss.extract_index_ivf(index).nprobe = 10_000
vectors = np.load({str(folder / "vectors.npy")!r})
print("ids", index.search(vectors, 1)[1][:, 0].tolist(), index.metric_type)
"""
    vectors, _ = stored(folder)
    np.save(folder / "vectors.npy", vectors[::1000])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"ids {list(range(0, 6000, 1000))} {faiss.METRIC_INNER_PRODUCT}"
    table = pq.read_table(next((folder / "index").glob("shards-*.parquet"))).to_pylist()
    assert [(row["name"], row["first_id"], row["rows"]) for row in table] == [("s0", 0, 2000), ("s1", 2000, 2000),
                                                                             ("s2", 4000, 2000)]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_shards_come_go_and_are_replaced_without_training_anew(indexed, kind):
    folder, first = indexed(kind=kind, target_recall=0.9)
    write_shard(folder, "s3", clustered(500, seed=7))
    (folder / "embeddings" / "s1.parquet").unlink()
    write_shard(folder, "s2", clustered(1500, seed=8), version="mtime:2")
    second = build_index(folder, target_recall=0.9, **HERE)
    assert (second.rows, second.shards_added, second.shards_removed) == (4000, 3 if second.is_new else 2,
                                                                        0 if second.is_new else 2)  # fmt: skip
    # A flat index is as fast to build as to read; an hnsw one that has lost more than a fifth has to be.
    assert second.is_new == (kind in ("flat", "hnsw"))
    assert second.kind == kind
    if kind.startswith("ivf"):
        assert second.drift["image"] == pytest.approx(first.recall["image"].recall_at_10, abs=0.1)
    keys = [f"s{at % 4}-{at}" for at in range(0, 400, 4) for at in (at, at + 2, at + 3)]
    assert found_of_truth(folder, keys) >= 0.85
    assert all(hit.shard != "s1" for hits in search_keys(folder, keys) for hit in hits)
    third = build_index(folder, target_recall=0.9, **HERE)
    assert (third.shards_added, third.shards_removed, third.steps) == (0, 0, {})
    assert len(list((folder / "index").iterdir())) == (4 if kind.startswith("ivf") else 3)


def test_hnsw_takes_more_and_leaves_out_what_went(indexed):
    folder, _ = indexed(kind="hnsw", target_recall=0.9)
    write_shard(folder, "s3", clustered(3000, seed=7))
    build_index(folder, target_recall=0.9, **HERE)
    write_shard(folder, "s0", clustered(10, seed=9), version="mtime:2")
    (folder / "embeddings" / "s0.parquet").unlink()
    summary = build_index(folder, target_recall=0.9, **HERE)
    assert (summary.is_new, summary.shards_removed) == (True, 0)  # 2,000 of 9,000: more than a fifth
    write_shard(folder, "s4", clustered(5000, seed=3))
    build_index(folder, target_recall=0.9, **HERE)
    (folder / "embeddings" / "s1.parquet").unlink()
    summary = build_index(folder, target_recall=0.9, **HERE)
    assert (summary.is_new, summary.shards_removed) == (False, 1)
    assert all(hit.shard != "s1" for hits in search_keys(folder, [f"s2-{at}" for at in range(100)]) for hit in hits)
    assert found_of_truth(folder, [f"s2-{at}" for at in range(100)]) > 0.8


def test_rows_the_index_does_not_know_are_found_all_the_same(indexed, caplog):
    folder, _ = indexed(kind="ivf")
    extra = clustered(50, seed=5)
    write_shard(folder, "t", extra)
    write_shard(folder, "s0", extra[::-1], version="mtime:2")
    caplog.set_level("INFO", "clipindex")
    ((hit, other, *_),) = search_keys(folder, ["t-7"], k=3)
    assert {(hit.key, hit.shard), (other.key, other.shard)} == {("t-7", "t"), ("s0-42", "s0")}
    assert "2 shards are not in the index" in caplog.text
    assert not any(hit.shard == "s0" and hit.row >= 50 for hit in search_keys(folder, ["s1-3"], k=3000)[0])
    assert "index" in " ".join(verify(folder).notes)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf", "ivfpq"])
@pytest.mark.parametrize("labels", [(3,), (1, 2, 3, 4, 5, 6)])
def test_filters_hold_through_the_index(built, kind, labels):
    folder, _ = built(kind=kind, target_recall=0.9)
    keys = [f"s1-{at}" for at in range(0, 300, 3)]
    truth = search_keys(folder, keys, where=Filter(labels=labels), exact=True)
    found = search_keys(folder, keys, where=Filter(labels=labels))
    assert {hit.label for hits in found for hit in hits} <= set(labels)
    same = [len({hit.key for hit in one} & {hit.key for hit in other}) for one, other in zip(truth, found, strict=True)]
    assert np.mean(same) >= 8


def test_the_kind_goes_by_rows_and_memory(folder, monkeypatch):
    from clipindex.index.plan import make_plan

    assert make_plan("auto", 6000, 512, 10**9).kind == "flat"
    assert [make_plan("auto", 10**6, 512, gigabytes * 10**9).kind for gigabytes in (2, 1, 0.5, 0.1)] == [
        "ivf", "ivfsq", "ivfpq", "ivfpq",
    ]  # fmt: skip
    assert [make_plan("auto", 10**6, 512, int(size)).code_bytes for size in (2e8, 1e8, 5e7, 1e6)] == [128, 64, 32, 32]
    assert make_plan("auto", 10**9, 512, 4 * 10**9).num_bytes(10**9) < 45e9
    with pytest.raises(UsageError, match="flat takes 2.0 GB"):
        make_plan("flat", 10**6, 512, 10**9)
    assert build_index(folder, memory_bytes=500_000, target_recall=0.8, **HERE).kind == "ivfsq"


def test_lists_that_outgrow_memory_are_written_in_parts_and_merged(folder, monkeypatch):
    whole = build_index(folder, kind="ivf", **HERE)
    expected = search_keys(folder, [f"s1-{at}" for at in range(200)])
    monkeypatch.setattr(build, "PART_BYTES", 50_000)
    parts = build_index(folder, kind="ivf", rebuild=True, **HERE)
    assert search_keys(folder, [f"s1-{at}" for at in range(200)]) == expected
    assert (parts.index_bytes, parts.effort) == (whole.index_bytes, whole.effort)
    assert sorted(path.name.split("-")[0] for path in (folder / "index").iterdir()) == [
        "index", "lists", "metadata.json", "shards",
    ]  # fmt: skip


def test_a_target_that_is_missed_publishes_nothing(folder):
    with pytest.raises(IndexingError, match=r"no index was published: .*recall@10 of image queries is 0\.\d+, below 1"):
        build_index(folder, kind="ivf", target_recall=1.0, max_query_ms=0.01, **HERE)
    assert not (folder / "index" / "metadata.json").exists()
    assert list((folder / "index").iterdir()) == []
    summary = build_index(folder, kind="ivf", target_recall=1.0, max_query_ms=0.01, accept_recall=True, **HERE)
    assert summary.recall["image"].recall_at_10 < 1
    assert summary.effort.probes == 1


def test_queries_that_are_texts_are_measured_too(tmp_path):
    from clipindex.demo import DATA
    from clipindex.embed_job import embed

    embed(str(DATA / "wds_shapes"), tmp_path / "emb", model="demo", batch_size=64, **HERE)
    names = (DATA / "wds_shapes" / "classnames.txt").read_text().splitlines()
    summary = build_index(tmp_path / "emb", kind="ivf", prompts=[f"a {name}" for name in names], **HERE)
    assert set(summary.recall) == {"image", "text"}
    assert min(found.recall_at_10 for found in summary.recall.values()) >= 0.95
    again = build_index(tmp_path / "emb", **HERE)
    assert (set(again.recall), again.steps) == ({"image", "text"}, {})  # nothing new: what was measured stays
    embed(str(DATA / "wds_digits"), tmp_path / "emb", model="demo", batch_size=64, **HERE)
    grown = build_index(tmp_path / "emb", **HERE)
    assert (set(grown.recall), set(grown.drift), grown.is_new) == ({"image", "text"}, {"image", "text"}, False)
    assert grown.recall["text"].queries == len(names)


@pytest.mark.parametrize("role", ["metadata.json", "index-*.faiss", "lists-*.bin", "shards-*.parquet"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "empty"])
def test_damage_is_named_and_mended_by_building_again(indexed, role, damage):
    folder, _ = indexed(kind="ivf")
    (path,) = (folder / "index").glob(role)
    data = bytearray(path.read_bytes())
    if damage == "changed":
        data[len(data) // 2 : len(data) // 2 + 64] = bytes(range(64))
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "changed": data, "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    hidden = (role, damage) in {("lists-*.bin", "changed"), ("metadata.json", "gone")}  # only verify reads all lists
    if not hidden:
        with pytest.raises(StoreError, match="clipindex index --rebuild"):
            search_keys(folder, ["s0-1"])
    if (role, damage) != ("metadata.json", "gone"):
        assert all("rebuild" in fault.remedy for fault in index_faults(folder)) and index_faults(folder)
    build_index(folder, kind="ivf", rebuild=True, **HERE)
    assert search_keys(folder, ["s0-1"])[0][0].key == "s0-1"
    assert not index_faults(folder)


def test_an_index_of_other_embeddings_is_refused(indexed, tmp_path):
    folder, _ = indexed(kind="ivf")
    write_directory(tmp_path / "other")
    shutil.copytree(folder / "index", tmp_path / "other" / "index")
    path = tmp_path / "other" / "index" / "metadata.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "fingerprint": "f" * 64}))
    with pytest.raises(FingerprintError, match="ffffffffffff"):
        search_keys(tmp_path / "other", ["s0-1"])
    assert build_index(tmp_path / "other", kind="ivf", **HERE).is_new
    assert search_keys(tmp_path / "other", ["s0-1"])[0][0].key == "s0-1"


def test_vectors_that_are_not_those_of_the_rows_are_noticed(indexed):
    """As of an index that was copied from elsewhere by hand, states and all."""
    folder, _ = indexed(kind="ivf")
    (lists,) = (folder / "index").glob("lists-*.bin")
    data = np.fromfile(lists, np.uint8)
    lists.write_bytes(data[::-1].tobytes())
    with pytest.raises(StoreError, match="damaged"):
        search_keys(folder, [f"s0-{at}" for at in range(50)])


@pytest.mark.parametrize(
    "change",
    [{"effort": {"probes": "3", "candidates": 1}}, {"effort": {"probes": -1, "candidates": 1}}, {"files": {}},
     {"rows": 10**9}, {"format_version": 7}, {"plan": {}}],
)  # fmt: skip
def test_metadata_that_cannot_be_is_refused(indexed, change):
    folder, _ = indexed(kind="ivf")
    path = folder / "index" / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(StoreError, match="--rebuild"):
        search_keys(folder, ["s0-1"])


def test_a_copied_directory_keeps_its_index(indexed, tmp_path):
    folder, _ = indexed(kind="ivf")
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    assert build_index(copy, **HERE).steps == {}


def test_what_cannot_be_indexed_is_said(folder, tmp_path):
    for wrong in ({"kind": "best"}, {"target_recall": 0.0}, {"target_recall": 1.5}):
        with pytest.raises(UsageError):
            build_index(folder, **wrong, **HERE)
    with pytest.raises(ClipindexError, match="no embedding directory"):
        build_index(tmp_path / "nowhere", **HERE)
    write_shard(tmp_path / "empty", "s", np.empty((0, INFO.dim), np.float32))
    with pytest.raises(IndexingError, match="no rows"):
        build_index(tmp_path / "empty", **HERE)


@pytest.mark.parametrize("kind", ["auto", "hnsw", "ivf", "ivfsq", "ivfpq"])
@pytest.mark.parametrize("number", [1, 2, 45, 300])
def test_the_smallest_directories_have_indexes_too(tmp_path, kind, number):
    write_shard(tmp_path, "s", clustered(number))
    if kind == "ivfpq" and number < 256:
        with pytest.raises(UsageError, match="256"):
            build_index(tmp_path, kind=kind, **HERE)
        return
    assert build_index(tmp_path, kind=kind, **HERE).rows == number
    assert [hit.key for hit in search_keys(tmp_path, ["s-0"], k=1)[0]] == ["s-0"]
    found = search_keys(tmp_path, ["s-0"], k=1000)[0]  # more than its lists hold, and than there are
    assert {hit.key for hit in found} == {f"s-{at}" for at in range(number)}


def test_few_rows_of_many_dimensions(tmp_path):
    """Fewer than would span the space, and too little memory for anything."""
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(300, 512)).astype(np.float32)
    raw /= np.linalg.norm(raw, axis=1, keepdims=True)
    write_shard(tmp_path, "s", raw, info=dataclasses.replace(INFO, dim=512))
    summary = build_index(tmp_path, memory_bytes=10_000, target_recall=0.8, **HERE)
    assert summary.kind == "ivfpq"
    assert found_of_truth(tmp_path, [f"s-{at}" for at in range(100)]) > 0.7


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivfpq"])
def test_shards_without_rows_are_no_trouble(tmp_path, kind):
    nothing = np.empty((0, INFO.dim), np.float32)
    for at, vectors in enumerate(
        [nothing, clustered(400), nothing, clustered(1), nothing, clustered(300, seed=2), nothing]
    ):
        write_shard(tmp_path, f"s{at}", vectors)
    summary = build_index(tmp_path, kind=kind, target_recall=0.8, **HERE)
    assert (summary.rows, summary.shards) == (701, 7)
    for key in ("s1-399", "s3-0", "s5-0", "s5-299"):
        ((hit, *others),) = search_keys(tmp_path, [key], k=900)
        assert hit.key == key
        assert len(others) == 700
    (tmp_path / "embeddings" / "s4.parquet").unlink()
    write_shard(tmp_path, "s7", nothing)
    build_index(tmp_path, target_recall=0.8, **HERE)
    assert search_keys(tmp_path, ["s5-0"])[0][0].key == "s5-0"


def test_float32_directories(tmp_path):
    write_directory(tmp_path, dtype="float32")
    for kind in ("ivf", "flat"):
        build_index(tmp_path, kind=kind, **HERE)
        assert found_of_truth(tmp_path, [f"s1-{at}" for at in range(200)]) > 0.9


def test_a_target_that_a_graph_cannot_reach_is_said(tmp_path):
    """Copies beyond a node's links are islands."""
    base = clustered(700)
    write_shard(tmp_path, "s", np.concatenate([base, np.repeat(base[:2], 300, axis=0)]))
    with pytest.raises(IndexingError, match="below 1"):
        build_index(tmp_path, kind="hnsw", target_recall=1.0, **HERE)


def test_what_was_accepted_is_not_taken_for_what_was_asked(folder):
    build_index(folder, kind="ivf", target_recall=1.0, max_query_ms=0.01, accept_recall=True, **HERE)
    with pytest.raises(IndexingError, match="no index was published"):  # the limit of time is still there
        build_index(folder, target_recall=1.0, **HERE)
    assert build_index(folder, target_recall=1.0, accept_recall=True, **HERE).steps == {}


def test_an_index_that_outgrows_its_memory_is_planned_anew(folder):
    assert build_index(folder, memory_bytes=10**9, target_recall=0.8, **HERE).kind == "flat"
    assert build_index(folder, memory_bytes=700_000, target_recall=0.8, **HERE).kind == "ivf"
    again = build_index(folder, memory_bytes=400_000, target_recall=0.8, **HERE)
    assert (again.kind, again.is_new) == ("ivfsq", True)
    with pytest.raises(UsageError, match="hnsw takes"):
        build_index(folder, kind="hnsw", memory_bytes=400_000, **HERE)


def test_drift_is_of_what_was_added(folder):
    build_index(folder, kind="ivf", target_recall=0.7, **HERE)
    assert build_index(folder, target_recall=0.99, **HERE).advice is None
    rng = np.random.default_rng(1)
    strange = rng.normal(size=(6000, INFO.dim)).astype(np.float32)
    write_shard(folder, "strange", strange / np.linalg.norm(strange, axis=1, keepdims=True))
    summary = build_index(folder, target_recall=0.99, **HERE)
    assert summary.drift["image"] < 0.99 <= summary.recall["image"].recall_at_10
    assert "--rebuild" in summary.advice


def test_other_runs_may_publish_meanwhile(folder, monkeypatch):
    """A shard comes, one goes and one is replaced after the run has looked, before it reads."""
    from clipindex.indexing import job

    made_plan = job.make_plan

    def meanwhile(*arguments):
        write_shard(folder, "late", clustered(50, seed=4))
        (folder / "embeddings" / "s0.parquet").unlink(missing_ok=True)
        return made_plan(*arguments)

    monkeypatch.setattr(job, "make_plan", meanwhile)
    with pytest.raises(StoreError, match="s0"):
        build_index(folder, kind="ivf", **HERE)
    monkeypatch.setattr(job, "make_plan", lambda *arguments: (write_shard(folder, "later", clustered(40, seed=6)),
                                                             made_plan(*arguments))[1])  # fmt: skip
    summary = build_index(folder, kind="ivf", **HERE)
    assert summary.rows == 4050  # what came later is found all the same
    assert search_keys(folder, ["later-3"])[0][0].key == "later-3"
    monkeypatch.undo()
    assert build_index(folder, **HERE).rows == 4090


@pytest.mark.parametrize("exact", [True, False])
def test_a_shard_replaced_during_a_search_is_searched_again(indexed, monkeypatch, exact):
    """Or its hits would have the keys of other rows."""
    from clipindex import retrieval

    folder, _ = indexed(kind="ivf")
    search_rows = retrieval.nearest
    again = clustered(2000, seed=1)[::-1]  # the same rows in another order

    def meanwhile(*arguments, **options):
        found = search_rows(*arguments, **options)
        if "mtime:2" not in {record.version for record in published_shards(folder).values()}:
            write_shard(folder, "s1", again, version="mtime:2")
        return found

    wanted = search_keys(folder, ["s1-1999"], k=1)[0][0].cosine
    monkeypatch.setattr(retrieval, "nearest", meanwhile)
    ((hit,),) = search_keys(folder, ["s1-1999"], k=1, exact=exact)
    assert (hit.key, hit.cosine) == ("s1-0", pytest.approx(wanted, abs=1e-3))


def _search_on(folder, stop, generations):
    while not stop.is_set():
        ((hit,),) = search_keys(folder, ["s1-1"], k=1)
        assert hit.key == "s1-1"
        generations.put(json.loads((folder / "index" / "metadata.json").read_text())["files"]["index"][0])


def test_a_reader_never_meets_half_an_index(folder):
    build_index(folder, kind="ivf", target_recall=0.8, **HERE)
    context = multiprocessing.get_context("spawn")
    stop, generations = context.Event(), context.Queue()
    reader = context.Process(target=_search_on, args=(folder, stop, generations))
    reader.start()
    met = {generations.get(timeout=60)}
    while len(met) < 5:
        build_index(folder, kind="ivf", target_recall=0.8, rebuild=True, **HERE)
        met.add(generations.get(timeout=60))
        while not generations.empty():
            met.add(generations.get())
        assert reader.is_alive()
    stop.set()
    while reader.is_alive():  # it waits until what it put has been taken
        while not generations.empty():
            generations.get()
        reader.join(0.1)
    assert reader.exitcode == 0
    assert len(list((folder / "index").iterdir())) == 4


def test_the_command(folder):
    done = run_process("index", folder, "--kind", "ivf", "--memory", "1 GB", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["kind"], summary["rows"]) == ("ivf", 6000)
    again = run_cli("index", folder)
    assert "nothing new" in again.stdout
    found = run_cli("search", folder, "--key", "s1-5", "-k", 3, "--json")
    assert json.loads(found.stdout)[0]["hits"][0]["key"] == "s1-5"
    missed = run_cli("index", folder, "--target-recall", 1, "--max-query-ms", 0.001, "--rebuild", "--device", "cpu")
    assert (missed.returncode, missed.stdout) == (1, "")
    assert "no index was published" in missed.stderr
    for wrong in (
        ["--memory", "much"],
        ["--memory", "0"],
        ["--memory", "1e400"],
        ["--pretrained", "x"],
        ["--target-recall", "2"],
    ):
        assert run_cli("index", folder, *wrong).returncode == 2
