import json
import shutil

import numpy as np
import pytest
import torch
from command_line import run_cli, run_process
from conftest import DEVICES
from corpus import encoded, labelled, picture, write_tar

from clipindex import ModelSpec, embed, list_shards, load_model, measure_retrieval, read_embeddings, read_samples
from clipindex.demo import DATA
from clipindex.devices import choose_device
from clipindex.encode import TextTower
from clipindex.errors import FingerprintError, StoreError, UsageError

HERE = {"device": "cpu", "precision": "fp32"}


def captioned(folder, caption_of):
    """The shipped shapes in two tars, with what `caption_of(name, number)` gives as `.txt`, where it gives anything."""
    names = (DATA / "wds_shapes" / "classnames.txt").read_text().splitlines()
    samples = [sample for shard in list_shards(str(DATA / "wds_shapes")) for sample in read_samples(shard)]
    for at, part in enumerate([range(150), range(150, len(samples))]):
        members = []
        for number in part:
            members.append((f"{samples[number].key}.jpg", samples[number].image))
            caption = caption_of(names[samples[number].label], number)
            if caption is not None:
                members.append((f"{samples[number].key}.txt", caption.encode()))
        write_tar(folder / "corpus" / f"{at}.tar", members)
    embed(str(folder / "corpus"), folder / "out", model="demo", batch_size=64, **HERE)
    return folder / "out"


@pytest.fixture(scope="module")
def distinct(tmp_path_factory):
    """Each image has one to three captions with cosines that no other's have; some have none."""
    names = (DATA / "wds_shapes" / "classnames.txt").read_text().splitlines()
    rng = np.random.default_rng(0)
    tower = TextTower(load_model(ModelSpec(name="demo")), device=choose_device("cpu"), precision="fp32")
    taken = np.zeros((0, tower.info.dim), np.float32)

    def lines(name, number):
        nonlocal taken
        if number % 50 == 7:
            return None if number % 100 == 7 else ""
        chosen = []
        candidates = [f"a {name}, a {one} and a {other}" for one, other in rng.choice(names, (6, 2))]
        for text, vector in zip(candidates, tower.encode(candidates), strict=True):  # words in another order are alike
            if len(chosen) <= number % 3 and (taken @ vector < 1 - 1e-4).all():
                chosen, taken = [*chosen, text], np.vstack([taken, vector])
        assert len(chosen) == 1 + number % 3
        return "\n".join(chosen)

    return captioned(tmp_path_factory.mktemp("distinct"), lines)


def by_definition(folder, ks):
    """From all scores at once: a query counts where any right answer is among its k best."""
    rows = [
        (vector, caption.splitlines())
        for batch in read_embeddings(folder, ("caption",))
        for vector, caption in zip(batch.embedding, batch.columns["caption"].to_pylist(), strict=True)
        if caption
    ]
    texts = [line for _, lines in rows for line in lines]
    of = np.repeat(np.arange(len(rows)), [len(lines) for _, lines in rows])
    tower = TextTower(load_model(ModelSpec(name="demo")), device=choose_device("cpu"), precision="fp32")
    vectors = dict(zip(sorted(set(texts)), tower.encode(sorted(set(texts))), strict=True))
    scores = (
        torch.from_numpy(np.stack([vectors[text] for text in texts]))
        @ torch.from_numpy(np.stack([vector for vector, _ in rows]).astype(np.float32)).T
    )
    positive = torch.from_numpy(of[:, None] == np.arange(len(rows)))
    found = {}
    for way, each, right in (("image", scores, positive), ("text", scores.T, positive.T)):
        for k in ks:
            hits = right.gather(1, each.topk(k, dim=1).indices).any(dim=1)
            found[f"{way}_retrieval_recall@{k}"] = float(hits.double().mean())
    return found, len(rows), len(texts)


@pytest.mark.parametrize("device", DEVICES)
def test_recall_is_that_of_the_definition(distinct, device):
    seen, compared = [], []
    how = {"on_captions": seen.append, "on_images": lambda *of: compared.append(of), "precision": "fp32"}
    summary = measure_retrieval(distinct, k=(10, 1, 5), device=device, **how)
    expected, images, captions = by_definition(distinct, (1, 5, 10))
    assert captions > 256  # more than are compared at once
    # Texts that are embedded elsewhere differ in their last bits: a neighbour as near may change places.
    assert summary.metrics == pytest.approx(expected, abs=1e-6 if device == "cpu" else 2 / images)
    assert list(summary.metrics) == list(expected)
    assert 0.02 < summary.metrics["image_retrieval_recall@10"] < summary.metrics["text_retrieval_recall@10"] < 1
    assert (summary.images, summary.captions, summary.empty_captions) == (images, captions, 0)
    rows = sum(len(batch.embedding) for batch in read_embeddings(distinct))
    assert summary.rows_without_captions == rows - images == len([n for n in range(rows) if n % 50 == 7])
    assert seen == sorted(seen) and seen[-1] == captions
    assert compared[-1] == (images, images)
    document = json.loads((distinct / "retrieval" / "metrics.json").read_bytes())
    assert document["metrics"] == summary.metrics
    assert sorted(path.name for path in distinct.iterdir() if "rejects" not in path.name) == [
        "dataset.json", "embeddings", "retrieval", "summary.json",
    ]  # fmt: skip


