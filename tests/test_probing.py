import json
from hashlib import sha256

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from command_line import run_cli, run_process
from conftest import CUDA
from probe_data import features, model, read_back, write_directory
from safetensors.torch import load_file, save
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix

from clipindex import classify, evaluate_probe, few_shot_curve, read_embeddings, read_probe, train_probe
from clipindex.demo import DATA
from clipindex.embed_job import embed
from clipindex.errors import ClassesError, FingerprintError, StoreError, UsageError
from clipindex.probing import write_predictions
from clipindex.probing.adamw import train_adamw
from clipindex.probing.protocols import search_peak
from clipindex.probing.rows import Held, random_ranks, split
from clipindex.store import read_dataset

CPU = {"device": "cpu"}
GAPS = np.array([2, 3, 5, 7, 11, 13, 17])
"""The labels of the classes."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Training and test rows of seven classes whose labels have gaps; every 20th training row has no label."""
    folder = tmp_path_factory.mktemp("corpus")
    raw, classes = features(2000)
    labels = [None if row % 20 == 0 else GAPS[one] for row, one in enumerate(classes)]
    write_directory(folder / "train", raw, labels, shards=3)
    raw, classes = features(600, seed=5)
    write_directory(folder / "test", raw, GAPS[classes])
    return folder


def labelled(folder, kind="raw"):
    x, labels = read_back(folder, kind)
    kept = [row for row, label in enumerate(labels) if label is not None]
    return x[kept], np.array([labels[row] for row in kept])


@pytest.fixture(scope="module")
def trained(corpus):
    return train_probe(corpus / "train", test=corpus / "test", out=corpus / "probe", **CPU)


def test_a_probe_is_scikit_learns(corpus, trained):
    x, y = labelled(corpus / "train")
    test_x, test_y = labelled(corpus / "test")
    theirs = LogisticRegression(C=0.316, max_iter=5000, tol=1e-6).fit(x, y)
    assert abs(trained.test.acc1 - theirs.score(test_x, test_y)) <= 1 / 600
    assert (trained.rows, trained.left_out, trained.classes) == (1900, 100, 7)
    assert (trained.protocol, trained.c, trained.features) == ("openai-readme", 0.316, "raw")
    probe = read_probe(corpus / "probe")
    assert probe.classes == tuple(GAPS.tolist())
    assert "github.com/openai/CLIP" in probe.training["recipe"]
    assert probe.metrics["acc1"] == trained.test.acc1
    logits = test_x @ probe.weights.numpy().T + probe.intercept.numpy()
    np.testing.assert_allclose(torch.softmax(torch.from_numpy(logits), 1), theirs.predict_proba(test_x), atol=0.02)


def test_rows_that_do_not_fit_into_memory_give_the_same(corpus, trained, tmp_path):
    streamed = train_probe(corpus / "train", test=corpus / "test", memory_bytes=1, out=tmp_path, **CPU)
    assert (trained.training["in_memory"], streamed.training["in_memory"]) == (True, False)
    assert streamed.training["objective"] == pytest.approx(trained.training["objective"], rel=1e-5)
    assert abs(streamed.test.acc1 - trained.test.acc1) <= 1 / 600


@pytest.mark.cuda
@pytest.mark.parametrize("memory_bytes", [None, 1])
def test_a_gpu_finds_the_same(corpus, trained, tmp_path, memory_bytes):
    """Sums in another order leave the minimum where it is, to what the descent's end allows of its objective."""
    found = train_probe(corpus / "train", test=corpus / "test", memory_bytes=memory_bytes, out=tmp_path, device=CUDA)
    assert found.training["objective"] == pytest.approx(trained.training["objective"], rel=1e-5)
    assert abs(found.test.acc1 - trained.test.acc1) <= 2 / 600
    assert (found.training["in_memory"], found.training["device"]) == (memory_bytes is None, CUDA)
    probe = read_probe(corpus / "probe")
    there = evaluate_probe(corpus / "test", probe, device=CUDA)
    assert there.acc1 == pytest.approx(trained.test.acc1, abs=1 / 600)
    assert there.calibration_error == pytest.approx(trained.test.calibration_error, abs=0.01)  # rows go to other bins
    tables = []
    for device in ("cpu", CUDA):
        write_predictions(corpus / "train", probe, tmp_path / "p.parquet", top=3, device=device)
        tables.append(pq.read_table(tmp_path / "p.parquet")["probability"].to_pylist())
    np.testing.assert_allclose(*tables, atol=1e-4)  # of logits up to 30


