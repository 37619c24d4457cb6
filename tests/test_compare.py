import json
import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from command_line import run_cli
from conftest import CUDA
from probe_data import features, model, write_directory
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression

from clipindex import compare_encoders, embed, train_probe
from clipindex.demo import DATA
from clipindex.errors import ClassesError, FingerprintError, ModelError, StoreError, UsageError
from clipindex.metrics import mcnemar
from clipindex.types import ModelSpec

CPU = {"device": "cpu"}
QUICK = {**CPU, "shots": [], "seeds": 1}
NAMES = DATA / "wds_shapes" / "classnames.txt"


def write(folder, raw, labels, keys=None, shards=2):
    """A directory of a model of its own for each number of dimensions."""
    keys = [f"k{row:04}" for row in range(len(raw))] if keys is None else keys
    return write_directory(folder, raw, labels, keys, info=model(raw.shape[1], seed=raw.shape[1]), shards=shards)


def projected(raw, dim, seed=0):
    return (raw @ np.linalg.qr(np.random.default_rng(seed).normal(size=(raw.shape[1], dim)))[0]).astype(np.float32)


@pytest.fixture(scope="module")
def data():
    """Features of a good encoder [1500, 32], of a worse one [1500, 10], and labels with a gap."""
    raw, classes = features(1500, noise=0.05)
    return raw, projected(raw, 10), np.where(classes == 6, 9, classes)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, data):
    """Two encoders' directories, and those of other rows to test on."""
    folder = tmp_path_factory.mktemp("pair")
    good, worse, labels = data
    for name, rows in [("", slice(0, 1000)), ("_test", slice(1000, 1500))]:
        write(folder / f"good{name}", good[rows], labels[rows])
        write(folder / f"worse{name}", worse[rows], labels[rows])
    return folder


@pytest.fixture(scope="module")
def found(pair):
    return compare_encoders([pair / "good", pair / "worse"], shots=[16, 2, 1], out=pair / "out", **CPU)


def without_seconds(comparison):
    """What each encoder got, by its model."""
    return {one.fingerprint: (one.few_shot, one.probe, one.zero_shot) for one in comparison.encoders}


def test_two_encoders_on_the_same_rows(pair, found):
    good, worse = found.encoders
    assert (good.dim, worse.dim) == (32, 10)
    assert good.name == "synthetic random 32"
    assert (found.classes, found.training_rows + found.test_rows, found.joined_by) == (7, 1000, "key")
    assert [point.shots for point in good.few_shot] == [1, 2, 16]
    assert good.few_shot[2].mean > good.few_shot[0].mean
    assert good.probe.accuracy.acc1 > worse.probe.accuracy.acc1 + 0.05
    assert found.best == str(pair / "good") and good.against_best is None
    low, high = good.probe.accuracy.interval
    assert low < good.probe.accuracy.acc1 < high
    lost = worse.against_best
    assert lost.only_best - lost.only_this == round(
        (good.probe.accuracy.acc1 - worse.probe.accuracy.acc1) * found.test_rows
    )
    assert lost.p == pytest.approx(binomtest(lost.only_this, lost.only_best + lost.only_this).pvalue)
    document = json.loads((pair / "out" / "compare.json").read_text())
    assert document["encoders"][0]["few_shot"][2]["mean"] == good.few_shot[2].mean
    assert document["encoders"][1]["no_zero_shot"] == "no class names were given"


@pytest.mark.cuda
def test_a_gpu_compares_them_alike(pair, found, tmp_path):
    there = compare_encoders([pair / "good", pair / "worse"], shots=[16, 2, 1], out=tmp_path, device=CUDA)
    for one, other in zip(found.encoders, there.encoders, strict=True):
        # Sums in another order move a row or two across the border of two classes.
        assert other.probe.accuracy.acc1 == pytest.approx(one.probe.accuracy.acc1, abs=2 / found.test_rows)
        means = [[point.mean for point in encoder.few_shot] for encoder in (one, other)]
        assert means[1] == pytest.approx(means[0], abs=2 / found.test_rows)


