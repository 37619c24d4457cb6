import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CUDA
from corpus import labelled, write_tar

from clipindex import ModelSpec, build_classifier, classify, classify_images, embed, load_model, read_embeddings
from clipindex.demo import DATA
from clipindex.devices import choose_device, choose_precision
from clipindex.encode import TextTower
from clipindex.errors import ClassesError, FingerprintError, SampleError, SourceError, UsageError
from clipindex.metrics import ClassificationCounts
from clipindex.store import ROW_GROUP_ROWS, ShardWriter, open_dataset, published_shards
from clipindex.types import Sample, Shard, Vectors
from clipindex.zeroshot import ZeroShotClassifier, predict_directory

DIGITS = DATA / "wds_digits"
CLASSES = DIGITS / "classnames.txt"
TEMPLATES = DIGITS / "zeroshot_classification_templates.txt"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    embed(str(DIGITS), out, model="demo", precision="fp32", device="cpu")
    return out


@pytest.fixture(scope="module")
def summary(digits):
    return classify(digits, classes=CLASSES, templates=TEMPLATES, precision="fp32", device="cpu")


def test_digits_are_known_without_training_on_them(summary):
    assert summary.acc1 >= 0.95
    assert summary.acc5 >= summary.acc1
    assert summary.rows == summary.labelled
    assert summary.classes == 10


def test_predictions_follow_from_the_text_towers_vectors(digits, summary):
    loaded = load_model(ModelSpec(name="demo"))
    tower = TextTower(loaded, device=choose_device("cpu"), precision="fp32")
    names, templates = CLASSES.read_text().split(), TEMPLATES.read_text().splitlines()
    vectors = []
    for name in names:
        prompts = tower.encode([template.replace("{c}", name) for template in templates]).mean(axis=0)
        vectors.append(prompts / np.linalg.norm(prompts))
    for batch in read_embeddings(digits, ("key", "label")):
        table = pq.read_table(digits / "predictions" / f"{batch.shard.name}.parquet")
        cosines = batch.embedding.astype(np.float32) @ np.array(vectors, np.float32).T
        logits = loaded.info.logit_scale * cosines.astype(np.float64)
        softmax = np.exp(logits - logits.max(axis=1, keepdims=True))
        softmax /= softmax.sum(axis=1, keepdims=True)
        ids = np.array(table["class_id"].to_pylist())
        assert table["key"].to_pylist() == batch.columns["key"].to_pylist()
        assert table["label"].to_pylist() == batch.columns["label"].to_pylist()
        assert set(table["shard"].to_pylist()) == {batch.shard.name}
        np.testing.assert_array_equal(ids[:, 0], cosines.argmax(axis=1))
        assert [row[0] for row in table["class_name"].to_pylist()] == [names[at] for at in ids[:, 0]]
        expected = np.take_along_axis(softmax, ids, axis=1)
        np.testing.assert_allclose(np.array(table["probability"].to_pylist()), expected, atol=1e-4)
        np.testing.assert_allclose(
            np.array(table["cosine"].to_pylist()), np.take_along_axis(cosines, ids, axis=1), atol=1e-5
        )


@pytest.mark.cuda
def test_embedded_and_classified_on_cuda_images_are_in_the_same_classes(digits, summary, tmp_path):
    how = {"precision": "fp32", "device": CUDA}
    embed(str(DIGITS), tmp_path, model="demo", decode="cpu", batch_size=64, **how)
    there = classify(tmp_path, classes=CLASSES, templates=TEMPLATES, **how)
    paths = [sorted((folder / "predictions").glob("*.parquet")) for folder in (digits, tmp_path)]
    tables = [pa.concat_tables(map(pq.read_table, some)) for some in paths]
    assert tables[0]["key"] == tables[1]["key"]
    classes = [np.array(table["class_id"].to_pylist())[:, 0] for table in tables]
    cosines = [np.array(table["cosine"].to_pylist()) for table in tables]
    # Vectors whose last bits differ are rounded to other half floats: cosines to within a thousandth.
    np.testing.assert_allclose(*cosines, atol=1e-3)
    clear = cosines[0][:, 0] - cosines[0][:, 1] > 2e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(classes[0][clear], classes[1][clear])
    assert abs(there.acc1 - summary.acc1) <= (~clear).mean()


