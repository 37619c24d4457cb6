import json
import os

import numpy as np
import open_clip
import pytest
import torch
from corpus import encoded, labelled, picture, write_tar
from PIL import Image

from clipindex import embed, list_shards, read_embeddings, read_samples
from clipindex.errors import FingerprintError, StoreError, UsageError
from clipindex.models import load_model
from clipindex.store import published_shards
from clipindex.types import ModelSpec

TINY = {"model": "demo", "precision": "fp32", "device": "cpu", "batch_size": 8}


@pytest.fixture
def corpus(tmp_path):
    for at in range(3):
        write_tar(tmp_path / "corpus" / f"{at}.tar", labelled([f"s{at}_{i}" for i in range(10)], seed=10 * at))
    return tmp_path / "corpus"


def test_embeddings_are_those_of_a_plain_open_clip_loop(tmp_path, corpus):
    embed(str(corpus), tmp_path / "out", dtype="float32", **TINY)
    loaded = load_model(ModelSpec(name="demo"))
    folder = loaded.info.spec.name if os.path.isdir(loaded.info.spec.name) else None
    from clipindex.demo import DATA

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder or DATA / 'model'}")
    model.eval()
    for shard in list_shards([str(corpus)]):
        images = [Image.open(__import__("io").BytesIO(sample.image)) for sample in read_samples(shard)]
        with torch.inference_mode():
            raw = model.encode_image(torch.stack([transform(image) for image in images]))
        theirs = torch.nn.functional.normalize(raw, dim=-1).numpy()
        (batch,) = read_embeddings(tmp_path / "out", ("norm",), [shard.name])
        assert (batch.embedding * theirs).sum(axis=1).min() >= 0.9999
        np.testing.assert_allclose(batch.columns["norm"], raw.norm(dim=-1).numpy(), rtol=1e-2)


def test_a_rerun_embeds_only_what_is_missing(tmp_path, corpus):
    out = tmp_path / "out"
    first = embed(str(corpus), out, **TINY)
    assert (first.shards_embedded, first.rows, first.shards_done_before) == (3, 30, 0)
    assert json.loads((out / "summary.json").read_bytes())["rows"] == 30
    files = sorted((out / "embeddings").iterdir())
    before = {path: path.stat().st_mtime_ns for path in files}
    files[1].unlink()
    again = embed(str(corpus), out, **TINY)
    assert (again.shards_embedded, again.rows, again.shards_done_before) == (1, 10, 2)
    assert [path.stat().st_mtime_ns == before[path] for path in files] == [True, False, True]


def test_a_changed_tar_is_reported_and_run_again_only_on_refresh(tmp_path, corpus):
    out = tmp_path / "out"
    embed(str(corpus), out, **TINY)
    changed = write_tar(corpus / "1.tar", labelled(["new"]))
    told = embed(str(corpus), out, **TINY)
    assert told.shards_changed == [str(changed)]
    assert told.shards_embedded == 0
    refreshed = embed(str(corpus), out, refresh=True, **TINY)
    assert (refreshed.shards_embedded, refreshed.shards_changed, refreshed.rows) == (1, [], 1)
    assert sum(record.rows for record in published_shards(out).values()) == 21


def test_another_model_is_refused_before_anything_is_written(tmp_path, corpus):
    out = tmp_path / "out"
    embed(str(corpus / "0.tar"), out, **TINY)
    other = ModelSpec(name="RN50", random_init=0)
    with pytest.raises(FingerprintError, match="demo.*RN50"):
        embed(str(corpus), out, model=other.name, random_init=0, device="cpu")
    assert len(published_shards(out)) == 1


def test_precision_is_recorded_and_mixes(tmp_path, corpus):
    out = tmp_path / "out"
    embed(str(corpus / "0.tar"), out, **TINY)
    embed(str(corpus), out, **{**TINY, "precision": "bf16"})
    assert sorted(record.precision for record in published_shards(out).values()) == ["bf16", "bf16", "fp32"]


def test_another_dtype_in_one_directory_is_refused(tmp_path, corpus):
    embed(str(corpus / "0.tar"), tmp_path / "out", **TINY)
    with pytest.raises(StoreError, match="--dtype float16"):
        embed(str(corpus), tmp_path / "out", dtype="float32", **TINY)


def test_broken_shards_are_in_the_summary_and_the_others_done(tmp_path, corpus):
    (corpus / "1.tar").write_bytes(b"<html>not found</html>" * 50)
    summary = embed(str(corpus), tmp_path / "out", **TINY)
    assert list(summary.shards_failed) == [str(corpus / "1.tar")]
    assert (summary.shards_embedded, summary.rows) == (2, 20)


def test_rejects_are_counted_by_stage(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.jpg", encoded()), ("b.jpg", b"no"), ("c.txt", b"alone"), ("d.jpg", encoded()),
                                   ("d.cls", b"x")])  # fmt: skip
    summary = embed(str(tmp_path / "a.tar"), tmp_path / "out", **TINY)
    assert summary.rejects_by_stage == {"decode": 1, "label": 1, "tar": 1}
    assert summary.rows + summary.rejects == summary.samples == 4
    assert summary.reject_rate == 0.75


@pytest.mark.parametrize("wrong", [{"dtype": "int8"}, {"batch_size": 0}, {"device": "tpu"}, {"precision": "fp8"}])
def test_arguments_that_do_not_fit(tmp_path, corpus, wrong):
    with pytest.raises(UsageError):
        embed(str(corpus), tmp_path / "out", **{**TINY, **wrong})


def test_images_larger_and_smaller_than_the_model(tmp_path):
    images = [("tiny.png", encoded(picture(1, 1), "PNG")), ("wide.jpg", encoded(picture(900, 40)))]
    summary = embed(str(write_tar(tmp_path / "a.tar", images)), tmp_path / "out", **TINY)
    assert summary.rows == 2