def test_captions_that_many_images_share_are_found_as_often_as_by_chance(tmp_path):
    folder = captioned(tmp_path, lambda name, number: f"A {name}\n \n")
    summary = measure_retrieval(folder, **HERE)
    assert summary.empty_captions == summary.images
    assert summary.captions == 2 * summary.images
    vectors, expected = {}, []
    tower = TextTower(load_model(ModelSpec(name="demo")), device=choose_device("cpu"), precision="fp32")
    rows = [
        (vector.astype(np.float64), caption.splitlines())
        for batch in read_embeddings(folder, ("caption",))
        for vector, caption in zip(batch.embedding, batch.columns["caption"].to_pylist(), strict=True)
    ]
    texts = [line for _, lines in rows for line in lines]
    vectors = dict(zip(sorted(set(texts)), tower.encode(sorted(set(texts))).astype(np.float64), strict=True))
    scores = np.stack([vector for vector, _ in rows]) @ np.stack([vectors[text] for text in texts]).T
    of = np.repeat(np.arange(len(rows)), 2)
    rng = np.random.default_rng(0)
    for _ in range(50):  # ties in random order
        order = rng.permutation(len(texts))
        best = np.argsort(-scores[:, order].round(7), axis=1, kind="stable")[:, :5]
        expected.append((of[order][best] == np.arange(len(rows))[:, None]).any(axis=1).mean())
    assert summary.metrics["text_retrieval_recall@5"] == pytest.approx(np.mean(expected), abs=0.01)
    assert 0.1 < np.mean(expected) < 0.6


def test_what_cannot_be_measured_is_said(distinct, tmp_path):
    members = [("a.png", encoded(picture(), "PNG")), ("b.png", encoded(picture(seed=1), "PNG")), ("b.txt", b"")]
    embed(str(write_tar(tmp_path / "a.tar", members)), tmp_path / "out", model="demo", batch_size=4, **HERE)
    with pytest.raises(StoreError, match="none of 2 rows has a caption"):
        measure_retrieval(tmp_path / "out", **HERE)
    assert not (tmp_path / "out" / "retrieval").exists()
    for wrong in ((), (0, 1)):
        with pytest.raises(UsageError, match="give numbers from 1"):
            measure_retrieval(distinct, k=wrong, **HERE)
    with pytest.raises(FingerprintError, match="RN50"):
        measure_retrieval(distinct, model=ModelSpec(name="RN50", random_init=0), **HERE)
    with pytest.raises(StoreError, match="no embedding directory"):
        measure_retrieval(tmp_path, **HERE)


def test_damaged_embeddings_are_no_right_answers(tmp_path):
    embed(str(write_tar(tmp_path / "t.tar", labelled(["a", "b"]))), tmp_path / "out", model="demo", batch_size=4,
          dtype="float32", **HERE)  # fmt: skip
    (path,) = (tmp_path / "out" / "embeddings").glob("*.parquet")
    vector = next(read_embeddings(tmp_path / "out")).embedding[0]
    data = path.read_bytes()
    for wrong in (vector * 50, vector * np.nan):
        path.write_bytes(data.replace(vector.tobytes(), wrong.astype(np.float32).tobytes()))
        with pytest.raises(StoreError, match="damaged embedding among rows 0 to 1"):
            measure_retrieval(tmp_path / "out", **HERE)


def test_shards_that_go_while_they_are_read_are_said(distinct, tmp_path):
    folder = shutil.copytree(distinct, tmp_path / "out")
    first, second = sorted((folder / "embeddings").iterdir())

    def swap(done):
        if first.exists():
            first.unlink()

    with pytest.raises(StoreError, match="missing"):
        measure_retrieval(folder, on_captions=swap, **HERE)
    assert second.exists()


def test_the_command(distinct):
    done = run_process("retrieval", distinct, "--k", "1,3", "--device", "cpu", "--precision", "fp32", "--json")
    assert done.returncode == 0, done.stderr
    expected, _, _ = by_definition(distinct, (1, 3))
    assert json.loads(done.stdout)["metrics"] == pytest.approx(expected)
    for wrong in (["--k", "0"], ["--k", "one"], ["--random-init", "1"]):
        assert run_cli("retrieval", distinct, *wrong).returncode == 2
