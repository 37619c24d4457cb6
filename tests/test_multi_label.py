"""Images with any number of classes, classified and learned from."""

import io
import json
import logging

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from corpus import write_tar

from clipindex import classify, embed, list_shards, read_embeddings, read_samples, train_probe
from clipindex.cli import commands
from clipindex.demo import DATA
from clipindex.errors import ClassesError

DIGITS = DATA / "wds_digits"
CLASSES = DIGITS / "classnames.txt"
NAMES = CLASSES.read_text().splitlines()
HERE = {"device": "cpu", "precision": "fp32"}


def lists_of(labels):
    """Of rows of a class each that is seen and one by chance, and now and then none; the last class never occurs."""
    rng = np.random.default_rng(0)
    lists = [{label, int(rng.integers(len(NAMES) - 1))} - {len(NAMES) - 1} for label in labels]
    return [sorted(one) if at % 17 else [] for at, one in enumerate(lists)]


def npy(values):
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values, np.float32))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """The shipped digits as CLIP_benchmark lays out sets of many labels; some rows have none, one a single label."""
    folder = tmp_path_factory.mktemp("wds")
    samples = [sample for shard in list_shards(str(DIGITS)) for sample in read_samples(shard)]
    lists = lists_of([sample.label for sample in samples])
    members = []
    for at, (sample, classes) in enumerate(zip(samples, lists, strict=True)):
        members.append((f"{at:05}.png", sample.image))
        if at % 10 == 3:
            members.append((f"{at:05}.cls", json.dumps(classes).encode()))
        elif at == 40:
            members.append((f"{at:05}.cls", str(sample.label).encode()))
        elif at % 10 != 5:
            members.append((f"{at:05}.npy", npy([one in classes for one in range(len(NAMES))])))
    half = len(members) // 4 * 2
    write_tar(folder / "test" / "0.tar", members[:half])
    write_tar(folder / "test" / "1.tar", members[half:])
    (folder / "classnames.txt").write_text(CLASSES.read_text())
    return folder


@pytest.fixture(scope="module")
def digits(tars):
    embed(str(tars / "test"), tars / "out", model="demo", batch_size=64, **HERE)
    return tars / "out"


def labelled_rows(folder):
    """Unit vectors [n, D] and truth [n, C] of the rows with lists, or with one label, which is a list of one."""
    vectors, truth = [], []
    for batch in read_embeddings(folder, ("label", "labels")):
        columns = (batch.columns[name].to_pylist() for name in ("label", "labels"))
        for vector, label, labels in zip(batch.embedding, *columns, strict=True):
            classes = [label] if labels is None and label is not None else labels
            if classes is not None:
                vectors.append(vector.astype(np.float32))
                truth.append([one in classes for one in range(len(NAMES))])
    return np.array(vectors), np.array(truth)


def by_sorting(scores, truth):
    found = []
    for one in range(truth.shape[1]):
        right = truth[np.argsort(-scores[:, one], kind="stable"), one]
        found.append((np.cumsum(right) / np.arange(1, len(right) + 1))[right].sum() / max(right.sum(), 1))
    return np.array(found)


def class_vectors():
    from clipindex import ModelSpec, build_classifier, load_model
    from clipindex.index.exact import stored_vectors

    classifier = build_classifier(load_model(ModelSpec(name="demo")), NAMES, ["{c}"], **HERE)
    return stored_vectors(classifier.index).copy()


def test_zero_shot_average_precision_is_that_of_sorting_all_cosines(digits, tmp_path):
    told = []
    found = classify(digits, classes=CLASSES, templates=["{c}"], out=tmp_path / "p", on_ranked=told.append, **HERE)
    vectors, truth = labelled_rows(digits)
    expected = by_sorting(vectors @ class_vectors().T, truth)
    assert found.multi_labelled == len(truth) > 100
    assert found.no_average_precision is None
    assert told[-1] == 2 * len(truth)
    np.testing.assert_allclose([row["average_precision"] for row in found.average_precision], expected, atol=1e-3)
    assert found.mean_average_precision == pytest.approx(expected.mean(), abs=1e-4)
    assert [row["support"] for row in found.average_precision] == truth.sum(0).tolist()
    assert (found.average_precision[-1]["support"], found.average_precision[-1]["average_precision"]) == (0, 0)
    assert 0.3 < found.mean_average_precision < 1
    assert found.labelled == 1  # single labels are measured beside, and ranked
    metrics = json.loads((tmp_path / "p" / "metrics.json").read_bytes())
    assert metrics["mean_average_precision"] == found.mean_average_precision
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == sorted(
        ["metrics.json", *(f"{name}.parquet" for name in metrics["shards"])]
    )


def test_single_labels_are_not_ranked(tmp_path):
    embed(str(DIGITS), tmp_path / "d", model="demo", batch_size=64, **HERE)
    told = []
    found = classify(tmp_path / "d", classes=CLASSES, on_ranked=told.append, **HERE)
    assert (found.multi_labelled, found.mean_average_precision, found.average_precision, told) == (0, None, [], [])


def embed_members(folder, members):
    """A directory of small images with a member each, and the source tars."""
    images = [sample.image for sample in read_samples(list_shards(str(DIGITS))[0])]
    pairs = [[(f"k{at}.png", images[at]), (f"k{at}.{end}", text)] for at, (end, text) in enumerate(members)]
    write_tar(folder / "t.tar", [one for pair in pairs for one in pair])
    embed(str(folder / "t.tar"), folder / "d", model="demo", batch_size=8, **HERE)
    return folder / "d"