@pytest.mark.cuda
def test_few_shots_and_searches_on_a_gpu(corpus, shapes, tmp_path):
    names = DATA / "wds_shapes" / "classnames.txt"
    named, curves, searched = [], [], []
    for device in ("cpu", CUDA):
        how = {"out": tmp_path, "device": device}
        named.append(few_shot_curve(shapes, [2], held_out=0.5, names=names, precision="fp32", **how))
        curves.append(few_shot_curve(corpus / "train", [1, 16], test=corpus / "test", **how))
        searched.append(train_probe(corpus / "train", test=corpus / "test", c=None, **how))
    # A row or two lie so near to the border of two classes that rounding decides.
    assert named[1].zero_shot == pytest.approx(named[0].zero_shot, abs=2 / named[0].test_rows)
    for here, there in (named, curves):
        for one, other in zip(here.points, there.points, strict=True):
            assert other.acc1 == pytest.approx(one.acc1, abs=2 / here.test_rows)
    # Of validation rows as well, so that among strengths as good as each other another one may be taken.
    assert abs(searched[1].test.acc1 - searched[0].test.acc1) < 0.02
    scores = [max(trial["acc1"] for trial in one.training["search"]["trials"]) for one in searched]
    assert scores[1] == pytest.approx(scores[0], abs=0.01)


@pytest.mark.cuda
def test_adamw_on_a_gpu_goes_the_same_way(corpus, tmp_path):
    x, labels = labelled(corpus / "train", "normalized")
    ids = np.searchsorted(GAPS, labels)
    weights = []
    for device in ("cpu", CUDA):
        rows = Held(embedding=torch.from_numpy(x).to(device), norm=None, labels=torch.from_numpy(ids).to(device),
                    class_ids=ids)  # fmt: skip
        weights.append(torch.cat([one.flatten().cpu() for one in train_adamw(rows, None, 7, 1e-3, 0, lambda: None)]))
    # The first weights and the order of rows are drawn on the CPU. Rounding of 1e-6 in the features ends as 5e-6 of 7.
    assert weights[0].abs().max() > 1
    torch.testing.assert_close(*weights, atol=1e-3, rtol=0)
    how = {"test": corpus / "test", "protocol": "clip-benchmark", "out": tmp_path}
    here, there = (train_probe(corpus / "train", device=device, **how).test.acc1 for device in ("cpu", CUDA))
    assert there == pytest.approx(here, abs=0.02)  # of decays that are as good as each other, another one


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_unit_features(tmp_path, dtype):
    raw, y = features(1200)
    write_directory(tmp_path / "d", raw, y, dtype=dtype)
    train_probe(tmp_path / "d", c=50.0, features="normalized", **CPU)
    probe = read_probe(tmp_path / "d" / "probe")
    assert (probe.features, probe.protocol) == ("normalized", "logistic")
    x, y = labelled(tmp_path / "d", "normalized")
    theirs = LogisticRegression(C=50.0, max_iter=5000, tol=1e-6).fit(x, y)
    np.testing.assert_allclose(probe.weights, theirs.coef_, atol=0.05)


def test_evaluation_is_scikit_learns(corpus, trained):
    found = evaluate_probe(corpus / "test", read_probe(corpus / "probe"), **CPU)
    assert found == trained.test
    probe = read_probe(corpus / "probe")
    x, y = labelled(corpus / "test")
    scores = torch.softmax(torch.from_numpy(x) @ probe.weights.T + probe.intercept, 1).numpy()
    best = GAPS[scores.argmax(1)]
    expected = confusion_matrix(y, best, labels=GAPS)
    matrix = np.zeros_like(expected)
    for label, predicted, rows in found.confusion:
        matrix[np.searchsorted(GAPS, label), np.searchsorted(GAPS, predicted)] = rows
    np.testing.assert_array_equal(matrix, expected)
    precision = [row["precision"] for row in found.per_class]
    np.testing.assert_allclose(precision, np.diag(expected) / expected.sum(0))
    low, high = found.intervals["acc1"]
    assert low < found.acc1 < high
    assert found.labelled == 600