def test_neither_the_order_of_rows_nor_shards_nor_directories_changes_anything(tmp_path, data, pair, found):
    good, worse, labels = data
    rows = np.random.default_rng(3).permutation(1000)
    write(tmp_path / "good", good[:1000], labels, shards={"b": rows[:300], "a": rows[300:310], "c": rows[310:]})
    for folders in ([tmp_path / "good", pair / "worse"], [pair / "worse", tmp_path / "good"]):
        again = compare_encoders(folders, shots=[1, 2, 16], out=tmp_path / "out", **CPU)
        assert without_seconds(again) == without_seconds(found)
        assert again.best == str(tmp_path / "good")
    assert again.encoders[0].against_best == found.encoders[1].against_best


def test_rows_that_do_not_fit_into_memory_give_the_same(tmp_path, data, found):
    good, worse, labels = data
    rows = np.random.default_rng(4).permutation(1000)
    shards = {"b": rows[:300], "a": rows[300:]}
    write(tmp_path / "good", good[:1000], labels, shards=shards)
    write(tmp_path / "worse", worse[:1000], labels)
    read = compare_encoders(
        [tmp_path / "good", tmp_path / "worse"], shots=[1, 2, 16], memory_bytes=1, out=tmp_path / "out", **CPU
    )
    for one, held in zip(read.encoders, found.encoders, strict=True):
        assert (one.probe.in_memory, held.probe.in_memory) == (False, True)
        assert one.few_shot == held.few_shot
        assert abs(one.probe.accuracy.acc1 - held.probe.accuracy.acc1) <= 1 / found.test_rows
    # Were the rows of the two told apart by their places, many more would seem to differ.
    assert abs(read.encoders[1].against_best.only_this - found.encoders[1].against_best.only_this) <= 2


@pytest.mark.parametrize("c", [0.316, None])
def test_tested_on_other_directories_it_is_the_probe_of_probe_train(pair, tmp_path, c):
    tests = [pair / "good_test", pair / "worse_test"]
    both = compare_encoders([pair / "good", pair / "worse"], tests=tests, c=c, out=tmp_path / "out", **QUICK)
    assert (both.training_rows, both.test_rows) == (1000, 500)
    assert [side.folder for side in both.sides[2:]] == [str(test) for test in tests]
    for one, test in zip(both.encoders, tests, strict=True):
        alone = train_probe(one.folder, test=test, c=c, out=tmp_path / "probe", **CPU)
        assert one.probe.accuracy.acc1 == pytest.approx(alone.test.acc1, abs=2 / 500)
        assert one.probe.c == alone.c


def test_what_not_all_have_is_left_out_and_named(tmp_path, data, caplog):
    good, worse, labels = data
    of_bad = [None if row % 4 else label for row, label in enumerate(labels[:400])]  # known from the others
    of_all = [None if row == 17 else label for row, label in enumerate(labels[:400])]
    write(tmp_path / "a", good[:400], of_all)
    write(tmp_path / "b", worse[100:400], of_all[100:400], [f"k{row:04}" for row in range(100, 400)])
    write(tmp_path / "c", projected(good, 12)[:390], of_bad, shards={"x": np.arange(389, -1, -1)})
    found = compare_encoders([tmp_path / one for one in "abc"], out=tmp_path / "out", **QUICK)
    assert found.training_rows + found.test_rows == 290
    a, b, c = found.sides
    assert (a.rows, a.beyond, a.beyond_keys[:2], a.lacking) == (400, 110, ("k0000", "k0001"), 0)
    assert (b.rows, b.beyond, b.lacking, b.lacking_keys[0]) == (300, 10, 100, "k0000")
    assert (c.rows, c.beyond, c.lacking, c.lacking_keys) == (390, 100, 10, tuple(f"k{at:04}" for at in range(390, 395)))
    assert (a.labels_lacking, b.labels_lacking) == (0, 0)
    assert c.labels_lacking == sum(label is None for label in of_bad[100:390])
    assert f"{tmp_path}/b: 100 rows of other directories are not in it, and left out: k0000, k0001" in caplog.text
    assert f"{tmp_path}/c: 100 of its 390 rows are not in every directory" in caplog.text
    # The same as of directories that never had more.
    for name, raw in [("a", good), ("b", worse), ("c", projected(good, 12))]:
        keys = [f"k{row:04}" for row in range(100, 390)]
        write(tmp_path / f"{name}-exact", raw[100:390], labels[100:390], keys)
    exact = compare_encoders([tmp_path / f"{one}-exact" for one in "abc"], out=tmp_path / "out", **QUICK)
    assert without_seconds(exact) == without_seconds(found)


