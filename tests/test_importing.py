import json
import os
import pickle
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import run_cli, run_process

from clipindex import (
    Query,
    export_embeddings,
    import_embeddings,
    load_model,
    read_dataset,
    read_embeddings,
    read_image,
    read_rejects,
    search,
    verify,
)
from clipindex.errors import FingerprintError, SourceError, StoreError, UsageError
from clipindex.store import published_shards
from clipindex.types import ModelSpec

DIM = 64


def unit(count, seed=0, dtype=np.float16):
    vectors = np.random.default_rng(seed).standard_normal((count, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(dtype)


def frame(count, prefix="k"):
    """Columns as clip-retrieval has them of an img2dataset corpus."""
    return pd.DataFrame(
        {
            "image_path": [f"{prefix}{at:04}" for at in range(count)],
            "caption": [f"picture {at}" if at % 5 else None for at in range(count)],
            "url": [f"https://example.org/{at}.jpg" for at in range(count)],
            "width": [256.0 if at % 3 else np.nan for at in range(count)],
            "height": [192] * count,
            "exif": [{"iso": at, "x": np.nan} for at in range(count)],
            "similarity": [0.5 if at % 2 else np.nan for at in range(count)],
        }
    )


def put(folder, number, vectors, rows):
    (folder / "img_emb").mkdir(parents=True, exist_ok=True)
    (folder / "metadata").mkdir(exist_ok=True)
    np.save(folder / "img_emb" / f"img_emb_{number}.npy", vectors)
    rows.to_parquet(folder / "metadata" / f"metadata_{number}.parquet")
    return folder


def taken(out, *columns):
    """Keys, vectors and columns, in order."""
    batches = list(read_embeddings(out, ("key", *columns)))
    return (
        [key for batch in batches for key in batch.columns["key"].to_pylist()],
        np.concatenate([batch.embedding for batch in batches]),
        *([value for batch in batches for value in batch.columns[column].to_pylist()] for column in columns),
    )


def rejects(out):
    return [row for name in published_shards(out) for row in read_rejects(out, name).to_pylist()]


def take(source, out, **options):
    return import_embeddings(source, out, model="demo", **options)


def lone(tmp_path, vectors, ids="\n".join):
    """A .npy file with a text of ids."""
    np.save(tmp_path / "v.npy", vectors)
    (tmp_path / "ids.txt").write_text(ids([f"id{at}" for at in range(len(vectors))]))
    return {"source": tmp_path / "v.npy", "ids": tmp_path / "ids.txt", "out": tmp_path / "out"}


def test_a_folder_of_clip_retrieval(tmp_path):
    # More than a block, so that rows must stay beside their vectors over its end.
    sizes = {"0": 5000, "1": 7}
    for number, count in sizes.items():
        put(tmp_path / "c", number, unit(count, int(number)), frame(count, f"s{number}_"))
    seen = []
    summary = take(tmp_path / "c", tmp_path / "out", on_progress=lambda rows, share: seen.append((rows, share)))
    assert (summary.rows, summary.rejects, summary.samples, summary.normalised) == (5007, 0, 5007, 0)
    assert (summary.shards_imported, summary.shards_failed) == (2, {})
    assert [rows for rows, _ in seen] == [4096, 5000, 5007] and seen[-1][1] == pytest.approx(1, abs=0.01)
    keys, vectors, captions, metas, widths, heights, norms, offsets = taken(
        tmp_path / "out", "caption", "meta", "width", "height", "norm", "tar_offset"
    )
    expected = pd.concat([frame(count, f"s{number}_") for number, count in sizes.items()])
    assert keys == expected["image_path"].tolist()
    assert np.array_equal(vectors, np.concatenate([unit(5000, 0), unit(7, 1)]))
    assert captions == [caption or None for caption in expected["caption"].replace({np.nan: None})]
    assert widths == [0 if at % 3 == 0 else 256 for count in sizes.values() for at in range(count)]
    assert set(heights) == {192} and set(offsets) == {None}
    assert np.abs(np.array(norms) - 1).max() < 1e-3
    assert json.loads(metas[4098]) == {"url": "https://example.org/4098.jpg", "exif": {"iso": 4098, "x": None}}
    assert json.loads(metas[1])["similarity"] == 0.5

    record = next(iter(published_shards(tmp_path / "out").values()))
    assert (record.url, record.is_imported) == (str(tmp_path / "c" / "img_emb" / "img_emb_0.npy"), True)
    assert read_dataset(tmp_path / "out").model == load_model(ModelSpec(name="demo")).info


def test_what_was_imported_is_verified_searched_and_has_no_images(tmp_path):
    put(tmp_path / "c", "0", unit(300), frame(300))
    take(tmp_path / "c", tmp_path / "out")
    assert (verify(tmp_path / "out").faults, verify(tmp_path / "out").notes) == ([], [])
    deep = verify(tmp_path / "out", deep=True, device="cpu", precision="fp32")
    assert (deep.faults, deep.embedded_again) == ([], 0)
    assert re.search(r"1 shards \(300 rows\) were imported.*no image to embed anew", deep.notes[0])
    ((best, *_),) = search(tmp_path / "out", [Query(keys=("k0007",))], k=3)
    assert (best.key, best.tar_offset, best.tar_size) == ("k0007", None, 0)
    with pytest.raises(SourceError, match="img_emb_0.npy was imported: .* no images"):
        read_image(tmp_path / "out", best)
    (path,) = (tmp_path / "out" / "embeddings").glob("*.parquet")
    path.rename(path.with_name("other.parquet"))
    assert "footer contradicts" in verify(tmp_path / "out").faults[0].what


def test_tars_and_imported_shards_share_a_directory(tmp_path):
    from corpus import labelled, write_tar

    from clipindex import embed

    put(tmp_path / "c", "0", unit(50), frame(50))
    write_tar(tmp_path / "t.tar", labelled([f"t{at}" for at in range(6)]))
    take(tmp_path / "c", tmp_path / "out")
    embed(str(tmp_path / "t.tar"), tmp_path / "out", model="demo", device="cpu", precision="fp32", batch_size=4)
    found = verify(tmp_path / "out", deep=True, sample=100, device="cpu", precision="fp32")
    assert (found.faults, found.rows, found.embedded_again) == ([], 56, 6)
    assert found.least_cosine > 0.9999


def test_vectors_of_any_length_are_rows_and_those_of_none_are_rejects(tmp_path):
    vectors = unit(8, dtype=np.float32)
    vectors[1] *= 20
    vectors[2] = 0
    vectors[3, 5] = np.nan
    vectors[4, 0] = -np.inf
    vectors[5] *= 1e-3
    summary = take(**lone(tmp_path, vectors), dtype="float32")
    assert (summary.rows, summary.rejects, summary.normalised) == (5, 3, 2)
    assert summary.rejects_by_stage == {"encode": 3}
    keys, stored, norms = taken(tmp_path / "out", "norm")
    assert keys == ["id0", "id1", "id5", "id6", "id7"]
    assert np.allclose(stored, unit(8, dtype=np.float32)[[0, 1, 5, 6, 7]], atol=1e-6)
    assert np.array_equal(stored[[0, 3, 4]], unit(8, dtype=np.float32)[[0, 6, 7]])
    assert norms == pytest.approx([1, 20, 1e-3, 1, 1], rel=1e-5)
    assert [(one["key"], one["member"], one["reason"]) for one in rejects(tmp_path / "out")] == [
        ("id2", "row 2", "the vector is zero"),
        ("id3", "row 3", "the vector is not finite"),
        ("id4", "row 4", "the vector is not finite"),
    ]
    assert verify(tmp_path / "out").faults == []


def test_lengths_beyond_float32_are_rejects(tmp_path):
    vectors = unit(4, dtype=np.float64)
    vectors[1] *= 1e60
    vectors[2] *= 1e-60
    take(**lone(tmp_path, vectors))
    assert [one["reason"] for one in rejects(tmp_path / "out")] == [
        "the vector is of length 1e+60",
        "the vector is zero",
    ]
    assert verify(tmp_path / "out").faults == []


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8"])
def test_any_float_type_and_order(tmp_path, dtype):
    vectors = np.asfortranarray(unit(9, dtype=dtype))
    take(**lone(tmp_path, vectors))
    assert np.array_equal(taken(tmp_path / "out")[1], vectors.astype(np.float16))


def test_keys_that_are_missing_or_come_twice_are_rejects(tmp_path):
    rows = pd.DataFrame({"key": ["a", None, "b", "a", "", "c", "c", "x" * 5000]})
    vectors = unit(8)
    vectors[5] = 0  # its key was there all the same
    summary = take(put(tmp_path / "c", "0", vectors, rows), tmp_path / "out")
    assert (summary.rows, summary.rejects_by_stage) == (2, {"encode": 1, "tar": 5})
    assert taken(tmp_path / "out")[0] == ["a", "b"]
    why = {one["member"]: one["reason"] for one in rejects(tmp_path / "out")}
    assert why == {
        "row 1": "no key",
        "row 3": "key 'a' came before in this file",
        "row 4": "no key",
        "row 5": "the vector is zero",
        "row 6": "key 'c' came before in this file",
        "row 7": "a key of 5000 characters, more than 4096",
    }
    assert verify(tmp_path / "out").faults == []


def test_a_key_is_known_again_in_another_block(tmp_path):
    keys = [f"{at:05}" for at in range(9000)]
    keys[8999] = "0" * 100
    keys[8998] = "00001"
    keys[0] = "0" * 100
    take(put(tmp_path / "c", "0", unit(9000), pd.DataFrame({"key": keys})), tmp_path / "out")
    assert [one["member"] for one in rejects(tmp_path / "out")] == ["row 8998", "row 8999"]


LABELS = {
    "integers": ([3, 0, -1], [3, 0, -1], {}),
    "as pandas has them where one is missing": ([3.0, np.nan, 7.0], [3, None, 7], {}),
    "too large": ([1, 2**31, 2], [1, 2], {"row 1": "label 2147483648 is no integer of 32 bits"}),
    "fractions": ([1.5, 2.0, np.inf], [2], {"row 0": "label 1.5 is no integer of 32 bits", "row 2": "label inf is no"}),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels(tmp_path, name):
    given, expected, faults = LABELS[name]
    rows = pd.DataFrame({"key": ["a", "b", "c"], "label": given})
    summary = take(put(tmp_path / "c", "0", unit(3), rows), tmp_path / "out")
    assert summary.rejects_by_stage == ({"label": len(faults)} if faults else {})
    assert taken(tmp_path / "out", "label")[2] == expected
    found = {one["member"]: one["reason"] for one in rejects(tmp_path / "out")}
    assert found.keys() == faults.keys() and all(found[row].startswith(why) for row, why in faults.items())


def test_columns_of_another_kind_than_ours_go_into_meta(tmp_path):
    table = pa.table(
        {
            "key": pa.array([10, 11]),
            "image_path": ["p/10.jpg", "p/11.jpg"],
            "label": ["cat", "dog"],
            "caption": pa.array([["a"], ["b"]]),
            "meta": ['{"deep": 1, "taken": "mine"}', "not json"],
            "bytes": pa.array([b"\xff", None]),
            "taken": pa.array([1, 1_000_000_001], pa.timestamp("ns")),
        }
    )
    put(tmp_path / "c", "0", unit(2), pd.DataFrame({"key": [0]}))
    pq.write_table(table, tmp_path / "c" / "metadata" / "metadata_0.parquet")
    take(tmp_path / "c", tmp_path / "out")
    keys, _, labels, captions, metas = taken(tmp_path / "out", "label", "caption", "meta")
    assert (keys, labels, captions) == (["10", "11"], [None, None], [None, None])
    assert json.loads(metas[0]) == {
        "image_path": "p/10.jpg",
        "label": "cat",
        "caption": ["a"],
        "bytes": "ff",
        "taken": "mine",
        "deep": 1,
    }
    assert json.loads(metas[1])["meta"] == "not json"
    assert json.loads(metas[1])["taken"] == "1970-01-01 00:00:01.000000001"


def test_categories_of_pandas_are_what_they_stand_for(tmp_path):
    rows = pd.DataFrame({"key": ["a", "b", "c"], "caption": ["x", None, "x"], "label": [5, 4, 5]}).astype("category")
    take(put(tmp_path / "c", "0", unit(3), rows), tmp_path / "out")
    keys, _, captions, labels, metas = taken(tmp_path / "out", "caption", "label", "meta")
    assert (keys, captions, labels, metas) == (["a", "b", "c"], ["x", None, "x"], [5, 4, 5], [None] * 3)


def ids_as(kind, folder, names):
    path = folder / f"ids.{kind.partition(' ')[0]}"
    if kind == "txt":
        path.write_text("\ufeff" + "\r\n".join(names) + "\r\n", encoding="utf-8")
    elif kind == "parquet":
        pq.write_table(pa.table({"name": names}), path)
    elif kind == "parquet of more":
        pq.write_table(pa.table({"key": names, "label": range(len(names)), "x": names}), path)
    elif kind == "npy":
        np.save(path, np.array(names))
    else:
        np.save(path, np.array([name.encode() for name in names]))
    return path


@pytest.mark.parametrize("kind", ["txt", "parquet", "parquet of more", "npy", "npy of bytes"])
def test_a_plain_npy_with_ids(tmp_path, kind):
    names = [f"a key/ü{at}" if kind != "npy of bytes" else f"k{at}" for at in range(5000)]
    np.save(tmp_path / "v.npy", unit(5000))
    summary = take(tmp_path / "v.npy", tmp_path / "out", ids=ids_as(kind, tmp_path, names))
    assert (summary.rows, summary.shards) == (5000, 1)
    keys, vectors, labels, metas = taken(tmp_path / "out", "label", "meta")
    assert keys == names and np.array_equal(vectors, unit(5000))
    if kind == "parquet of more":
        assert labels == list(range(5000)) and json.loads(metas[17]) == {"x": names[17]}


def test_ids_of_numbers(tmp_path):
    np.save(tmp_path / "v.npy", unit(3))
    np.save(tmp_path / "ids.npy", np.array([7, 8, -9]))
    take(tmp_path / "v.npy", tmp_path / "out", ids=tmp_path / "ids.npy")
    assert taken(tmp_path / "out")[0] == ["7", "8", "-9"]


def npz(path):
    with open(path, "wb") as file:
        np.savez(file, unit(5))


DAMAGE = {
    "fewer rows": (
        lambda v, m: frame(4).to_parquet(m),
        r"img_emb_1.npy has 5 vectors, but .*metadata_1.parquet 4 rows",
    ),
    "more rows": (lambda v, m: frame(9000).to_parquet(m), "has 5 vectors, but .* 9,000 rows"),
    "no rows": (lambda v, m: m.unlink(), "metadata_1.parquet is missing"),
    "rows are no Parquet": (lambda v, m: m.write_bytes(b"PAR1 no"), "metadata_1.parquet: cannot be read"),
    "no column for keys": (
        lambda v, m: pd.DataFrame({"name": ["a"] * 5, "x": [1] * 5}).to_parquet(m),
        r"none of its columns \(name, x\) is called key or image_path",
    ),
    "a caption is no key": (lambda v, m: pd.DataFrame({"caption": ["a"] * 5}).to_parquet(m), "none of its columns"),
    "keys of lists": (lambda v, m: pd.DataFrame({"key": [["a"]] * 5}).to_parquet(m), "keys are strings or integers"),
    "a column twice": (
        lambda v, m: pq.write_table(pa.table([["a"] * 5] * 3, names=["key", "x", "x"]), m),
        "column 'x' comes twice",
    ),
    "objects": (lambda v, m: np.save(v, np.array([None] * 5, object), allow_pickle=True), "Python objects"),
    "no npy": (lambda v, m: v.write_bytes(b"no npy"), "cannot be read as .npy"),
    "empty": (lambda v, m: v.write_bytes(b""), "cannot be read as .npy"),
    "an archive": (lambda v, m: npz(v), "npz archive"),
    "cut": (lambda v, m: v.write_bytes(v.read_bytes()[:-3]), "cannot be read as .npy"),
    "glued": (lambda v, m: v.write_bytes(v.read_bytes() * 2), "768 bytes follow its array"),
    "another model's": (lambda v, m: np.save(v, unit(5)[:, :32]), "have 32 dimensions, the model's 64"),
    "integers": (lambda v, m: np.save(v, np.ones((5, DIM), np.int8)), "holds int8"),
    "one dimension": (lambda v, m: np.save(v, np.ones(5, np.float32)), r"holds float32 \[5\]"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_not_published_and_the_others_are(tmp_path, name):
    spoil, said = DAMAGE[name]
    for number in range(3):
        put(tmp_path / "c", number, unit(5, number), frame(5))
    spoil(tmp_path / "c" / "img_emb" / "img_emb_1.npy", tmp_path / "c" / "metadata" / "metadata_1.parquet")
    summary = take(tmp_path / "c", tmp_path / "out")
    (file,) = summary.shards_failed
    assert file.endswith("img_emb_1.npy")
    assert re.search(said, summary.shards_failed[file]), summary.shards_failed[file]
    assert (summary.shards_imported, summary.rows) == (2, 10)
    assert sorted(Path(one.url).name for one in published_shards(tmp_path / "out").values()) == [
        "img_emb_0.npy",
        "img_emb_2.npy",
    ]
    put(tmp_path / "c", 1, unit(5, 1), frame(5))
    again = take(tmp_path / "c", tmp_path / "out")
    assert (again.shards_done_before, again.shards_imported, again.shards_failed) == (2, 1, {})
    assert verify(tmp_path / "out").faults == []
    assert not list((tmp_path / "out").rglob("*.tmp"))


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["pickle", "npy"])
def test_no_pickle_is_loaded(tmp_path, form):
    given = lone(tmp_path, unit(1))
    trap = Touch(tmp_path / "sprung")
    if form == "pickle":
        given["source"].write_bytes(pickle.dumps(trap))
    else:
        np.save(given["source"], np.array([trap], object), allow_pickle=True)
    assert list(take(**given).shards_failed) == [str(given["source"])]
    assert not trap.path.exists()
    pickle.loads(pickle.dumps(trap))
    assert trap.path.exists()


def test_rows_without_vectors_are_said(tmp_path):
    put(tmp_path / "c", "0", unit(5), frame(5))
    frame(5).to_parquet(tmp_path / "c" / "metadata" / "metadata_1.parquet")
    summary = take(tmp_path / "c", tmp_path / "out")
    ((file, why),) = summary.shards_failed.items()
    assert file.endswith("metadata_1.parquet") and "there is no .npy file" in why
    assert summary.rows == 5


@pytest.mark.parametrize("how", ["before", "while it is read"])
def test_what_fails_claims_no_directory(tmp_path, how):
    put(tmp_path / "c", "0", unit(5000), frame(5000))
    path = tmp_path / "c" / "img_emb" / "img_emb_0.npy"
    if how == "before":
        given = {"random_init": 0, "dtype": "float32", "model": "RN50"}
    else:
        given = {"dtype": "float32", "model": "demo", "on_progress": lambda rows, share: os.utime(path, (1, rows))}
    failed = import_embeddings(tmp_path / "c", tmp_path / "out", **given).shards_failed
    assert list(failed) == [str(path)]
    assert [one for one in (tmp_path / "out").rglob("*") if one.is_file()] == []
    # So that another model, or another dtype, may be meant the next time.
    assert take(tmp_path / "c", tmp_path / "out").rows == 5000
    assert verify(tmp_path / "out").faults == []
    with pytest.raises(StoreError, match="--dtype float16"):
        take(tmp_path / "c", tmp_path / "out", dtype="float32")


def test_a_directory_that_was_claimed_for_nothing_is_free_without_its_dataset_json(tmp_path):
    vectors = unit(5)
    vectors[0] = 0
    put(tmp_path / "c", "0", vectors, frame(5))
    out = tmp_path / "out"
    # What a full disk does: the last file cannot be written.
    with pytest.raises(OSError, match="rejects"):
        take(tmp_path / "c", out, on_progress=lambda rows, share: (out / "rejects").write_text(""))
    assert [str(one.relative_to(out)) for one in sorted(out.rglob("*"))] == ["dataset.json", "embeddings", "rejects"]
    (out / "rejects").unlink()
    with pytest.raises(StoreError, match="--dtype float16"):
        take(tmp_path / "c", out, dtype="float32")
    (out / "dataset.json").unlink()
    assert take(tmp_path / "c", out, dtype="float32").rows == 4
    assert verify(out).faults == []


def test_a_directory_that_another_run_claims_meanwhile_is_not_mixed(tmp_path):
    put(tmp_path / "c", "0", unit(5), frame(5))
    put(tmp_path / "d", "0", unit(7), frame(7))

    def other(rows, share):
        take(tmp_path / "d", tmp_path / "out", dtype="float32")

    with pytest.raises(StoreError, match="holds float32 embeddings"):
        take(tmp_path / "c", tmp_path / "out", on_progress=other)
    assert [record.rows for record in published_shards(tmp_path / "out").values()] == [7]
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_files_that_were_moved_are_known_again_by_their_rows(tmp_path):
    for number in range(2):
        put(tmp_path / "c", number, unit(5000, number) * (number + 1), frame(5000))
    take(tmp_path / "c", tmp_path / "out")
    (tmp_path / "c").rename(tmp_path / "moved")
    put(tmp_path / "moved", 2, unit(9, 2), frame(9))
    again = take(tmp_path / "moved", tmp_path / "out")
    assert (again.shards, again.shards_imported, again.rows) == (3, 1, 9)
    published = published_shards(tmp_path / "out")
    names = {Path(file).name: Path(published[shard].url).name for file, shard in again.shards_there.items()}
    assert names == {"img_emb_0.npy": "img_emb_0.npy", "img_emb_1.npy": "img_emb_1.npy"}
    assert (len(published), len(taken(tmp_path / "out")[0])) == (3, 10009)
    done = run_cli("import", tmp_path / "moved", "--out", tmp_path / "out", "--model", "demo")
    assert done.returncode == 0
    said = r"2 files have rows that are there already, such as .*img_emb_0.npy \(shard img_emb-.*\): passed over"
    assert re.search(said, done.stdout)


def with_rejects(vectors, rows):
    """Rejects of every kind, first and last of the file, and of a block."""
    spoilt = vectors.copy()
    spoilt[[*range(100), 4095, 4999]] = 0
    spoilt[1] = np.nan
    keys = rows["image_path"].tolist()
    keys[4096], keys[107] = keys[103], ""
    return spoilt, rows.assign(image_path=keys, label=[0.5 if at == 100 else 1 for at in range(len(keys))])


def test_files_with_rejects_that_were_moved_are_known_again(tmp_path):
    put(tmp_path / "c", 0, *with_rejects(unit(5000), frame(5000)))
    first = take(tmp_path / "c", tmp_path / "out")
    assert (first.rows, first.rejects_by_stage) == (4895, {"encode": 102, "label": 1, "tar": 2})
    export_embeddings(tmp_path / "out", tmp_path / "x", format="npy")
    (tmp_path / "c").rename(tmp_path / "moved")
    (shard,) = published_shards(tmp_path / "out")
    for source in (tmp_path / "moved", tmp_path / "x"):  # an export lacks the rejects
        again = take(source, tmp_path / "out")
        assert (again.shards_imported, again.rows, list(again.shards_there.values())) == (0, 0, [shard])
    # As well where the export was first.
    take(tmp_path / "x", tmp_path / "other")
    assert len(take(tmp_path / "moved", tmp_path / "other").shards_there) == 1
    assert list(published_shards(tmp_path / "out")) == [shard] and len(published_shards(tmp_path / "other")) == 1


OTHERS = {
    "other keys": lambda vectors, rows: (vectors, rows.assign(image_path=rows["image_path"] + "x")),
    "other keys at the end": lambda vectors, rows: (vectors, rows.replace("k4999", "other")),
    "other vectors": lambda vectors, rows: (np.concatenate([vectors[:1], vectors[:0:-1]]), rows),
    "another vector at the end": lambda vectors, rows: (np.concatenate([vectors[:-1], vectors[:1]]), rows),
    "another order": lambda vectors, rows: (vectors[::-1], rows[::-1]),
    "fewer rows": lambda vectors, rows: (vectors[:4999], rows[:4999]),
    "more rows": lambda vectors, rows: (np.concatenate([vectors, unit(1, 1)]), frame(5001)),
    "rejects only": lambda vectors, rows: (vectors * 0, rows),
    "one more reject": lambda vectors, rows: (vectors * (np.arange(5000) != 4998)[:, None], rows),
}


@pytest.mark.parametrize("name", OTHERS)
def test_rows_that_differ_are_others(tmp_path, name):
    put(tmp_path / "c", 0, unit(5000), frame(5000))
    take(tmp_path / "c", tmp_path / "out")
    put(tmp_path / "d", 0, *OTHERS[name](unit(5000), frame(5000)))
    summary = take(tmp_path / "d", tmp_path / "out")
    assert (summary.shards_imported, summary.shards_there) == (1, {})


def test_a_file_is_no_twin_of_its_own_earlier_state(tmp_path):
    put(tmp_path / "c", 0, unit(5), frame(5))
    take(tmp_path / "c", tmp_path / "out")
    put(tmp_path / "c", 0, unit(5), frame(5).assign(caption="new"))
    os.utime(tmp_path / "c" / "img_emb" / "img_emb_0.npy", (1, 1))
    assert take(tmp_path / "c", tmp_path / "out", refresh=True).shards_imported == 1
    assert set(taken(tmp_path / "out", "caption")[2]) == {"new"}


def test_files_of_one_source_are_not_compared_wherever_a_run_was_stopped(tmp_path):
    def stop(rows, share):
        if rows > 5000:
            raise KeyboardInterrupt

    for number in range(2):
        put(tmp_path / "c", number, unit(5000), frame(5000))
    assert take(tmp_path / "c", tmp_path / "whole").shards_imported == 2
    with pytest.raises(KeyboardInterrupt):
        take(tmp_path / "c", tmp_path / "out", on_progress=stop)
    assert len(published_shards(tmp_path / "out")) == 1
    assert take(tmp_path / "c", tmp_path / "out").shards_imported == 1
    assert published_shards(tmp_path / "out").keys() == published_shards(tmp_path / "whole").keys()


def replace(folder, number, seed):
    """Other vectors and keys in the place of a file's."""
    put(folder, number, unit(5, seed), frame(5, f"s{seed}_"))
    os.utime(folder / "img_emb" / f"img_emb_{number}.npy", (1, 1 + seed))


def test_a_changed_file_replaces_its_rows_though_another_shard_has_the_new_ones(tmp_path):
    replace(tmp_path / "c", 0, seed=1)
    replace(tmp_path / "d", 0, seed=2)
    for source in ("c", "d"):
        take(tmp_path / source, tmp_path / "out")
    replace(tmp_path / "c", 0, seed=2)
    summary = take(tmp_path / "c", tmp_path / "out", refresh=True)
    assert (summary.shards_imported, summary.shards_there) == (1, {})
    assert not [key for key in taken(tmp_path / "out")[0] if key.startswith("s1_")]


def test_no_row_is_lost_or_doubled_where_files_were_numbered_anew(tmp_path):
    for number in (0, 1):
        replace(tmp_path / "c", number, seed=number)
    take(tmp_path / "c", tmp_path / "out")
    for number in (0, 1, 2):
        replace(tmp_path / "c", number, seed=number - 1 if number else 9)
    before = take(tmp_path / "c", tmp_path / "out")
    # The second file's rows stay as they were, and those are the third's.
    assert (before.shards_imported, len(before.shards_changed), len(before.shards_there)) == (0, 2, 1)
    assert take(tmp_path / "c", tmp_path / "out", refresh=True).shards_imported == 3
    keys = taken(tmp_path / "out")[0]
    assert sorted(keys) == sorted(f"s{seed}_{at:04}" for seed in (9, 0, 1) for at in range(5))


def test_text_that_is_none_is_said(tmp_path):
    given = lone(tmp_path, unit(3))
    given["ids"].write_bytes(b"a\n\xff\nc\n")
    (why,) = take(**given).shards_failed.values()
    assert "ids.txt: cannot be read" in why and "utf-8" in why
    given["ids"].write_text("a\nb\n")
    (why,) = take(**given).shards_failed.values()
    assert re.search(r"v.npy has 3 vectors, but .*ids.txt 2 rows", why)


def test_changed_files_are_said_and_imported_on_wish(tmp_path):
    put(tmp_path / "c", "0", unit(5), frame(5))
    take(tmp_path / "c", tmp_path / "out")
    path = tmp_path / "c" / "img_emb" / "img_emb_0.npy"
    np.save(path, unit(5, 9))
    os.utime(path, (1, 1))
    summary = take(tmp_path / "c", tmp_path / "out")
    assert (summary.shards_changed, summary.shards_imported) == ([str(path)], 0)
    assert np.array_equal(taken(tmp_path / "out")[1], unit(5))
    assert take(tmp_path / "c", tmp_path / "out", refresh=True).shards_imported == 1
    assert np.array_equal(taken(tmp_path / "out")[1], unit(5, 9))


def test_a_file_that_changes_while_it_is_read_is_not_published(tmp_path):
    put(tmp_path / "c", "0", unit(5), frame(5))
    path = tmp_path / "c" / "img_emb" / "img_emb_0.npy"
    summary = take(tmp_path / "c", tmp_path / "out", on_progress=lambda rows, share: os.utime(path, (1, 1)))
    assert "changed while it was read" in summary.shards_failed[str(path)]
    assert published_shards(tmp_path / "out") == {}


def test_what_was_stopped_leaves_nothing_half_and_is_finished(tmp_path):
    def stop(rows, share):
        if rows > 5000:
            raise KeyboardInterrupt

    for number in range(2):
        put(tmp_path / "c", number, unit(5000, number), frame(5000))
    with pytest.raises(KeyboardInterrupt):
        take(tmp_path / "c", tmp_path / "out", on_progress=stop)
    assert [record.rows for record in published_shards(tmp_path / "out").values()] == [5000]
    assert not list((tmp_path / "out").rglob("*.tmp"))
    again = take(tmp_path / "c", tmp_path / "out")
    assert (again.shards_done_before, again.shards_imported) == (1, 1)


@pytest.mark.parametrize("lines", [[f"id{at}" for at in range(7000)], ["id0"] * 4500])
def test_ids_that_change_while_they_are_read_are_not_published(tmp_path, lines):
    given = lone(tmp_path, unit(5000))
    size = given["ids"].stat().st_size
    text = "\n".join(lines)

    def change(rows, share):
        with open(given["ids"], "r+") as file:
            file.write(text)
            file.truncate(len(text))

    assert len(text) != size
    (why,) = take(**given, on_progress=change).shards_failed.values()
    assert "ids.txt had 5,000 rows, and then others" in why
    assert published_shards(tmp_path / "out") == {}


def test_mistakes_are_told(tmp_path):
    put(tmp_path / "c", "0", unit(5), frame(5))
    (tmp_path / "ids.txt").write_text("a\n")
    npy = tmp_path / "c" / "img_emb" / "img_emb_0.npy"
    out = tmp_path / "out"
    for error, said, source, options in [
        (SourceError, "no such file or folder", tmp_path / "nowhere", {}),
        (SourceError, "not what clip-retrieval writes", tmp_path, {}),
        (SourceError, "copy them to a local disk", "s3://bucket/c", {}),
        (SourceError, "refused", "pipe:cat x", {}),
        (UsageError, "give --ids", npy, {}),
        (UsageError, "--ids belongs to one .npy file", tmp_path / "c", {"ids": tmp_path / "ids.txt"}),
        (SourceError, "nothing.txt: no such file", npy, {"ids": tmp_path / "nothing.txt"}),
        (UsageError, "choose one of float16, float32", tmp_path / "c", {"dtype": "int8"}),
    ]:
        with pytest.raises(error, match=said):
            take(source, out, **options)
    assert not out.exists()
    take(tmp_path / "c", out)
    with pytest.raises(FingerprintError, match="not of RN50"):
        import_embeddings(tmp_path / "c", out, model="RN50", random_init=0)
    with pytest.raises(StoreError, match="--dtype float16"):
        take(tmp_path / "c", out, dtype="float32")


def test_damaged_bytes_end_in_a_word_and_no_exception(tmp_path):
    rng = np.random.default_rng(0)
    put(tmp_path / "c", "0", unit(40), frame(40))
    outcomes = Counter()
    for path in [*(tmp_path / "c").rglob("*.npy"), *(tmp_path / "c").rglob("*.parquet")]:
        whole = path.read_bytes()
        for at in range(8):
            damaged = bytearray(whole)
            for where in rng.integers(0, min(len(whole), 300 if path.suffix == ".npy" else len(whole)), 6):
                damaged[where] = rng.integers(256)
            path.write_bytes(damaged)
            summary = take(tmp_path / "c", tmp_path / f"{path.suffix}{at}")
            assert summary.shards_imported + len(summary.shards_failed) == 1
            outcomes[bool(summary.shards_failed)] += 1
        path.write_bytes(whole)
    assert outcomes[True] > 5


def test_the_command(tmp_path):
    put(tmp_path / "c", "0", unit(20), frame(20))
    put(tmp_path / "c", "1", unit(20), frame(19))
    done = run_process("import", tmp_path / "c", "--out", tmp_path / "out", "--model", "demo")
    assert done.returncode == 1
    assert "20 rows + 0 rejects = 20 vectors" in done.stdout
    assert re.search(r"failed: .*img_emb_1.npy has 20 vectors, but .*metadata_1.parquet 19 rows", done.stderr)
    assert "Traceback" not in done.stderr
    put(tmp_path / "c", "1", unit(20), pd.DataFrame({"key": ["a"] * 20}))
    again = run_cli("import", tmp_path / "c", "--out", tmp_path / "out", "--model", "demo", "--json")
    assert again.returncode == 3
    assert "95.0% of the vectors are rejects" in again.stderr
    assert json.loads(again.stdout)["rejects_by_stage"] == {"tar": 19}