def test_labels_that_were_not_trained_on_count_as_wrong_and_are_said(corpus, trained, tmp_path):
    raw, classes = features(100, seed=5)
    labels = GAPS[classes]
    labels[:10] = 4
    write_directory(tmp_path / "d", raw, labels)
    found = evaluate_probe(tmp_path / "d", read_probe(corpus / "probe"), **CPU)
    assert found.unseen == {4: 10}
    assert found.labelled == 100
    assert [row["recall"] for row in found.per_class if row["label"] == 4] == [0]
    assert sum(rows for label, _, rows in found.confusion if label == 4) == 10


def test_predictions_are_of_every_row(corpus, trained, tmp_path):
    probe = read_probe(corpus / "probe")
    assert write_predictions(corpus / "train", probe, tmp_path / "p.parquet", top=3, **CPU) == 2000
    rows = pq.read_table(tmp_path / "p.parquet").to_pylist()
    x, labels = read_back(corpus / "train")
    scores = torch.softmax(torch.from_numpy(x) @ probe.weights.T + probe.intercept, 1)
    best = torch.topk(scores, 3)
    assert [row["label"] for row in rows] == labels
    assert [row["key"] for row in rows] == [str(row) for row in range(2000)]
    assert [row["class_label"] for row in rows] == GAPS[best.indices.numpy()].tolist()
    np.testing.assert_allclose([row["probability"] for row in rows], best.values, atol=1e-5)


def test_held_out_rows_are_a_part_of_each_class_and_nothing_learns_from_them(corpus, tmp_path):
    found = train_probe(corpus / "train", held_out=0.25, out=tmp_path, **CPU)
    assert found.rows + found.test.labelled == 1900
    _, y = labelled(corpus / "train")
    ids = np.searchsorted(GAPS, y)
    kept, out = split(ids, 0.25, 0)
    assert sorted([*kept, *out]) == list(range(1900))
    np.testing.assert_array_equal(np.bincount(ids[out]), np.round(np.bincount(ids) * 0.25))
    np.testing.assert_array_equal(out, split(ids, 0.25, 0)[1])
    assert not np.array_equal(out, split(ids, 0.25, 1)[1])
    x, _ = labelled(corpus / "train")
    theirs = LogisticRegression(C=0.316, max_iter=5000, tol=1e-6).fit(x[kept], y[kept])
    assert abs(found.test.acc1 - theirs.score(x[out], y[out])) <= 1 / len(out)


def test_ranks_shuffle_each_class():
    ids = np.repeat([0, 1, 2], [5, 1, 3])[np.random.default_rng(0).permutation(9)]
    ranks = random_ranks(ids, 0)
    for one in range(3):
        assert sorted(ranks[ids == one]) == list(range((ids == one).sum()))


@pytest.mark.parametrize("peak", [0, 1, 15, 16, 40, 53, 95, 96])
def test_the_search_finds_a_peak_in_15_points(peak):
    asked = []

    def accuracy(point):
        asked.append(point)
        return -abs(point - peak)

    assert search_peak(accuracy) == peak
    assert len(asked) == len(set(asked)) <= 15
    assert asked[:7] == [96, 80, 64, 48, 32, 16, 0]  # lambda 1e6, 1e4, … 1e-6


def test_equal_peaks_go_to_the_strongest_regularisation():
    assert search_peak(lambda point: 1.0 if 30 <= point <= 60 else 0.0) == 60


