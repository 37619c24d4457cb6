import json
import weakref

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from command_line import run_cli, run_process
from conftest import CUDA
from directories import INFO, clustered, write_shard
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from clipindex import build_index, duplicates, find_duplicates
from clipindex.errors import IndexingError, StoreError, UsageError
from clipindex.index.files import open_index, read_record
from clipindex.nearest import Arithmetic
from clipindex.store import VectorReader, read_embeddings

HERE = {"device": "cpu", "precision": "fp32"}
THRESHOLD = 0.97


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Rows of which some are copies, some nearly so, in several shards, with images of several sizes."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    base = clustered(3000, seed=1, spread=1.0)
    near = base[:400] + rng.normal(size=(400, base.shape[1])) * 0.015
    far = base[400:600] + rng.normal(size=(200, base.shape[1])) * 0.06
    vectors = np.concatenate([base, base[1000:1100], near, far, np.repeat(base[:1], 300, axis=0)])
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    vectors = vectors[rng.permutation(len(vectors))]
    for at, part in enumerate(np.array_split(vectors, 3)):
        write_shard(folder, f"s{at}", part, sizes=[(10 + row % 7, 20) for row in range(len(part))])
    return folder


def truth(folder):
    """Components of the graph of all pairs at the threshold, as sets of (shard, row), of two and more."""
    batches = list(read_embeddings(folder))
    vectors = np.concatenate([batch.embedding for batch in batches]).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    places = [(batch.shard.name, batch.first_row + at) for batch in batches for at in range(len(batch.embedding))]
    pairs = np.nonzero(vectors @ vectors.T >= THRESHOLD)
    _, component = connected_components(coo_array((np.ones(len(pairs[0])), pairs), shape=(len(vectors),) * 2))
    groups = {}
    for place, number in zip(places, component, strict=True):
        groups.setdefault(number, set()).add(place)
    return {frozenset(group) for group in groups.values() if len(group) > 1}, dict(zip(places, vectors, strict=True))


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf", "ivfsq", "ivfpq"])
def test_groups_are_the_components_of_an_exact_search(made, tmp_path, kind):
    build_index(made, kind=kind, target_recall=0.9, rebuild=True, **HERE)
    expected, vectors = truth(made)
    assert len(expected) > 300
    target = 1.0 if kind in ("flat", "hnsw") else 0.99
    summary = find_duplicates(made, threshold=THRESHOLD, target_recall=target, out=tmp_path)
    rows = pq.read_table(tmp_path / "groups.parquet").to_pylist()
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    found = {frozenset((row["shard"], row["row"]) for row in group) for group in groups.values()}
    assert len(found & expected) >= 0.98 * len(expected)
    assert found == expected or target < 1
    assert summary.recall >= target
    assert all(any(group <= whole for whole in expected) for group in found)
    num_lists = read_record(made).plan.num_lists
    assert 1 <= summary.lists < num_lists / 4 if num_lists else summary.lists == 1
    assert (summary.groups, summary.duplicates, summary.largest) == (
        len(groups), len(rows) - len(groups), max(len(group) for group in groups.values()),
    )  # fmt: skip
    assert json.loads((tmp_path / "summary.json").read_text())["groups"] == summary.groups
    for group in groups.values():
        kept, *others = group
        assert kept["keep"] and not any(row["keep"] for row in others)
        assert kept["width"] == max(row["width"] for row in group)
        one = vectors[kept["shard"], kept["row"]]
        for row in group:
            exact = min(float(vectors[row["shard"], row["row"]] @ one), 1)
            assert row["cosine"] == pytest.approx(exact, abs=1e-5)
            assert row["key"] == f"{row['shard']}-{row['row']}"


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_one_pair_in_a_block_is_one_as_any_other(tmp_path, kind):
    """Shards of a row each, of which two are nearly the same."""
    vectors = np.eye(12, INFO.dim, dtype=np.float32)
    vectors[7] = vectors[3] + 0.1 * vectors[5]
    for at, vector in enumerate(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)):
        write_shard(tmp_path, f"s{at:02}", vector[None])
    build_index(tmp_path, kind=kind, **HERE)
    summary = find_duplicates(tmp_path, threshold=THRESHOLD, out=tmp_path / "out", **HERE)
    assert groups_of(tmp_path / "out") == {frozenset({("s03", 0), ("s07", 0)})}
    assert (summary.recall, summary.checked) == (1, 2)


def groups_of(folder):
    """Sets of (shard, row)."""
    groups = {}
    for row in pq.read_table(folder / "groups.parquet").to_pylist():
        groups.setdefault(row["group"], set()).add((row["shard"], row["row"]))
    return {frozenset(group) for group in groups.values()}