def test_rows_without_any_label_are_left_out(tmp_path, data):
    good, worse, labels = data
    some = [None if row < 30 else label for row, label in enumerate(labels[:300])]
    write(tmp_path / "a", good[:300], some)
    write(tmp_path / "b", worse[:300], some)
    found = compare_encoders([tmp_path / "a", tmp_path / "b"], out=tmp_path / "out", **QUICK)
    assert (found.unlabelled, found.training_rows + found.test_rows) == (30, 270)
    write(tmp_path / "c", good[:300], [None] * 300)
    write(tmp_path / "d", worse[:300], [None] * 300)
    with pytest.raises(ClassesError, match="none of the 300 rows"):
        compare_encoders([tmp_path / "c", tmp_path / "d"], out=tmp_path / "out", **QUICK)


def test_keys_that_come_twice_are_joined_by_shard(tmp_path, data):
    good, worse, labels = data
    keys = [f"{row % 200}" for row in range(400)]
    shards = {"s0": np.arange(200), "s1": np.arange(200, 400)}
    turned = {"s0": np.arange(199, -1, -1), "s1": np.arange(200, 400)}
    write(tmp_path / "a", good[:400], labels, keys, shards=shards)
    write(tmp_path / "b", worse[:400], labels, keys, shards=turned)
    found = compare_encoders([tmp_path / "a", tmp_path / "b"], out=tmp_path / "out", **QUICK)
    assert (found.joined_by, found.training_rows + found.test_rows) == ("shard and key", 400)
    write(tmp_path / "c", worse[:400], labels, keys, shards={"t0": shards["s0"], "t1": shards["s1"]})
    with pytest.raises(StoreError, match=r"no row is in all of 2.*/a has key '0' in shards s0 and s1"):
        compare_encoders([tmp_path / "a", tmp_path / "c"], out=tmp_path / "out", **QUICK)
    write(tmp_path / "d", worse[:400], labels, keys, shards={"s": np.arange(400)})
    with pytest.raises(StoreError, match=r"/d has key '0' in shard s twice"):
        compare_encoders([tmp_path / "a", tmp_path / "d"], out=tmp_path / "out", **QUICK)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.json"]


def test_labels_that_differ_and_directories_that_do_not_fit_are_said(tmp_path, data, pair):
    good, worse, labels = data
    other = labels.copy()
    other[[5, 7]] = 4 - other[[5, 7]] % 2
    write(tmp_path / "other", worse[:300], other)
    with pytest.raises(ClassesError, match=rf"'k0005' has label {labels[5]} in .*good and .* in .*other \(and 1 more"):
        compare_encoders([pair / "good", tmp_path / "other"], out=tmp_path, **QUICK)
    write(tmp_path / "away", worse[:9], labels, [f"away{row}" for row in range(9)])
    with pytest.raises(StoreError, match=r"no row is in all of 2 directories: .*'k0000'.*'away0'"):
        compare_encoders([pair / "good", tmp_path / "away"], out=tmp_path, **QUICK)
    with pytest.raises(FingerprintError, match="seed 10"):
        compare_encoders(
            [pair / "good", pair / "worse"], tests=[pair / "worse_test", pair / "good_test"], out=tmp_path, **QUICK
        )
    with pytest.raises(ClassesError, match="fewer than 500 shots need"):
        compare_encoders([pair / "good", pair / "worse"], shots=[1, 500], out=tmp_path, **CPU)
    with pytest.raises(StoreError, match="is no embedding directory"):
        compare_encoders([pair / "good", pair / "nowhere"], out=tmp_path, **QUICK)