def test_c_is_searched_at_the_price_of_few_fits(corpus, trained, tmp_path):
    found = train_probe(corpus / "train", test=corpus / "test", c=None, out=tmp_path, **CPU)
    assert found.protocol == "clip-a3"
    trials = found.training["search"]["trials"]
    assert len(trials) <= 15
    assert all(trial["passes"] <= 15 for trial in trials)
    # Of equal accuracies the strongest; lambda is 1 / C, in eighths of a decade.
    assert 1 / found.c == pytest.approx(max(trials, key=lambda trial: (trial["acc1"], trial["strength"]))["strength"])
    assert np.log10(found.c) * 8 == pytest.approx(round(np.log10(found.c) * 8))
    x, y = labelled(corpus / "train")
    kept, out = split(np.searchsorted(GAPS, y), 0.2, 0)
    theirs = LogisticRegression(C=found.c, max_iter=5000).fit(x[kept], y[kept])
    at_peak = next(trial["acc1"] for trial in trials if trial["strength"] == pytest.approx(1 / found.c))
    assert abs(at_peak - theirs.score(x[out], y[out])) < 0.01
    assert found.rows == 1900  # validation rows are learned from in the end
    assert found.test.acc1 >= trained.test.acc1 - 0.02


def test_clip_benchmarks_probe(corpus, trained, tmp_path):
    found = train_probe(corpus / "train", test=corpus / "test", protocol="clip-benchmark", out=tmp_path, **CPU)
    assert (found.protocol, found.c, found.features) == ("clip-benchmark", None, "normalized")
    assert 1e-6 <= found.training["weight_decay"] <= 100
    assert found.test.acc1 >= trained.test.acc1 - 0.05
    with pytest.raises(UsageError, match="must fit into memory"):
        train_probe(corpus / "train", protocol="clip-benchmark", memory_bytes=1, out=tmp_path, **CPU)


def test_balanced_classes_help_the_rare_one(tmp_path):
    raw, y = features(3000)
    rare = (y != 3) | (np.arange(3000) % 12 == 0)
    write_directory(tmp_path / "d", raw[rare], y[rare])
    raw, y = features(700, seed=5)
    write_directory(tmp_path / "t", raw, y)
    plain, balanced = (
        train_probe(tmp_path / "d", test=tmp_path / "t", balanced=one, out=tmp_path / "p", **CPU).test.per_class[3]
        for one in (False, True)
    )
    assert balanced["recall"] > plain["recall"]


def test_few_shot_is_better_with_more_and_its_draws_are_counted(corpus, tmp_path):
    curve = few_shot_curve(corpus / "train", [8, 1, 64], seeds=4, test=corpus / "test", out=tmp_path, **CPU)
    assert [point.shots for point in curve.points] == [1, 8, 64]
    assert [len(point.acc1) for point in curve.points] == [4, 4, 4]
    means = [point.mean for point in curve.points]
    assert means == sorted(means)
    assert curve.points[0].deviation == pytest.approx(np.std(curve.points[0].acc1, ddof=1))
    assert json.loads((tmp_path / "few_shot.json").read_text())["points"][2]["mean"] == means[2]
    again = few_shot_curve(corpus / "train", [8], seeds=1, seed=2, test=corpus / "test", out=tmp_path, **CPU)
    assert again.points[0].acc1 == (curve.points[1].acc1[2],)
    searched = few_shot_curve(corpus / "train", [16], c=None, seeds=2, test=corpus / "test", out=tmp_path, **CPU)
    assert all(1e-6 <= c <= 1e6 for c in searched.points[0].c)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    embed(str(DATA / "wds_shapes"), folder, model="demo", batch_size=64, device="cpu", precision="fp32")
    return folder