def test_metrics_json_has_the_summary_and_each_class(digits, summary):
    metrics = json.loads((digits / "predictions" / "metrics.json").read_bytes())
    assert metrics["acc1"] == summary.acc1
    assert [row["name"] for row in metrics["per_class"]] == CLASSES.read_text().split()
    recalls = [row["recall"] for row in metrics["per_class"]]
    assert metrics["mean_per_class_recall"] == pytest.approx(np.mean(recalls))
    assert sum(row["support"] for row in metrics["per_class"]) == summary.labelled
    assert sorted(metrics["shards"]) == sorted(published_shards(digits))


def test_another_run_leaves_nothing_of_the_one_before(digits, tmp_path):
    out = tmp_path / "predictions"
    classify(digits, classes=CLASSES, templates="simple", out=out, top=3, precision="fp32", device="cpu")
    first = next(out.glob("*.parquet"))
    first.rename(out / "gone-0-00000000.parquet")  # as of a shard that is no more
    classify(digits, classes=CLASSES, templates=TEMPLATES, out=out, top=1, precision="fp32", device="cpu")
    assert sorted(path.stem for path in out.glob("*.parquet")) == sorted(published_shards(digits))
    assert {len(row) for path in out.glob("*.parquet") for row in pq.read_table(path)["class_id"].to_pylist()} == {1}


@pytest.mark.parametrize("where", ["embeddings", "other"])
def test_files_of_others_are_never_replaced(digits, tmp_path, where):
    out = digits / "embeddings"
    if where == "other":
        out = tmp_path
        pq.write_table(pa.table({"x": [1]}), out / "theirs.parquet")
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UsageError, match="written by no classification"):
        classify(digits, classes=CLASSES, out=out, precision="fp32", device="cpu")
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_failed_run_leaves_the_one_before(digits, tmp_path):
    out = tmp_path / "predictions"
    classify(digits, classes=CLASSES, out=out, precision="fp32", device="cpu")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ClassesError, match="beyond"):
        classify(digits, classes=["zero", "one"], out=out, precision="fp32", device="cpu")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_only_the_shards_asked_for_are_measured(digits, tmp_path):
    name = sorted(published_shards(digits))[0]
    found = classify(digits, classes=CLASSES, shards=[name], out=tmp_path / "p", precision="fp32", device="cpu")
    assert found.rows == published_shards(digits)[name].rows


def test_a_label_beyond_the_classes_is_named(digits, tmp_path):
    (tmp_path / "three.txt").write_text("zero\none\ntwo\n")
    with pytest.raises(ClassesError, match=r"label \d of key 'digit_.* beyond the 3 classes"):
        classify(digits, classes=tmp_path / "three.txt", precision="fp32", device="cpu", out=tmp_path / "p")
    assert not list((tmp_path / "p").glob("*"))


def multiplies_bf16():
    return choose_precision("auto", choose_device("cpu")) == "bf16"


@pytest.mark.skipif(not multiplies_bf16(), reason="needs bf16 instructions")
def test_approximate_classification_says_how_far_it_agrees(digits, summary, tmp_path):
    classes = CLASSES.read_text().split() + [f"thing {at} of {at % 7}" for at in range(3000)]
    exact, found = (
        classify(digits, classes=classes, out=tmp_path / str(approximate), approximate=approximate, precision="fp32",
                 device="cpu")
        for approximate in (False, True)
    )  # fmt: skip
    assert summary.agreement is None and exact.agreement is None
    assert found.agreement.rows == min(1000, found.rows)
    assert found.agreement.k == 5
    assert found.agreement.same_top1 > 0.98
    assert found.acc1 == pytest.approx(exact.acc1, abs=0.02)
    document = json.loads((tmp_path / "True" / "metrics.json").read_bytes())
    assert document["agreement"]["most_probability_off"] == found.agreement.most_probability_off < 0.01


