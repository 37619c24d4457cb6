"""Probes of rows with any number of classes, beside scikit-learn's one-vs-rest."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from conftest import CUDA
from probe_data import features, read_back, write_directory
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, precision_recall_fscore_support
from sklearn.multiclass import OneVsRestClassifier

from clipindex import evaluate_probe, few_shot_curve, read_embeddings, read_probe, train_probe
from clipindex.average_precision import BLOCK_SCORES
from clipindex.cli import commands
from clipindex.errors import ClassesError, StoreError, UsageError
from clipindex.logistic import Block, ClassLists, OneVsRest, Problem, fit
from clipindex.probing import write_predictions
from clipindex.probing.ranking import rank_classes

LISTS = {"label": "labels", "device": "cpu"}
GAPS = np.array([2, 3, 5, 7, 11, 13, 17])
"""The labels of the classes."""


def truth_of(classes, seed):
    """Each row's class, and others the more often the higher they are; the first class is rare; some rows have none."""
    rng = np.random.default_rng(seed)
    truth = rng.random((len(classes), 7)) < np.linspace(0, 0.8, 7) ** 2
    truth[np.arange(len(classes)), classes] = True
    truth[:, 0] &= rng.random(len(classes)) < 0.1
    truth[::50] = False
    return truth


def drawn(rows, seed=0, dim=32):
    x, classes = features(rows, dim=dim, seed=seed)
    return x, truth_of(classes, seed + 10)