def test_zero_shot_beside_few_shot_is_that_of_classify(shapes, tmp_path):
    names = DATA / "wds_shapes" / "classnames.txt"
    curve = few_shot_curve(shapes, [1, 2], held_out=0.5, names=names, out=tmp_path / "p", **CPU)
    assert curve.zero_shot is not None and curve.templates == 1
    # Among all names, those too that no row has, and of labels that there was nothing to learn of.
    known = [*names.read_text().splitlines(), "a shape", "a red thing", "a circle", "a blue triangle on red"]
    batches = list(read_embeddings(shapes, ("norm", "label")))
    raw = np.concatenate([b.embedding * b.columns["norm"].to_numpy()[:, None] for b in batches])
    labels = np.concatenate([b.columns["label"].to_numpy() for b in batches])
    kept = (labels != 3) & (labels != 11)
    write_directory(tmp_path / "train", raw[kept], labels[kept], info=read_dataset(shapes).model)
    everything = few_shot_curve(
        tmp_path / "train", [1], test=shapes, seeds=1, names=known, out=tmp_path / "q", precision="fp32", **CPU
    )
    zero = classify(shapes, classes=known, out=tmp_path / "c", device="cpu", precision="fp32")
    assert 0.5 < zero.acc1 < 1
    assert everything.zero_shot == pytest.approx(zero.acc1)


def test_models_do_not_mix(corpus, trained, tmp_path):
    raw, y = features(100)
    write_directory(tmp_path / "d", raw, GAPS[y], info=model(32, seed=1))
    probe = read_probe(corpus / "probe")
    for wrong in (
        lambda: evaluate_probe(tmp_path / "d", probe, **CPU),
        lambda: write_predictions(tmp_path / "d", probe, tmp_path / "p.parquet", **CPU),
        lambda: train_probe(corpus / "train", test=tmp_path / "d", out=tmp_path, **CPU),
    ):
        with pytest.raises(FingerprintError, match="seed 1"):
            wrong()
    assert not (tmp_path / "p.parquet").exists()


def test_labels_that_make_no_probe_are_said(tmp_path):
    raw, y = features(60)
    write_directory(tmp_path / "one", raw, np.full(60, 4))
    with pytest.raises(ClassesError, match="all labelled rows have label 4"):
        train_probe(tmp_path / "one", **CPU)
    write_directory(tmp_path / "none", raw, [None] * 60)
    with pytest.raises(ClassesError, match="none of 60 rows has a label"):
        train_probe(tmp_path / "none", **CPU)
    write_directory(tmp_path / "few", raw[:8], [0, 0, 0, 0, 0, 1, 1, None])
    with pytest.raises(ClassesError, match="label 1 has 2 rows to learn from, fewer than 4 shots need"):
        few_shot_curve(tmp_path / "few", [1, 4], test=tmp_path / "one", **CPU)
    # Before the model is looked for, which is nowhere.
    with pytest.raises(ClassesError, match="label 1 has 2 rows .*, fewer than 2 shots and 2 rows to validate on need"):
        few_shot_curve(tmp_path / "few", [2], c=None, test=tmp_path / "one", names=list("abcde"), **CPU)
    with pytest.raises(UsageError, match="few is learned from, so testing on it says nothing"):
        train_probe(tmp_path / "few", test=tmp_path / "x" / ".." / "few", **CPU)
    with pytest.raises(ClassesError, match="too few to hold 0.01"):
        train_probe(tmp_path / "few", held_out=0.01, **CPU)
    with pytest.raises(ClassesError, match="label 1 has no name"):
        train_probe(tmp_path / "few", names=["zero"], **CPU)


def test_what_contradicts_itself_is_said(corpus, tmp_path):
    for wrong, message in [
        ({"test": corpus / "test", "held_out": 0.2}, "not both"),
        ({"held_out": 1.5}, "above 0 and below 1"),
        ({"c": -1.0}, "positive"),
        ({"c": float("nan")}, "positive"),
        ({"features": "centred"}, "raw or normalized"),
        ({"label": "caption"}, "the column of class labels is 'label'"),
        ({"protocol": "clip-benchmark", "balanced": True}, "balance"),
    ]:
        with pytest.raises(UsageError, match=message):
            train_probe(corpus / "train", out=tmp_path, **wrong, **CPU)
    with pytest.raises(UsageError, match="rows to test on"):
        few_shot_curve(corpus / "train", [1], **CPU)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("memory_bytes", [None, 1])