def test_predictions_carry_the_truth_of_both_kinds(digits, tmp_path):
    found = classify(digits, classes=CLASSES, templates=["{c}"], out=tmp_path / "p", **HERE)
    tables = [pq.read_table(path) for path in sorted((tmp_path / "p").glob("*.parquet"))]
    for name in ("label", "labels"):
        stored = [one for batch in read_embeddings(digits, (name,)) for one in batch.columns[name].to_pylist()]
        assert [one for table in tables for one in table[name].to_pylist()] == stored
        assert stored.count(None) < len(stored)
    # So that a user can score them: how often the best class is one of the row's.
    scored = [
        row["class_id"][0] in ([row["label"]] if row["labels"] is None else row["labels"])
        for table in tables
        for row in table.to_pylist()
        if row["labels"] is not None or row["label"] is not None
    ]
    assert len(scored) == found.multi_labelled
    assert 0.5 < np.mean(scored) < 1


def test_single_labels_beside_lists_are_lists_of_one(tmp_path):
    words = [b"[3]", b"[1, 4]", b"[]", b"[0]", b"[2, 3]", b"[4]"]
    lists, mixed = (
        classify(embed_members(tmp_path / name, [("cls", word) for word in given]), classes=NAMES, **HERE)
        for name, given in (("lists", words), ("mixed", [b"3", b"[1, 4]", b"[]", b"0", b"[2, 3]", b"4"]))
    )
    assert lists.multi_labelled == mixed.multi_labelled == 6
    assert lists.average_precision == mixed.average_precision
    assert (lists.labelled, mixed.labelled) == (0, 3)
    singles = embed_members(tmp_path / "singles", [("cls", b"3"), ("cls", b"1")])
    assert classify(singles, classes=NAMES, **HERE).multi_labelled == 0


def test_a_single_label_beyond_the_names_is_named(tmp_path):
    # Whatever lists are beside it.
    folder = embed_members(tmp_path, [("json", b"[10, 20, 300]"), ("cls", b"1"), ("cls", b"3")])
    with pytest.raises(ClassesError, match=r"label 3 of key 'k2' .* is beyond the 3 classes .*; give the class file"):
        classify(folder, classes=NAMES[:3], out=tmp_path / "p", **HERE)
    assert not (tmp_path / "p").exists()


def test_of_many_classes_both_ends_are_shown_and_where_all_are(tmp_path):
    folder = embed_members(tmp_path, [("cls", b"%d" % at) for at in range(23)])
    (tmp_path / "names.txt").write_text("".join(f"thing {at}\n" for at in range(30)))
    done = clipindex("classify", folder, "--classes", tmp_path / "names.txt", "--device", "cpu")
    assert f"  … 3 more in {folder}/predictions/metrics.json" in done
    assert done.count("  thing ") == 20


def test_lists_beyond_the_names_are_no_classes_and_stop_nothing(tmp_path, caplog):
    folder = embed_members(
        tmp_path, [("cls", b"1"), ("json", b"[0]"), ("json", b"[10, 20, 300, 400]"), ("cls", b"[9]")]
    )
    told = []
    with caplog.at_level(logging.WARNING, "clipindex"):
        found = classify(folder, classes=NAMES[:3], out=tmp_path / "p", on_ranked=told.append, **HERE)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "mAP is left out" in said and "label 10 of key 'k2' (shard t" in said and "beyond the 3 classes" in said
    assert (found.rows, found.labelled, found.multi_labelled) == (4, 1, 4)
    assert (found.mean_average_precision, found.average_precision, told) == (None, [], [])
    assert found.no_average_precision in said
    metrics = json.loads((tmp_path / "p" / "metrics.json").read_bytes())
    assert metrics["no_average_precision"] == found.no_average_precision
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    done = clipindex("classify", folder, "--classes", tmp_path / "names.txt", "--device", "cpu")
    assert "no mAP of 4 rows: label 10 of key 'k2'" in done


@pytest.mark.parametrize(("last", "is_told"), [(b"[20, 5, 6, 7]", True), (b"[20, 5, 6]", False)])
def test_lists_that_look_like_boxes_are_said(tmp_path, caplog, last, is_told):
    folder = embed_members(tmp_path, [("json", b"[1, 2, 3, 4]"), ("cls", b"1"), ("json", last)])
    found = classify(folder, classes=list(map(str, range(30))), out=tmp_path / "p", **HERE)
    assert found.mean_average_precision is not None
    said = "all 2 lists of labels have four numbers; boxes in .json belong into an object"
    assert [record.getMessage() for record in caplog.records] == [said] * is_told


def test_a_fit_ends_where_float32_tells_nothing_any_more(digits, tmp_path):
    found = train_probe(digits, label="labels", c=10**-5.5, held_out=0.3, out=tmp_path, device="cpu")
    assert found.training["converged"] and found.training["passes"] < 30


def clipindex(*arguments):
    done = CliRunner().invoke(commands, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done.stdout


def test_tars_are_classified_in_one_command(tars, tmp_path):
    done = clipindex("classify", tars / "test", "--classes", CLASSES, "--out", tmp_path / "out", "--model", "demo",
                     "--batch-size", 64, "--device", "cpu")  # fmt: skip
    metrics = json.loads((tmp_path / "out" / "predictions" / "metrics.json").read_bytes())
    assert f"mAP {metrics['mean_average_precision']:.2%}" in done
    assert "average precision by class:" in done
    assert "1 classes do not occur and count as 0" in done