def lists_of(truth):
    return [tuple(GAPS[row].tolist()) for row in truth]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Training and test rows; every 40th training row has a single label, and as many have none."""
    folder = tmp_path_factory.mktemp("corpus")
    x, truth = drawn(1600)
    lists = lists_of(truth)
    lists[::20] = [None if at % 2 else 3 for at in range(len(lists[::20]))]
    write_directory(folder / "train", x, lists, shards=3)
    x, truth = drawn(500, seed=5)
    write_directory(folder / "test", x, lists_of(truth))
    return folder


@pytest.fixture(scope="module")
def trained(corpus):
    return train_probe(corpus / "train", test=corpus / "test", out=corpus / "probe", **LISTS)


def listed(folder):
    """Features [n, D] and truth [n, 7] of the rows with lists, or with one label, which is a list of one."""
    x, singles = read_back(folder)
    lists = [one for batch in read_embeddings(folder, ("labels",)) for one in batch.columns["labels"].to_pylist()]
    lists = [
        [single] if one is None and single is not None else one for one, single in zip(lists, singles, strict=True)
    ]
    kept = [at for at, one in enumerate(lists) if one is not None]
    return x[kept], np.array([np.isin(GAPS, lists[at]) for at in kept])


def objective(weights, intercept, x, truth, c, balanced=False):
    """Of scikit-learn, of each class, in float64."""
    logits = x.astype(np.float64) @ np.asarray(weights, np.float64).T + np.asarray(intercept, np.float64)
    losses = np.logaddexp(0, np.where(truth, -logits, logits))
    if balanced:
        positives = truth.sum(0)
        losses = losses * np.where(truth, 0.5 / positives, 0.5 / (len(truth) - positives)) * len(truth)
    return c * losses.sum(0) + 0.5 * (np.asarray(weights, np.float64) ** 2).sum(1)


def theirs(x, truth, c, **options):
    model = LogisticRegression(C=c, max_iter=2000, tol=1e-7, solver="newton-cholesky", **options)
    return OneVsRestClassifier(model).fit(x.astype(np.float64), truth)


def problem(x, truth, *, balanced=False, at_once=300, **options):
    ends = np.concatenate([[0], np.cumsum(truth.sum(1))])
    lists = ClassLists(torch.from_numpy(ends), torch.from_numpy(np.nonzero(truth)[1]))
    rows = torch.from_numpy(x)

    def passes():
        for first in range(0, len(x), at_once):
            chosen = torch.arange(first, min(first + at_once, len(x)))
            yield Block(rows[chosen], None, chosen)

    loss = OneVsRest(lists, torch.from_numpy(truth.sum(0)), len(x), balanced=balanced)
    return Problem(passes, truth.shape[1], loss=loss, **options)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("low", [None, torch.bfloat16])
@pytest.mark.parametrize("c", [1e-4, 0.316, 30.0])
def test_the_minimum_of_each_class_is_scikit_learns(c, low, balanced):
    x, truth = drawn(900)
    found = fit(problem(x, truth, balanced=balanced, low=low), c)
    model = theirs(x, truth, c, **({"class_weight": "balanced"} if balanced else {}))
    weights, intercept = (np.concatenate([getattr(one, name) for one in model.estimators_])
                          for name in ("coef_", "intercept_"))  # fmt: skip
    best = objective(weights, intercept, x, truth, c, balanced)
    assert found.converged
    np.testing.assert_allclose(objective(found.weights, found.intercept, x, truth, c, balanced), best, rtol=2e-5)
    assert found.objective == pytest.approx(best.sum(), rel=1e-5)
    ours = x @ found.weights.numpy().T + found.intercept.numpy()
    assert ((ours > 0) == model.predict(x)).mean() > 0.999


def test_a_class_costs_the_same_alone_and_beside_others():
    x, truth = drawn(900)
    together = fit(problem(x, truth), 0.316)
    for one in range(7):
        alone = fit(problem(x, truth[:, [one]], at_once=900), 0.316)
        assert alone.passes <= together.passes
        expected = objective(alone.weights, alone.intercept, x, truth[:, [one]], 0.316)
        found = objective(together.weights[[one]], together.intercept[[one]], x, truth[:, [one]], 0.316)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_probe_is_scikit_learns(corpus, trained):
    x, truth = listed(corpus / "train")
    assert (trained.rows, trained.left_out, trained.classes) == (1560, 40, 7)
    assert (trained.protocol, trained.c, trained.features) == ("one-vs-rest", 0.316, "raw")
    assert trained.training["converged"]
    model = theirs(x, truth, 0.316)
    probe = read_probe(corpus / "probe")
    assert probe.multi_label and probe.classes == tuple(GAPS.tolist())
    weights = np.concatenate([one.coef_ for one in model.estimators_])
    intercept = np.concatenate([one.intercept_ for one in model.estimators_])
    ours, best = (objective(*linear, x, truth, 0.316).sum()
                  for linear in ((probe.weights, probe.intercept), (weights, intercept)))  # fmt: skip
    assert ours == pytest.approx(best, rel=1e-4)
    test_x, test_truth = listed(corpus / "test")
    scores = test_x @ weights.T + intercept
    expected = [average_precision_score(test_truth[:, one], scores[:, one]) for one in range(7)]
    np.testing.assert_allclose([row["average_precision"] for row in trained.test.per_class], expected, atol=0.01)
    assert trained.test.mean_average_precision == pytest.approx(np.mean(expected), abs=0.005)


def test_rows_that_are_read_in_each_pass_give_the_same(corpus, trained, tmp_path):
    streamed = train_probe(corpus / "train", test=corpus / "test", memory_bytes=1, out=tmp_path, **LISTS)
    assert (trained.training["in_memory"], streamed.training["in_memory"]) == (True, False)
    assert streamed.training["objective"] == pytest.approx(trained.training["objective"], rel=1e-5)


def test_evaluation_is_scikit_learns(corpus, trained):
    probe = read_probe(corpus / "probe")
    told = []
    found = evaluate_probe(corpus / "test", probe, device="cpu", on_progress=lambda *one: told.append(one))
    assert found == trained.test
    assert told[-1] == (1500, 1500)
    assert {total for _, total in told} == {1500} and (1000, 1500) in told
    assert told == sorted(told)
    assert json.loads((corpus / "probe" / "probe.json").read_text())["metrics"]["source"] == str(corpus / "test")
    x, truth = listed(corpus / "test")
    logits = torch.from_numpy(x) @ probe.weights.T + probe.intercept
    chosen = (logits > 0).numpy()
    expected = precision_recall_fscore_support(truth, chosen, zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        np.testing.assert_allclose([row[name] or 0 for row in found.per_class], values, err_msg=name)
    probabilities = torch.sigmoid(logits).numpy().ravel()
    share, mean = calibration_curve(truth.ravel(), probabilities, n_bins=15)
    np.testing.assert_allclose([one["positives"] for one in found.calibration], share, atol=1e-6)
    np.testing.assert_allclose([one["probability"] for one in found.calibration], mean, atol=1e-6)
    assert sum(one["decisions"] for one in found.calibration) == truth.size
    assert 0 < found.calibration_error < 0.1


def test_few_scores_are_in_hand_however_large_blocks_are():
    x, truth = drawn(900)
    ends = torch.from_numpy(np.concatenate([[0], np.cumsum(truth.sum(1))]))
    lists = ClassLists(ends, torch.from_numpy(np.nonzero(truth)[1]))
    block = Block(torch.from_numpy(x), torch.ones(len(x)), torch.arange(len(x)))
    num_classes = BLOCK_SCORES // 250
    linear = (torch.zeros(num_classes, x.shape[1]), torch.zeros(num_classes))
    linear[0][:7] = torch.from_numpy(np.random.default_rng(0).normal(size=(7, x.shape[1])).astype(np.float32))
    told = []
    found = rank_classes(lambda: [block], lists, linear, told.append)
    assert told == [250, 500, 750, 900, 1150, 1400, 1650, 1800]
    scores = x @ linear[0][:7].numpy().T
    expected = [average_precision_score(truth[:, one], scores[:, one]) for one in range(7)]
    np.testing.assert_allclose(found.per_class()[:7], expected, atol=1e-4)


def test_predictions_have_probabilities_of_their_own(corpus, trained, tmp_path):
    probe = read_probe(corpus / "probe")
    assert write_predictions(corpus / "train", probe, tmp_path / "p.parquet", top=3, device="cpu") == 1600
    table = pq.read_table(tmp_path / "p.parquet")
    x, _ = read_back(corpus / "train")
    best = torch.topk(torch.sigmoid(torch.from_numpy(x) @ probe.weights.T + probe.intercept), 3)
    assert table["class_label"].to_pylist() == GAPS[best.indices.numpy()].tolist()
    np.testing.assert_allclose(table["probability"].to_pylist(), best.values, atol=1e-5)
    assert max(map(sum, table["probability"].to_pylist())) > 1.2
    lists = list(map(list, lists_of(drawn(1600)[1])))
    lists[::40], lists[20::40] = [[3]] * 40, [None] * 40
    assert table["labels"].to_pylist() == lists


def test_held_out_rows_are_drawn_whatever_their_classes(corpus, tmp_path):
    one, again, other = (
        train_probe(corpus / "train", held_out=0.25, seed=seed, out=tmp_path, **LISTS) for seed in (0, 0, 1)
    )
    assert (one.rows, one.test.labelled) == (1170, 390)
    assert one.test == again.test != other.test


def test_c_is_searched_by_average_precision(corpus, trained, tmp_path):
    found = train_probe(corpus / "train", test=corpus / "test", c=None, out=tmp_path, **LISTS)
    trials = found.training["search"]["trials"]
    assert 1 / found.c == pytest.approx(
        max(trials, key=lambda one: (one["mean_average_precision"], one["strength"]))["strength"]
    )
    assert found.training["validation_rows"] == 312
    assert found.test.mean_average_precision >= trained.test.mean_average_precision - 0.02
    assert found.protocol == "one-vs-rest" and found.training["converged"]


def test_balanced_classes_help_the_rare_one(corpus, trained, tmp_path):
    found = train_probe(corpus / "train", test=corpus / "test", balanced=True, out=tmp_path, **LISTS)
    assert found.test.per_class[0]["recall"] > trained.test.per_class[0]["recall"]


@pytest.mark.parametrize("c", [0.316, None])
def test_classes_of_all_rows_or_of_none_have_one_probability(tmp_path, c):
    x, truth = drawn(400)
    truth[:, 3] = True
    truth[:, 5] = np.arange(400) % 2 == 0
    write_directory(tmp_path / "d", x, lists_of(truth))
    write_directory(tmp_path / "odd", x[1::2], lists_of(truth[1::2]), shards=1)
    found = train_probe(tmp_path / "odd", test=tmp_path / "d", c=c, out=tmp_path / "p", **LISTS)
    assert found.training["constant_classes"] == [7]
    assert found.test.unseen == {13: 200}
    at = {row["label"]: row for row in found.test.per_class}
    assert (at[7]["average_precision"], at[7]["recall"]) == (1, 1)
    assert (at[13]["average_precision"], at[13]["support"], at[13]["recall"]) == (0, 200, 0)
    assert found.test.mean_average_precision == pytest.approx(
        np.mean([row["average_precision"] for row in found.test.per_class])
    )
    probe = read_probe(tmp_path / "p")
    place = probe.classes.index(7)
    assert not probe.weights[place].any()
    assert torch.sigmoid(probe.intercept[place]) == pytest.approx(200.5 / 201)


def test_what_makes_no_probe_is_said(corpus, tmp_path):
    x, y = features(60)
    write_directory(tmp_path / "single", x, y)
    with pytest.raises(ClassesError, match="none of 60 rows has a list of labels"):
        train_probe(tmp_path / "single", **LISTS)
    write_directory(tmp_path / "empty", x, [()] * 60)
    with pytest.raises(ClassesError, match="all lists of labels are empty"):
        train_probe(tmp_path / "empty", **LISTS)
    write_directory(tmp_path / "same", x, [(4, 5)] * 60)
    with pytest.raises(ClassesError, match="there is nothing to tell apart"):
        train_probe(tmp_path / "same", **LISTS)
    write_directory(tmp_path / "few", x[:2], [(4,), (5,)])
    with pytest.raises(ClassesError, match="2 rows are too few to hold 0.1 of them out"):
        train_probe(tmp_path / "few", held_out=0.1, **LISTS)
    with pytest.raises(ClassesError, match="label 2 has no name"):
        train_probe(corpus / "train", names=["a", "b"], **LISTS)
    with pytest.raises(ClassesError, match="none of 60 rows has a list"):
        train_probe(corpus / "train", test=tmp_path / "single", out=tmp_path / "p", **LISTS)
    with pytest.raises(UsageError, match="rows of one class only"):
        train_probe(corpus / "train", protocol="clip-benchmark", **LISTS)
    with pytest.raises(UsageError, match="leave shots out"):
        few_shot_curve(corpus / "train", [1], held_out=0.2, **LISTS)


def test_what_is_of_one_class_a_row_says_so_of_lists(corpus, tmp_path):
    x, y = features(60)
    write_directory(tmp_path / "single", x, y)
    train_probe(tmp_path / "single", device="cpu")
    probe = read_probe(tmp_path / "single" / "probe")
    for name, labels in (("lists", [(4, 5), (5,)] * 30), ("none", [None] * 60)):
        write_directory(tmp_path / name, x, labels)
    with pytest.raises(ClassesError, match="lists: the rows have lists of labels, and the probe is of one class a row"):
        evaluate_probe(tmp_path / "lists", probe, device="cpu")
    with pytest.raises(ClassesError, match="none: no row has a label to measure a probe by") as raised:
        evaluate_probe(tmp_path / "none", probe, device="cpu")
    assert "--label" not in str(raised.value)
    with pytest.raises(ClassesError, match="lists of labels are asked for by --label labels"):
        train_probe(tmp_path / "lists", device="cpu")
    # Rows of both kinds are measured by those that have a label.
    assert evaluate_probe(corpus / "train", probe, device="cpu").labelled == 40
    write_directory(tmp_path / "again", x, [(4, 5), (5,)] * 30)
    write_directory(tmp_path / "other", x, y)
    for options in (["lists", "again"], ["single", "other", "--test", "lists", "--test", "again"]):
        arguments = [one if one.startswith("--") else str(tmp_path / one) for one in options]
        done = CliRunner().invoke(commands, ["compare", *arguments, "--out", str(tmp_path / "c")])
        assert isinstance(done.exception, ClassesError)
        assert "again: the rows have lists of labels, and compare knows rows of one class only" in str(done.exception)


def test_single_labels_count_as_lists_only_beside_lists_and_negative_ones_never(corpus, tmp_path):
    x, truth = drawn(400)
    lists = lists_of(truth)
    alone = [one[0] if len(one) == 1 else one for one in lists]
    assert 20 < sum(isinstance(one, int) for one in alone) < 380
    write_directory(tmp_path / "lists", x, lists)
    write_directory(tmp_path / "mixed", x, alone)
    one, other = (train_probe(tmp_path / name, test=corpus / "test", **LISTS) for name in ("lists", "mixed"))
    assert (one.rows, one.left_out, one.test) == (other.rows, other.left_out, other.test) == (400, 0, one.test)
    probe = read_probe(tmp_path / "mixed" / "probe")
    assert evaluate_probe(tmp_path / "mixed", probe, device="cpu") == evaluate_probe(
        tmp_path / "lists", probe, device="cpu"
    )
    write_directory(tmp_path / "negative", x, [-1 if isinstance(label, int) else label for label in alone])
    found = train_probe(tmp_path / "negative", **LISTS)
    assert found.left_out == sum(isinstance(label, int) for label in alone)
    # One shard has all the lists, another all the single labels.
    write_directory(tmp_path / "apart", x, [*lists[:200], *[3, 5] * 100])
    assert train_probe(tmp_path / "apart", **LISTS).left_out == 0


def test_probe_files_say_what_they_are(corpus, trained, tmp_path):
    document = json.loads((corpus / "probe" / "probe.json").read_text())
    assert document["multi_label"] is True
    (tmp_path / "probe.safetensors").write_bytes((corpus / "probe" / "probe.safetensors").read_bytes())
    (tmp_path / "probe.json").write_text(json.dumps({**document, "multi_label": "no"}))
    with pytest.raises(StoreError, match="neither true nor false"):
        read_probe(tmp_path)
    del document["multi_label"]  # as of before there were such probes
    (tmp_path / "probe.json").write_text(json.dumps(document))
    assert read_probe(tmp_path).multi_label is False


def test_the_commands(corpus, tmp_path):
    def clipindex(*arguments):
        done = CliRunner().invoke(commands, ["probe", *map(str, arguments)])
        assert done.exit_code == 0, done.output
        return done.stdout

    (tmp_path / "names.txt").write_text("".join(f"thing {at}\n" for at in range(18)))
    out = clipindex("train", corpus / "train", "--label", "labels", "--split", 0.2, "--out", tmp_path / "p",
                    "--classes", tmp_path / "names.txt")  # fmt: skip
    assert "of DIR (of its rows, with --label labels)" in " ".join(clipindex("train", "--help").split())
    assert "one-vs-rest, C 0.316" in out and "mAP " in out and "thing 17" in out
    found = json.loads(clipindex("eval", corpus / "test", "--probe", tmp_path / "p", "--json"))
    assert 0.3 < found["mean_average_precision"] < 1
    clipindex("predict", corpus / "test", "--probe", tmp_path / "p", "--out", tmp_path / "p.parquet", "--top", 2)
    assert pq.read_table(tmp_path / "p.parquet")["class_name"][0][0].as_py().startswith("thing ")


def test_of_many_classes_both_ends_are_shown(tmp_path):
    x, _ = features(300)
    write_directory(tmp_path / "d", x, [(at % 24,) for at in range(300)])
    arguments = ["train", tmp_path / "d", "--label", "labels", "--split", 0.5, "--device", "cpu"]
    done = CliRunner().invoke(commands, ["probe", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    shown = done.stdout.splitlines()
    assert (len([line for line in shown if "  label " in line]), "  … 4 more" in shown) == (20, True)


@pytest.mark.cuda
def test_a_gpu_finds_the_same(corpus, trained, tmp_path):
    found = train_probe(corpus / "train", test=corpus / "test", label="labels", out=tmp_path, device=CUDA)
    assert found.training["objective"] == pytest.approx(trained.training["objective"], rel=1e-5)
    assert found.test.mean_average_precision == pytest.approx(trained.test.mean_average_precision, abs=1e-3)
    searched = train_probe(corpus / "train", c=None, label="labels", out=tmp_path, device=CUDA)
    assert searched.training["converged"]