def test_rows_that_are_no_numbers_are_named(tmp_path, memory_bytes):
    raw, y = features(60)
    write_directory(tmp_path / "d", raw, y, dtype="float32", shards=1)
    (path,) = (tmp_path / "d" / "embeddings").glob("*.parquet")
    x, _ = read_back(tmp_path / "d", "normalized")
    path.write_bytes(path.read_bytes().replace(x[41].tobytes(), np.full(32, np.nan, np.float32).tobytes()))
    with pytest.raises(StoreError, match=r"synthetic-0\.parquet: row 41 is not a number"):
        train_probe(tmp_path / "d", memory_bytes=memory_bytes, **CPU)
    assert not (tmp_path / "d" / "probe").exists()


def test_probes_that_are_missing_or_damaged_are_said(corpus, trained, tmp_path):
    with pytest.raises(StoreError, match="holds no probe"):
        read_probe(tmp_path)
    document = (corpus / "probe" / "probe.json").read_text()
    weights = (corpus / "probe" / "probe.safetensors").read_bytes()
    assert set(load_file(corpus / "probe" / "probe.safetensors")) == {"weights", "intercept"}
    whole = json.loads(document)
    broken = save({"weights": torch.full((7, 32), torch.nan), "intercept": torch.zeros(7)})
    for text, data, message in [
        (document[:100], weights, "damaged"),
        ("[]", weights, "lacks what it should hold"),
        (document, weights[:-4], "not the one that probe.json describes"),
        (json.dumps({**whole, "format_version": 9}), weights, "version 9"),
        (json.dumps({**whole, "classes": [1, 2]}), weights, "for 2 classes"),
        (json.dumps({**whole, "features": "x"}), weights, "do not fit"),
        (json.dumps({**whole, "weights_sha256": sha256(broken).hexdigest()}), broken, "no numbers"),
    ]:
        (tmp_path / "probe.json").write_text(text)
        (tmp_path / "probe.safetensors").write_bytes(data)
        with pytest.raises(StoreError, match=message):
            read_probe(tmp_path)


def test_the_commands(shapes, tmp_path):
    names = DATA / "wds_shapes" / "classnames.txt"
    probe = tmp_path / "probe"
    done = run_process("probe", "train", shapes, "--split", 0.3, "--c", "auto", "--classes", names, "--out", probe,
                       "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["protocol"] == "clip-a3"
    assert summary["test"]["acc1"] > 0.8
    done = run_cli("probe", "eval", shapes, "--probe", probe, "--out", tmp_path / "eval.json")
    assert done.returncode == 0, done.stderr
    assert "red oval" in done.stdout and "acc1 " in done.stdout
    assert json.loads((tmp_path / "eval.json").read_text())["acc1"] > 0.8
    done = run_cli("probe", "predict", shapes, "--probe", probe, "--out", tmp_path / "p.parquet", "--top", 2)
    assert done.returncode == 0, done.stderr
    assert len(pq.read_table(tmp_path / "p.parquet")["class_name"][0]) == 2
    done = run_cli("probe", "train", shapes, "--split", 0.3, "--shots", "1,2", "--out", probe,
                   "--plot", tmp_path / "c.svg", "--classes", names)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "zero-shot" in done.stdout and "2 shots" in done.stdout
    assert "<svg" in (tmp_path / "c.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "x", "--c", "much"], "neither a number nor auto"),
        (["train", "x", "--shots", "1;2"], "1,2,4,8,16"),
        (["train", "x", "--plot", "a.png"], "belongs to --shots"),
        (["train", "x", "--shots", "1", "--balanced"], "--balanced does not apply"),
        (["train", "x", "--protocol", "clip-benchmark", "--c", "1"], "--c does not apply"),
        (["train", "x", "--shots", "1", "--plot", "a.jpg"], "end in .png"),
        (["train", "x", "--model", "demo"], "belongs to --shots"),
        (["train", "x", "--shots", "1", "--model", "demo"], "only --classes needs the model"),
        (["predict", "x", "--out", "a.csv"], ".parquet"),
    ],
)
def test_mistakes_end_in_status_2(arguments, message):
    done = run_cli("probe", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