@pytest.mark.parametrize("kind", ["flat", "ivf"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_memory_and_precision_change_nothing(made, tmp_path, monkeypatch, kind, precision):
    """Of vectors there are some hundreds at a time, which none outlives, of lists some, of scores 64 x 128."""
    build_index(made, kind=kind, target_recall=0.9, rebuild=True, **HERE)
    find_duplicates(made, threshold=THRESHOLD, out=tmp_path / "large", device="cpu", precision=precision)
    reads, pieces, held = [], [], []
    read, unit = duplicates.held._read, duplicates.held.unit

    def spied(rows, ids, *others):
        assert all(one() is None for one in held)
        found = read(rows, ids, *others)
        held.extend(map(weakref.ref, (found.stored, found.rounded)))
        reads.append(len(ids))
        return found

    monkeypatch.setattr(duplicates.held, "_read", spied)
    monkeypatch.setattr(duplicates.held, "unit", lambda some: pieces.append(len(some)) or unit(some))
    monkeypatch.setattr(duplicates.rows, "ROWS_AT_ONCE", 50)
    monkeypatch.setattr(duplicates.pairs, "EXACT_AT_ONCE", 20)
    monkeypatch.setattr(duplicates.job, "default_memory_bytes", lambda: 500_000)
    monkeypatch.setattr(duplicates.pairs, "PIECE", 64)
    monkeypatch.setattr(duplicates.pairs, "TILE_SCORES", 64 * 128)
    told = []
    find_duplicates(
        made, threshold=THRESHOLD, out=tmp_path / "small", device="cpu", precision=precision,
        on_progress=lambda *each: told.append(each),
    )  # fmt: skip
    compared = [(done, total) for step, done, total in told if step == "compare"]
    assert compared[-1][0] == compared[-1][1] == max(done for done, _ in compared)  # each row once
    assert groups_of(tmp_path / "small") == groups_of(tmp_path / "large")
    assert groups_of(tmp_path / "small") == truth(made)[0] or kind == "ivf"
    assert len(reads) > 5 and max(reads) <= 500_000 / 4 / INFO.dim / (2 + 2)
    assert sum(pieces) == sum(reads) and max(pieces) == 50


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["flat", "ivf"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_groups_on_cuda_are_those_of_the_cpu(made, tmp_path, monkeypatch, kind, precision):
    """To the row: what products leave open is decided by cosines that the CPU computes."""
    build_index(made, kind=kind, target_recall=0.9, rebuild=True, **HERE)
    for name in ("whole", "pieces"):
        found = find_duplicates(made, threshold=THRESHOLD, target_recall=1, out=tmp_path / name, device=CUDA,
                                precision=precision)  # fmt: skip
        assert groups_of(tmp_path / name) == truth(made)[0]
        assert found.recall == 1
        monkeypatch.setattr(duplicates.pairs, "PIECE", 64)
        monkeypatch.setattr(duplicates.pairs, "TILE_SCORES", 64 * 128)
    here = find_duplicates(made, threshold=THRESHOLD, target_recall=0.9, out=tmp_path / "here", **HERE)
    there = find_duplicates(made, threshold=THRESHOLD, target_recall=0.9, out=tmp_path / "there", device=CUDA)
    assert (there.lists, there.recall) == pytest.approx((here.lists, here.recall), rel=0.1)


def test_a_cuda_device_has_memory_of_its_own(made, monkeypatch):
    build_index(made, kind="flat", rebuild=True, **HERE)
    opened = open_index(made, 1 << 30)
    rows = duplicates.rows.Rows(made, opened, [shard.name for shard in opened.shards], VectorReader(made))
    free = 40_000 * INFO.dim * 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
    cpu, cuda = (Arithmetic(torch.device(name), torch.bfloat16) for name in ("cpu", "cuda"))
    assert duplicates.held.most_rows(rows, cpu, free) == 20_000
    assert duplicates.held.most_rows(rows, cuda, free) == 10_000  # a quarter
    assert duplicates.held.most_rows(rows, cuda, free // 8) == 5_000  # which the CPU keeps beside it


@pytest.mark.parametrize("target", [0.5, 0.99])
def test_a_lower_target_looks_at_less_and_finds_as_much_as_it_says(made, tmp_path, target):
    build_index(made, kind="ivf", target_recall=0.9, rebuild=True, **HERE)
    most = find_duplicates(made, threshold=THRESHOLD, target_recall=1, out=tmp_path / "most")
    assert groups_of(tmp_path / "most") == truth(made)[0]
    summary = find_duplicates(made, threshold=THRESHOLD, target_recall=target, out=tmp_path / "some")
    assert target <= summary.recall <= most.recall
    assert summary.lists <= most.lists
    expected, found = truth(made)[0], groups_of(tmp_path / "some")
    assert all(any(group <= whole for whole in expected) for group in found)  # nothing that is not a pair
    assert sum(map(len, found)) >= (target - 0.02) * sum(map(len, expected))
    if target < 0.9:
        assert summary.lists < most.lists


@pytest.mark.parametrize("target", [0.5, 0.99, 1])
def test_a_search_that_loses_pairs_is_no_result(made, tmp_path, monkeypatch, target):
    """Copies are joined all the same."""
    build_index(made, kind="ivf", target_recall=0.9, rebuild=True, **HERE)
    monkeypatch.setattr(duplicates.pairs._Looker, "_look", lambda *_: None)
    with pytest.raises(IndexingError, match="were not joined: products in torch.* --device cpu"):
        find_duplicates(made, threshold=THRESHOLD, target_recall=target, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_few_pairs_that_are_lost_are_missed_among_many_copies(tmp_path, monkeypatch):
    base = clustered(700, spread=1.0)
    near = base[:6] + np.random.default_rng(0).normal(size=(6, INFO.dim)) * 0.01
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    write_shard(tmp_path, "s", np.concatenate([base, base[100:], near.astype(np.float32)]))
    build_index(tmp_path, kind="flat", **HERE)
    assert find_duplicates(tmp_path, threshold=0.98).groups == 606
    monkeypatch.setattr(duplicates.pairs._Looker, "_look", lambda *_: None)
    with pytest.raises(IndexingError, match="12 of 12 pairs"):
        find_duplicates(tmp_path, threshold=0.98)


@pytest.mark.parametrize(("number", "spared"), [(5, 1), (1999, 1), (2000, 2)])
def test_a_thousandth_of_the_pairs_may_be_lost_or_one(number, spared):
    """What is summed in another order may be rounded to the other side of a reach."""
    pairs = np.arange(2 * number).reshape(number, 2)
    search = duplicates.reach.Search(None, 0.0, 1.0, 0.99, number, pairs)
    names = pairs[:, :1].repeat(2, axis=1).flatten()
    here = Arithmetic(torch.device("cpu"), torch.float32)
    names[1 : 2 * spared : 2] = -1
    duplicates.job._check(names, search, here)
    names[2 * spared + 1] = -1
    with pytest.raises(IndexingError, match=f"{spared + 1} of {number} pairs"):
        duplicates.job._check(names, search, here)


def test_vectors_whose_hashes_meet_are_no_copies(made, tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates.copies, "_hashes", lambda vectors: np.zeros(len(vectors), np.uint64))
    build_index(made, kind="flat", rebuild=True, **HERE)
    find_duplicates(made, threshold=THRESHOLD, out=tmp_path)
    assert groups_of(tmp_path) == truth(made)[0]


@pytest.mark.parametrize("target", [0.99, 1])
def test_very_many_that_are_nearly_one_hide_no_others(tmp_path, target):
    """Once most of a product's rows are of one group, only what is not is looked at."""
    rng = np.random.default_rng(0)
    others = clustered(600, seed=3, spread=1.0)
    near = others[:200] + rng.normal(size=(200, INFO.dim)) * 0.01
    many = clustered(1, seed=5) + rng.normal(size=(3000, INFO.dim)) * 0.002
    vectors = np.concatenate([many, others, near])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    write_shard(tmp_path, "s", vectors[rng.permutation(len(vectors))].astype(np.float32))
    build_index(tmp_path, kind="ivf", **HERE)
    summary = find_duplicates(tmp_path, target_recall=target, threshold=THRESHOLD)
    expected, found = truth(tmp_path)[0], groups_of(tmp_path / "duplicates")
    assert summary.largest >= 3000 and len(expected) > 100
    assert len(found & expected) >= 0.98 * len(expected)
    assert found == expected or target < 1


def test_rows_that_have_gone_are_in_no_group(tmp_path):
    """The graph keeps what it was built of."""
    copies = clustered(90, spread=1.0)
    for name, vectors in (("a", copies), ("b", clustered(400, seed=2, spread=1.0)), ("c", copies)):
        write_shard(tmp_path, name, vectors)
    build_index(tmp_path, kind="hnsw", **HERE)
    assert find_duplicates(tmp_path, threshold=0.999).groups == 90
    (tmp_path / "embeddings" / "a.parquet").unlink()
    assert not build_index(tmp_path, **HERE).is_new
    assert find_duplicates(tmp_path, threshold=0.999).groups == 0


def test_a_damaged_embedding_ends_it(tmp_path):
    vectors = clustered(200)
    write_shard(tmp_path, "s", vectors)
    build_index(tmp_path, kind="flat", **HERE)
    path = tmp_path / "embeddings" / "s.parquet"
    content = path.read_bytes()
    row = vectors[7].astype(np.float16).tobytes()
    at = content.index(row)
    path.write_bytes(content[:at] + b"\xff\x7b" * (len(row) // 2) + content[at + len(row) :])
    with pytest.raises(StoreError, match="damaged embedding among rows 0 to 199"):
        find_duplicates(tmp_path)


def test_a_corpus_of_one_image_is_one_group(tmp_path):
    write_shard(tmp_path, "s", np.repeat(clustered(1), 20_000, axis=0))
    build_index(tmp_path, kind="ivf", **HERE)
    summary = find_duplicates(tmp_path)
    assert (summary.groups, summary.duplicates, summary.largest) == (1, 19_999, 20_000)


@pytest.mark.parametrize("threshold", [0.999, 0.9999, 0.999999])
def test_copies_are_found_at_any_threshold(tmp_path, threshold):
    """Rounded to float16 a vector is a hair shorter or longer than one."""
    write_shard(tmp_path, "s", np.repeat(clustered(500, spread=1.0), 2, axis=0))
    build_index(tmp_path, kind="ivf", **HERE)
    summary = find_duplicates(tmp_path, threshold=threshold)
    assert (summary.groups, summary.duplicates) == (500, 500)


def test_float32_embeddings_are_compared_as_they_are(tmp_path):
    """Halves of a pair that float16 would make one lie on either side of the threshold."""
    base = clustered(40, spread=1.0).astype(np.float64)
    aside = np.random.default_rng(0).normal(size=base.shape)
    aside -= (aside * base).sum(axis=1, keepdims=True) * base
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    cosines = np.where(np.arange(40) % 2, 0.99 + 4e-6, 0.99 - 4e-6)[:, None]
    near = cosines * base + np.sqrt(1 - cosines**2) * aside
    write_shard(tmp_path, "s", np.concatenate([base, near]).astype(np.float32), dtype="float32")
    build_index(tmp_path, **HERE)
    find_duplicates(tmp_path, threshold=0.99)
    expected = {frozenset({("s", at), ("s", at + 40)}) for at in range(1, 40, 2)}
    assert groups_of(tmp_path / "duplicates") == expected


def test_a_shard_that_is_replaced_meanwhile_ends_it(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_shard(tmp_path, name, clustered(100))
    build_index(tmp_path, **HERE)
    find_reach = duplicates.job.find_reach

    def meanwhile(*arguments):
        write_shard(tmp_path, "a", clustered(120), version="mtime:2")
        return find_reach(*arguments)

    monkeypatch.setattr(duplicates.job, "find_reach", meanwhile)
    with pytest.raises(IndexingError, match="replaced"):
        find_duplicates(tmp_path)
    assert not (tmp_path / "duplicates" / "groups.parquet").exists()


def test_nothing_alike_is_no_group(tmp_path):
    write_shard(tmp_path, "s", np.eye(48, dtype=np.float32))
    build_index(tmp_path, **HERE)
    summary = find_duplicates(tmp_path)
    assert (summary.groups, summary.duplicates, summary.recall, summary.checked) == (0, 0, 1.0, 0)
    assert pq.read_table(tmp_path / "duplicates" / "groups.parquet").num_rows == 0


def test_an_index_that_does_not_know_all_rows_is_refused(tmp_path):
    write_shard(tmp_path, "a", clustered(60))
    with pytest.raises(IndexingError, match="no index; build it with clipindex index"):
        find_duplicates(tmp_path)
    build_index(tmp_path, **HERE)
    write_shard(tmp_path, "b", clustered(60, seed=1))
    with pytest.raises(IndexingError, match="run clipindex index"):
        find_duplicates(tmp_path)
    with pytest.raises(StoreError, match="no embedding directory"):
        find_duplicates(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="threshold"):
        find_duplicates(tmp_path, threshold=1.5)


def test_the_command(tmp_path):
    write_shard(tmp_path, "a", np.repeat(clustered(50), 2, axis=0))
    build_index(tmp_path, **HERE)
    command = ["dedup", tmp_path, "--threshold", "0.999"]
    done = run_process(*command)
    assert done.returncode == 0, done.stderr
    assert "50 of 100 rows could go: 50 groups" in done.stdout
    done = run_cli(*command, "--json")
    assert json.loads(done.stdout)["duplicates"] == 50