def test_too_few_rows_for_a_search_are_said_before_any_probe(tmp_path, data):
    good, worse, labels = data
    few = np.concatenate([np.flatnonzero(labels == label)[:2] for label in np.unique(labels)])
    paths = [write(tmp_path / "good", good[few], labels[few]), write(tmp_path / "worse", worse[few], labels[few])]
    tests = [write(tmp_path / "t0", good[:99], labels[:99]), write(tmp_path / "t1", worse[:99], labels[:99])]
    notes = []
    with pytest.raises(ClassesError, match="14 rows of 7 classes are too few to hold 0.2 of each class out"):
        compare_encoders(
            paths, tests=tests, c=None, shots=[1], out=tmp_path, on_progress=lambda *note: notes.append(note[2]), **CPU
        )
    assert notes == ["reading keys and labels"]


def test_what_contradicts_itself_is_said(pair, tmp_path):
    both = [pair / "good", pair / "worse"]
    for folders, options, message in [
        (both[:1], {}, "two or more"),
        ([*both, pair / "good" / ".." / "good"], {}, "given twice"),
        (both, {"tests": both[:1]}, "2 directories to compare and 1 to test on"),
        (both, {"tests": [pair / "good_test", pair / "worse_test"], "held_out": 0.2}, "not both"),
        (both, {"tests": [both[1], pair / "good_test"]}, "worse is learned from, so testing on it says nothing"),
        (both, {"pre_projection": True}, "no directory holds features before a projection"),
        (both, {"projected": True}, "--projected goes with --pre-projection"),
        (both, {"held_out": 1.0}, "above 0 and below 1"),
        (both, {"c": -1.0}, "positive"),
        (both, {"features": "x"}, "raw or normalized"),
        (both, {"shots": [0]}, "at least 1"),
        (both, {"names": [str(at) for at in range(10)], "models": {"x": "demo"}}, "none of the directories"),
    ]:
        with pytest.raises(UsageError, match=message):
            compare_encoders(folders, **{**QUICK, "out": tmp_path, **options})
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The demo model's embeddings, and another encoder's of the same images whose weights nobody has."""
    folder = tmp_path_factory.mktemp("shapes")
    embed(str(DATA / "wds_shapes"), folder / "demo", model="demo", batch_size=64, device="cpu", precision="fp32")
    from clipindex import read_embeddings

    batches = list(read_embeddings(folder / "demo", ("key", "label")))
    raw = projected(np.concatenate([batch.embedding for batch in batches]).astype(np.float32), 6)
    keys = [key for batch in batches for key in batch.columns["key"].to_pylist()]
    labels = [label for batch in batches for label in batch.columns["label"].to_pylist()]
    write(folder / "lost", raw, labels, keys)
    return folder


def test_zero_shot_beside_probes(shapes, tmp_path):
    from clipindex import classify

    both = [shapes / "demo", Path(shutil.copytree(shapes / "demo", tmp_path / "half"))]
    tests = [Path(shutil.copytree(shapes / "demo", tmp_path / name)) for name in ("t0", "t1")]
    names = [*NAMES.read_text().splitlines(), "a shape", "a red thing", "a circle"]  # no row has the last ones
    found = compare_encoders(both, tests=tests, names=names, shots=[1, 2], out=tmp_path / "out", **CPU)
    zero = classify(shapes / "demo", classes=names, out=tmp_path / "c", device="cpu")
    assert found.encoders[0].zero_shot.acc1 == pytest.approx(zero.acc1)
    assert found.encoders[0].zero_shot.acc5 == pytest.approx(zero.acc5)
    assert found.encoders[0].zero_shot.mean_per_class_recall == pytest.approx(zero.mean_per_class_recall)
    assert found.encoders[1].name == f"demo ({tmp_path}/half)"  # one model: its directory's name tells
    assert found.templates == 1


def test_a_model_that_cannot_be_loaded_is_named_before_any_probe(shapes, tmp_path):
    both = [shapes / "demo", shapes / "lost"]
    notes = []
    with pytest.raises(ModelError, match=r"lost: zero-shot needs its model, synthetic.*--model .*lost MODEL"):
        compare_encoders(
            both, names=NAMES, shots=[1], out=tmp_path, on_progress=lambda *note: notes.append(note), **CPU
        )
    assert not any("shots" in note for _, _, note in notes)
    with pytest.raises(FingerprintError, match="lost holds embeddings of synthetic"):
        compare_encoders(both, names=NAMES, shots=[1], models={both[1]: ModelSpec(name="demo")}, out=tmp_path, **CPU)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (3, 9), (9, 3), (7, 7), (40, 61), (5000, 5200)])
def test_mcnemar_is_the_binomial_test(first, second):
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)


def test_accuracies_are_those_of_scikit_learn_on_the_rows_that_were_drawn(data, pair, tmp_path):
    found = compare_encoders([pair / "good", pair / "worse"], held_out=0.3, out=tmp_path, **QUICK)
    from clipindex.probing.rows import split

    good, worse, labels = data
    ids = np.unique(labels[:1000], return_inverse=True)[1]
    training, test = split(ids, 0.3, 0)  # keys are in the order of rows
    right = []
    for one, raw in zip(found.encoders, (good, worse), strict=True):
        theirs = LogisticRegression(C=0.316, max_iter=5000, tol=1e-6).fit(raw[training], ids[training])
        right.append(theirs.predict(raw[test]) == ids[test])
        assert one.probe.accuracy.acc1 == pytest.approx(right[-1].mean(), abs=2.5 / len(test))
    pairs = found.encoders[1].against_best
    assert abs(pairs.only_best - (right[0] & ~right[1]).sum()) <= 2
    assert abs(pairs.only_this - (right[1] & ~right[0]).sum()) <= 2


@pytest.mark.parametrize(("number", "status", "said"), [(signal.SIGINT, 130, "interrupted"),
                                                        (signal.SIGTERM, 143, "terminated")])  # fmt: skip
def test_stopped_it_has_kept_nothing_and_says_so(pair, tmp_path, number, status, said):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = threading.Timer(1, os.kill, (os.getpid(), number))
    stop.start()
    try:
        done = run(pair / "good", pair / "worse", "--seeds", 1000, "--device", "cpu", "--out", tmp_path / "out")
    finally:
        stop.cancel()
    assert (done.returncode, done.stderr.splitlines()[-1]) == (status, f"{said}: run again to start over")
    assert not (tmp_path / "out").exists()


def run(*arguments):
    """The command in this process, which has imported all that is slow."""
    return run_cli("compare", *arguments)


def test_the_command(shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shapes / "demo", "again")
    done = run(shapes / "demo", "again", "--shots", "1,2", "--classes", NAMES, "--model", "again", "demo",
               "--plot", "c.svg", "--device", "cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()
    assert "20 classes, joined by key" in head and head.endswith("-> compare")
    assert rows[0].split()[:5] == ["directory", "model", "probed", "D", "zero-shot"]
    assert rows[2].split()[:5] == ["again", "demo", "projected", "64", "100.00%*"]
    assert "McNemar" in rows[3] and "only demo (again) on 0" in rows[3]
    assert "<svg" in Path("c.svg").read_text()
    assert json.loads(Path("compare/compare.json").read_text())["seeds"] == [0, 1, 2]


def test_the_command_with_test_directories_and_json(pair, tmp_path):
    tests = ["--test", pair / "good_test", "--test", pair / "worse_test"]
    options = ["--shots", "none", "--c", "auto", "--out", tmp_path / "out", "--device", "cpu", "--json"]
    done = run(pair / "good", pair / "worse", *tests, *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["test_rows"] == 500 and not found["encoders"][0]["few_shot"]
    assert (tmp_path / "out" / "compare.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--shots", "1;2"], "1,2,4,8,16"),
        (["x", "y", "--plot", "a.jpg"], "end in .png"),
        (["x", "y", "--shots", "none", "--seeds", "2"], "--seeds does not apply"),
        (["x", "y", "--model", "x", "demo"], "only --classes needs the model"),
        (["x", "y", "--templates", "simple"], "only --classes needs the model"),
    ],
)
def test_mistakes_end_in_status_2(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
