import json
import os
import shutil
import time

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
from command_line import run_cli, run_process
from conftest import CUDA
from corpus import encoded, labelled, picture, write_tar
from PIL import Image

from clipindex import build_index, read_image, search
from clipindex.demo import DATA
from clipindex.embed_job import embed
from clipindex.errors import ClipindexError, SourceError, StoreError, UsageError
from clipindex.nearest import Filter
from clipindex.retrieval import Query, file_name, read_queries, write_hits
from clipindex.shards import list_shards, read_samples
from clipindex.store import read_embeddings

HERE = {"device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The shipped shapes with their names as captions, in two tars, and some rows without label or caption."""
    folder = tmp_path_factory.mktemp("shapes")
    names = (DATA / "wds_shapes" / "classnames.txt").read_text().splitlines()
    samples = [sample for shard in list_shards(str(DATA / "wds_shapes")) for sample in read_samples(shard)]
    for at, part in enumerate([samples[:150], samples[150:]]):
        members = []
        for sample in part:
            members += [(f"{sample.key}.jpg", sample.image), (f"{sample.key}.cls", str(sample.label).encode()),
                        (f"{sample.key}.txt", f"A {names[sample.label]}".encode())]  # fmt: skip
        members += [(f"plain{at}.png", encoded(picture(seed=at), "PNG")), ("both.jpg", encoded(picture(seed=9 + at)))]
        write_tar(folder / "corpus" / f"{at}.tar", members)
    embed(str(folder / "corpus"), folder / "out", model="demo", batch_size=64, **HERE)
    return folder


def everything(folder):
    batches = list(read_embeddings(folder, ("key", "label")))
    keys = [key for batch in batches for key in batch.columns["key"].to_pylist()]
    labels = [label for batch in batches for label in batch.columns["label"].to_pylist()]
    return np.concatenate([batch.embedding for batch in batches]).astype(np.float32), keys, labels


@pytest.mark.parametrize("k", [1, 7, 100_000])
def test_hits_are_those_of_faiss(shapes, k):
    vectors, keys, _ = everything(shapes / "out")
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    wanted = [key for key in keys if key.startswith("scene")][:5]
    found = search(shapes / "out", [Query(keys=(key,)) for key in wanted], k=k, **HERE)
    rows = [keys.index(key) for key in wanted]
    cosines, _ = index.search(vectors[rows] / np.linalg.norm(vectors[rows], axis=1, keepdims=True), min(k, len(keys)))
    assert [hits[0].key for hits in found] == wanted
    np.testing.assert_allclose([[hit.cosine for hit in hits] for hits in found], np.minimum(cosines, 1), atol=1e-5)


def test_a_text_finds_its_images(shapes):
    (hits,) = search(shapes / "out", [Query(texts=("a photo of a red oval",))], k=5, **HERE)
    assert sum(hit.caption == "A red oval" for hit in hits) >= 4
    assert hits == sorted(hits, key=lambda hit: -hit.cosine)


@pytest.mark.cuda
def test_queries_that_are_embedded_on_cuda_find_the_same(shapes, tmp_path):
    (tmp_path / "x.jpg").write_bytes(encoded(picture(seed=9)))
    queries = [Query(texts=("a photo of a red oval",)), Query(images=(tmp_path / "x.jpg",))]
    here, there = (search(shapes / "out", queries, k=20, device=device, precision="fp32") for device in ("cpu", CUDA))
    for one, other in zip(here, there, strict=True):
        # Of the queries' vectors the last bits differ, so that neighbours as near may change places.
        np.testing.assert_allclose([hit.cosine for hit in one], [hit.cosine for hit in other], atol=1e-5)
        assert len({hit.key for hit in one} & {hit.key for hit in other}) >= 19


def test_an_image_finds_itself_and_its_bytes_are_cut_out_of_the_tar(shapes, tmp_path):
    (hit,) = search(shapes / "out", [Query(keys=("scene_000007",))], k=1, **HERE)[0]
    image = read_image(shapes / "out", hit)
    samples = {s.key: s.image for shard in list_shards(str(shapes / "corpus")) for s in read_samples(shard)}
    assert image == samples["scene_000007"]
    (tmp_path / "x.jpg").write_bytes(image)
    (again,) = search(shapes / "out", [Query(images=(tmp_path / "x.jpg",))], k=1, **HERE)[0]
    assert (again.key, again.shard, again.row) == (hit.key, hit.shard, hit.row)
    assert again.cosine > 0.999
    assert file_name(hit, image) == "scene_000007.jpg"


def test_vectors_are_added_and_subtracted(shapes):
    vectors, keys, _ = everything(shapes / "out")
    first, second = (vectors[keys.index(key)] for key in ("scene_000001", "scene_000002"))
    expected = (first + second) / np.linalg.norm(first + second)
    (hits,) = search(shapes / "out", [Query(keys=("scene_000001", "scene_000002"))], k=3, **HERE)
    np.testing.assert_allclose([hit.cosine for hit in hits], np.sort(vectors @ expected)[::-1][:3], atol=2e-4)
    (less,) = search(shapes / "out", [Query(texts=("red oval",), minus=("red",))], k=5, **HERE)
    (more,) = search(shapes / "out", [Query(texts=("red oval",))], k=5, **HERE)
    assert [hit.key for hit in less] != [hit.key for hit in more]
    with pytest.raises(UsageError, match="query 2 is empty, or its parts cancel out"):
        search(shapes / "out", [Query(texts=("x",)), Query(texts=("y",), minus=("y",))], **HERE)


def test_filters_leave_only_what_passes(shapes):
    query = [Query(texts=("a photo of a red oval",))]
    (hits,) = search(shapes / "out", query, k=1000, where=Filter(labels=(5, 11)), **HERE)
    _, _, labels = everything(shapes / "out")
    assert len(hits) == sum(label in (5, 11) for label in labels)
    assert {hit.label for hit in hits} == {5, 11}
    (hits,) = search(shapes / "out", query, k=1000, where=Filter(caption="OVAL", labels=(5, 11)), **HERE)
    assert {hit.label for hit in hits} == {5}
    assert all("oval" in hit.caption for hit in hits)
    assert search(shapes / "out", query, where=Filter(labels=(999,)), **HERE) == [[]]


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """Rows with a label, with lists of them, and with neither, in two shards; the second of before there were lists."""
    folder = tmp_path_factory.mktemp("listed")
    words = [b"3", b"[3, 7]", b"[7]", b"[]", None, b"7", b"[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]"]
    members = [(f"a{at}.jpg", encoded(picture(seed=at))) for at in range(len(words))]
    for at, word in reversed(list(enumerate(words))):
        members[at + 1 : at + 1] = [] if word is None else [(f"a{at}.cls", word)]
    write_tar(folder / "t" / "0.tar", members)
    write_tar(folder / "t" / "1.tar", labelled([f"b{at}" for at in range(8)], num_classes=8))
    embed(str(folder / "t"), folder / "out", model="demo", batch_size=8, **HERE)
    path = max((folder / "out" / "embeddings").glob("*.parquet"))
    footer = {b"clipindex": pq.read_metadata(path).metadata[b"clipindex"]}
    table = pq.read_table(path).drop_columns(["labels"])
    pq.write_table(table.replace_schema_metadata(footer), path, use_dictionary=False)
    return folder / "out"


@pytest.mark.parametrize("through_index", [False, True])
def test_a_label_is_found_among_the_labels_of_a_row(listed, tmp_path, through_index):
    folder = listed
    if through_index:
        folder = tmp_path / "out"
        shutil.copytree(listed, folder)
        build_index(folder, kind="flat", device="cpu")
    for wanted, keys in {
        (3,): {"a0", "a1", "a6", "b3"},
        (7,): {"a1", "a2", "a5", "a6", "b7"},
        (3, 7): {"a0", "a1", "a2", "a5", "a6", "b3", "b7"},
        (11,): {"a6"},
        (12,): set(),
    }.items():
        (hits,) = search(folder, [Query(keys=("a4",))], k=100, where=Filter(labels=wanted), **HERE)
        assert {hit.key for hit in hits} == keys
        assert len(hits) == len(keys)


def test_hits_show_their_labels(listed, tmp_path):
    done = run_cli("search", listed, "--key", "a4", "-k", 100, "--out", tmp_path / "hits.parquet", "--json")
    assert done.returncode == 0, done.stderr
    expected = {"a0": None, "a1": [3, 7], "a2": [7], "a3": [], "a4": None, "a6": list(range(12)), "b3": None}
    (document,) = json.loads(done.stdout)
    written = pq.read_table(tmp_path / "hits.parquet").to_pylist()
    for found in (document["hits"], written):
        labels = {hit["key"]: hit["labels"] for hit in found}
        assert len(labels) == 15 and {key: labels[key] for key in expected} == expected
    assert {hit["key"]: hit["label"] for hit in written}["b3"] == 3
    lines = run_cli("search", listed, "--key", "a4", "--label", 3).stdout.splitlines()
    shown = {line.split()[2]: line for line in lines}
    assert "a0  label 3  [" in shown["a0"] and "a1  labels 3,7  [" in shown["a1"]
    assert "  labels 0,1,2,3,4,5,6,7,8,9,…  [" in shown["a6"]
    assert "b3  label 3  'picture" in shown["b3"]
    assert "  labels none  [" in run_cli("search", listed, "--key", "a3", "-k", 1).stdout


def test_keys_that_are_missing_or_twice_are_said(shapes):
    with pytest.raises(StoreError, match="no row with key 'nowhere'"):
        search(shapes / "out", [Query(keys=("nowhere",))], **HERE)
    with pytest.raises(StoreError, match="several shards: give SHARD:both") as raised:
        search(shapes / "out", [Query(keys=("both",))], **HERE)
    shard = str(raised.value).rpartition(" ")[2]
    (hit,) = search(shapes / "out", [Query(keys=(f"{shard}:both",))], k=1, **HERE)[0]
    assert (hit.shard, hit.key) == (shard, "both")


def test_what_cannot_be_asked_is_said(shapes, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    for query in (Query(images=("gone.jpg",)), Query(images=(tmp_path / "text.jpg",)), Query()):
        with pytest.raises(ClipindexError):
            search(shapes / "out", [query], **HERE)
    with pytest.raises(UsageError, match="give at least 1"):
        search(shapes / "out", [Query(keys=("plain0",))], k=0, **HERE)
    for texts in ((" ",), ("a", "")):
        with pytest.raises(UsageError, match="a text is empty"):
            search(shapes / "out", [Query(texts=texts)], **HERE)
    with pytest.raises(UsageError, match="at most 1,000,000"):
        search(shapes / "out", [Query(keys=("plain0",))], k=10**13, **HERE)
    assert search(shapes / "out", [], **HERE) == []
    assert search(shapes / "out", [Query(keys=("plain0",))], where=Filter(labels=(10**12,)), **HERE) == [[]]
    with pytest.raises(UsageError, match="no queries"):
        read_queries(write(tmp_path / "empty.txt", b"\n\n"))
    with pytest.raises(UsageError, match="UTF-8"):
        read_queries(write(tmp_path / "binary.txt", b"\xff\xfe"))
    assert read_queries(write(tmp_path / "windows.txt", "\N{BYTE ORDER MARK}a\r\n\r\nb\r\n".encode())) == ["a", "b"]


def write(path, data):
    path.write_bytes(data)
    return path


def test_a_compressed_tar_has_no_place_to_cut_from(tmp_path):
    import gzip

    plain = write_tar(tmp_path / "t.tar", labelled(["a"]))
    packed = write(tmp_path / "t.tar.gz", gzip.compress(plain.read_bytes()))
    embed(str(packed), tmp_path / "out", model="demo", batch_size=4, **HERE)
    ((hit,),) = search(tmp_path / "out", [Query(keys=("a",))], **HERE)
    with pytest.raises(SourceError, match="compressed"):
        read_image(tmp_path / "out", hit)


def test_a_tar_that_changed_gives_no_images_of_other_rows(tmp_path):
    corpus = write_tar(tmp_path / "t.tar", labelled(["a", "b"]))
    embed(str(corpus), tmp_path / "out", model="demo", batch_size=4, **HERE)
    ((first, _),) = search(tmp_path / "out", [Query(keys=("a",))], **HERE)
    write_tar(corpus, labelled(["b", "a"], seed=5))
    with pytest.raises(SourceError, match="changed since it was embedded"):
        read_image(tmp_path / "out", first)
    done = run_cli("search", tmp_path / "out", "--key", "a", "--save", tmp_path / "images")
    assert done.returncode == 1
    assert "2 images not saved" in done.stderr and "no image saved" in done.stderr
    assert not (tmp_path / "images").exists()


def test_damaged_embeddings_are_not_the_best_hits(tmp_path):
    embed(str(write_tar(tmp_path / "t.tar", labelled(["a", "b"]))), tmp_path / "out", model="demo", batch_size=4,
          dtype="float32", **HERE)  # fmt: skip
    (path,) = (tmp_path / "out" / "embeddings").glob("*.parquet")
    ((hit, _),) = search(tmp_path / "out", [Query(keys=("a",))], **HERE)
    assert hit.cosine <= 1
    vector = next(read_embeddings(tmp_path / "out")).embedding[0]
    data = path.read_bytes()
    for wrong in (vector * 50, vector * np.nan):
        path.write_bytes(data.replace(vector.tobytes(), wrong.astype(np.float32).tobytes()))
        with pytest.raises(StoreError, match="damaged embedding among rows 0 to 1"):
            search(tmp_path / "out", [Query(keys=("b",))], **HERE)


def test_hits_as_parquet(shapes, tmp_path):
    queries = [Query(texts=("red circle",)), Query(texts=("blue square",))]
    found = search(shapes / "out", queries, k=3, **HERE)
    write_hits(tmp_path / "hits.parquet", queries, found)
    rows = pq.read_table(tmp_path / "hits.parquet").to_pylist()
    assert [(row["query"], row["rank"]) for row in rows] == [(q, r) for q in (0, 1) for r in (1, 2, 3)]
    assert [row["key"] for row in rows] == [hit.key for hits in found for hit in hits]
    assert rows[3]["text"] == "blue square"


def wait_for(path):
    """The viewer is not waited for."""
    deadline = time.monotonic() + 10
    while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)


def test_the_command(shapes, tmp_path):
    (tmp_path / "queries.txt").write_text("a photo of a red oval\na photo of a blue square\n")
    done = run_cli("search", shapes / "out", "--queries", tmp_path / "queries.txt", "-k", 4, "--json",
                   "--save", tmp_path / "images", "--out", tmp_path / "hits.parquet", "--device", "cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [one["query"] for one in document] == ["a photo of a red oval", "a photo of a blue square"]
    saved = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert len(saved) == 8
    assert saved[0].startswith("001-001-")
    assert pq.read_metadata(tmp_path / "hits.parquet").num_rows == 8

    (tmp_path / "bin").mkdir()
    viewer = tmp_path / "bin" / "xdg-open"
    viewer.write_text(f'#!/bin/sh\ncp "$1" {tmp_path / "shown.png"}\n')
    viewer.chmod(0o755)
    sheet = run_process("search", shapes / "out", "--key", "scene_000007", "-k", 7, "--save", tmp_path / "sheet.png",
                        "--open", env={**os.environ, "PATH": f"{viewer.parent}:/usr/bin:/bin"})  # fmt: skip
    assert sheet.returncode == 0, sheet.stderr
    assert "scene_000007" in sheet.stdout.splitlines()[0]
    wait_for(tmp_path / "shown.png")
    with Image.open(tmp_path / "sheet.png") as saved, Image.open(tmp_path / "shown.png") as image:
        assert image.size == saved.size
        assert saved.size[0] > saved.size[1]
    for wrong in (
        ["--save", "x.png"],
        ["--text", "a", "--queries", "q.txt"],
        ["--text", "a", "--save", "x.jpg"],
        ["--text", "a", "--out", "hits.csv"],
        ["--text", "a", "--random-init", "1"],
    ):
        assert run_cli("search", shapes / "out", *wrong).returncode == 2