@pytest.mark.skipif(multiplies_bf16(), reason="needs a CPU without bf16 instructions")
def test_approximate_is_refused_where_it_would_be_slower(digits, tmp_path):
    with pytest.raises(UsageError, match="bf16"):
        classify(digits, classes=CLASSES, out=tmp_path / "p", approximate=True, device="cpu")


def test_progress_is_told_within_row_groups_where_classes_are_many(tmp_path):
    info = load_model(ModelSpec(name="demo")).info
    num_rows, num_classes = ROW_GROUP_ROWS, 60_000
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(num_classes, info.dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    wanted = rng.integers(0, num_classes, num_rows)
    writer = ShardWriter(tmp_path, Shard(url="/x.tar", name="x", size=0, version=""),
                         open_dataset(tmp_path, info, "float16", "test"))  # fmt: skip
    samples = [Sample(key=f"k{at}", member="", image=b"", tar_offset=0, label=int(of)) for at, of in enumerate(wanted)]
    writer.append(samples, Vectors(vectors[wanted], np.ones(num_rows, np.float32)), [(1, 1)] * num_rows)
    writer.publish(samples=num_rows, precision="fp32", decoder="exact", device="cpu", seconds=0.0)
    told, counts = [], ClassificationCounts(num_classes)
    classifier = ZeroShotClassifier(list(map(str, range(num_classes))), vectors, info)
    predict_directory(tmp_path, classifier, tmp_path / "predictions", 1, counts, told.append)
    assert len(told) > 1 and told[-1] == num_rows
    assert counts.overall()["acc1"] == 1
    table = pq.read_table(tmp_path / "predictions" / "x.parquet")
    assert table["key"].to_pylist() == [sample.key for sample in samples]
    assert [int(name) for (name,) in table["class_name"].to_pylist()] == wanted.tolist()


def test_another_models_embeddings_are_refused(digits):
    with pytest.raises(FingerprintError, match="RN50"):
        classify(digits, classes=CLASSES, model=ModelSpec(name="RN50", random_init=0), device="cpu")


def test_without_labels_there_are_predictions_and_no_accuracy(tmp_path):
    members = [member for member in labelled(["a", "b"]) if not member[0].endswith("cls")]
    embed(str(write_tar(tmp_path / "a.tar", members)), tmp_path / "out", model="demo", device="cpu")
    summary = classify(tmp_path / "out", classes=["cat", "dog"], device="cpu")
    assert (summary.rows, summary.labelled, summary.acc1, summary.acc5) == (2, 0, None, None)


def test_single_images(tmp_path):
    from clipindex import list_shards, read_samples

    loaded = load_model(ModelSpec(name="demo"))
    classifier = build_classifier(
        loaded, CLASSES.read_text().split(), TEMPLATES.read_text().splitlines(), device="cpu", precision="fp32"
    )
    sample = next(iter(read_samples(list_shards([str(DIGITS)])[0])))
    (tmp_path / "digit.png").write_bytes(sample.image)
    (found,) = classify_images([tmp_path / "digit.png"], loaded, classifier, top=10, device="cpu", precision="fp32")
    assert sum(found.probabilities) == pytest.approx(1, abs=1e-4)
    assert found.probabilities == sorted(found.probabilities, reverse=True)
    assert found.classes[0] == CLASSES.read_text().split()[sample.label]
    (tmp_path / "broken.jpg").write_bytes(b"no")
    with pytest.raises(SampleError, match=r"broken\.jpg"):
        classify_images([tmp_path / "broken.jpg"], loaded, classifier)
    with pytest.raises(SourceError, match=r"missing\.jpg"):
        classify_images([tmp_path / "missing.jpg"], loaded, classifier)
