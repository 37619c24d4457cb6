"""Accuracy over the number of training rows a class, beside that without any."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from clipindex.atomic import write_json
from clipindex.errors import ClassesError, UsageError
from clipindex.logistic import Linear, block_rows
from clipindex.probing.evaluation import count
from clipindex.probing.lists import LISTS_COLUMN
from clipindex.probing.protocols import README_C, Setting, check_c, fit_at
from clipindex.probing.rows import Ids, Rows, random_ranks
from clipindex.probing.task import Task, TestRows, pose_task, read_names
from clipindex.probing.zero_shot import zero_shot_linear
from clipindex.prompts import read_templates
from clipindex.store import read_dataset
from clipindex.types import ModelSpec

CURVE_FILE = "few_shot.json"
MOST_VALIDATION_SHOTS = 4
"""Rows a class that a search validates on, or as many as it trains on: as CoOp (Zhou et al. 2022, arXiv:2109.01134)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShotPoint:
    """A number of training rows a class, drawn with several seeds."""

    shots: int
    acc1: tuple[float, ...]
    """For each seed."""
    mean: float
    deviation: float
    """Sample standard deviation over seeds; 0 for one."""
    c: tuple[float, ...]
    """For each seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShotCurve:
    """What few_shot.json holds."""

    out: str
    model: str
    features: str
    vectors: str
    """'projected', 'pre-projection' or 'pooled'; see `types.ModelInfo`."""
    classes: int
    test: str
    """Where the rows are from that were measured."""
    test_rows: int
    seeds: tuple[int, ...]
    points: tuple[FewShotPoint, ...]
    zero_shot: float | None
    """acc1 of the class names' prompts; None without names."""
    templates: int
    """Prompts a class, of zero_shot."""
    seconds: float


def few_shot_curve(
    folder: str | Path,
    shots: Sequence[int],
    *,
    seeds: int = 3,
    seed: int = 0,
    label: str = "label",
    c: float | None = README_C,
    features: str = "raw",
    pre_projection: bool = False,
    test: str | Path | None = None,
    held_out: float | None = None,
    names: str | Path | Sequence[str] | None = None,
    templates: str = "simple",
    model: ModelSpec | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    on_progress: Callable[[str], None] = lambda note: None,
) -> FewShotCurve:
    """Train probes on few rows of each class, and measure all of them in one pass over the test rows.

    The rows of a seed's smaller numbers are among those of its larger ones. The process's memory allocator is tuned;
    see `allocator.share_one_arena`.

    Args:
        folder: The embedding directory.
        shots: Rows a class.
        seeds: How many draws.
        seed: The first one's.
        label: The column of labels.
        c: scikit-learn's C; None to search it, validating on up to four other rows a class, which are not trained on.
        features: 'raw' or 'normalized'.
        pre_projection: As in `train.train_probe`.
        test: Another directory of the same model.
        held_out: Or a fraction of each class of this one.
        names: Class names, for zero-shot accuracy among all of them.
        templates: Its prompts, as in `zeroshot.classify`.
        model: How to load the model for them, where the directory's record does not lead to its weights.
        out: Where few_shot.json and few_shot.png go; `folder`/probe by default.
        device: 'auto', 'cpu', 'cuda' or 'cuda:N'.
        precision: Of the text tower.
        on_progress: Called now and then with what is being done.

    Raises:
        UsageError: Options contradict each other.
        ClassesError: A class has too few rows, or labels or names cannot define a probe.
        FingerprintError: The model or the test rows are not those of the directory.
        StoreError: A file is damaged.
    """
    started = time.perf_counter()
    _check_options(shots, seeds, label, c, has_test=test is not None or held_out is not None)
    prompts, known = read_templates(templates), None if names is None else read_names(names)
    task = pose_task(
        folder,
        label=label,
        features=features,
        test=test,
        held_out=held_out,
        seed=seed,
        names=known,
        device=device,
        pre_projection=pre_projection,
        out=out,
    )
    assert task.test is not None
    shots, draws = sorted(set(shots)), tuple(range(seed, seed + seeds))
    class_ids = task.rows.class_ids[task.training]
    count_drawn(class_ids, task.classes, shots, c)
    texts: Linear | None = None
    if known is not None:  # before anything is learned, since there may be no model, or none that knows texts
        info, labels = read_dataset(task.folder).model, [*task.classes, *task.test.unseen]
        texts = zero_shot_linear(task.folder, info, known, labels, prompts, model, precision, task.device)
    linears, strengths = fit_shots(
        task.rows, task.training, class_ids, task.classes, shots, draws, c, task.device, on_progress
    )
    on_progress("testing")
    found, test_rows = _accuracies(task, task.test, linears)
    zero_shot = None if texts is None else _zero_shot(task, task.test, texts)
    points = few_shot_points(shots, found, strengths)
    curve = _summarise(task, task.test, test_rows, draws, points, zero_shot, len(prompts), started)
    write_json(task.out / CURVE_FILE, asdict(curve))
    return curve


def _check_options(shots: Sequence[int], seeds: int, label: str, c: float | None, *, has_test: bool) -> None:
    check_c(c)
    if not has_test:
        raise UsageError("a few-shot curve needs rows to test on: another directory, or a fraction to hold out")
    if not shots or min(shots) < 1 or seeds < 1:
        raise UsageError("give at least one seed and numbers of shots of at least 1")
    if label == LISTS_COLUMN:
        raise UsageError("shots are rows of one class each, and rows of 'labels' have any number: leave shots out")


def count_drawn(class_ids: Ids, classes: Sequence[int], shots: Sequence[int], c: float | None) -> int:
    """Rows of each class that the most shots need, with those to validate on where C is searched.

    Raises:
        ClassesError: A class has fewer.
    """
    most = shots[-1] + (min(shots[-1], MOST_VALIDATION_SHOTS) if c is None else 0)
    counts = np.bincount(class_ids, minlength=len(classes))
    if counts.min() < most:
        scarce = int(counts.argmin())
        what = f"{shots[-1]} shots{f' and {most - shots[-1]} rows to validate on' if c is None else ''}"
        raise ClassesError(
            f"label {classes[scarce]} has {counts[scarce]} rows to learn from, fewer than {what} need; give fewer shots"
        )
    return most


def fit_shots(
    rows: Rows,
    training: Ids,
    class_ids: Ids,
    classes: Sequence[int],
    shots: Sequence[int],
    draws: Sequence[int],
    c: float | None,
    device: torch.device,
    on_progress: Callable[[str], None],
) -> tuple[list[Linear], list[float]]:
    """Probes and their C, for each number of shots all draws.

    Args:
        rows: Of one directory.
        training: Numbers [n] of those to draw from, in the order that says which are drawn.
        class_ids: Theirs [n].
        classes: The labels.
        shots: Rows a class, ascending.
        draws: A seed for each.
        c: scikit-learn's C; None to search it.
        device: Where to train.
        on_progress: Called with what is being done.

    Raises:
        ClassesError: A class has too few rows.
    """
    most = count_drawn(class_ids, classes, shots, c)
    ranks = {draw: random_ranks(class_ids, draw) for draw in draws}
    wanted = np.flatnonzero(np.any([one < most for one in ranks.values()], axis=0))
    on_progress("reading")
    held = rows.hold(training[wanted])
    setting = Setting(
        num_classes=len(classes),
        balanced=False,
        low=None,  # so few rows are no work
        device=device,
        on_pass=lambda _: None,
    )
    linears: list[Linear] = []
    strengths: list[float] = []
    for number in shots:
        for draw in draws:
            on_progress(f"{number} shots, seed {draw}")
            of_draw = ranks[draw][wanted]
            chosen = np.flatnonzero(of_draw < number)
            others = np.flatnonzero((of_draw >= number) & (of_draw < number + min(number, MOST_VALIDATION_SHOTS)))
            done, _ = fit_at(held, chosen, c, (chosen, others), setting)
            linears.append((done.weights, done.intercept))
            strengths.append(done.c)
    return linears, strengths


def few_shot_points(shots: Sequence[int], acc1: Sequence[float], c: Sequence[float]) -> tuple[FewShotPoint, ...]:
    """The points of a curve out of what `fit_shots` returns, in its order."""
    draws = len(acc1) // max(len(shots), 1)
    parts = [slice(at * draws, (at + 1) * draws) for at in range(len(shots))]
    return tuple(_point(number, acc1[part], c[part]) for number, part in zip(shots, parts, strict=True))


def _point(shots: int, acc1: Sequence[float], c: Sequence[float]) -> FewShotPoint:
    return FewShotPoint(
        shots=shots,
        acc1=tuple(acc1),
        mean=statistics.mean(acc1),
        deviation=statistics.stdev(acc1) if len(acc1) > 1 else 0.0,
        c=tuple(c),
    )


def _accuracies(task: Task, test: TestRows, linears: Sequence[Linear]) -> tuple[list[float], int]:
    num_classes = len(task.classes)
    passes = test.rows(task.features, task.device).passes(test.chosen, block_rows(num_classes, task.device))
    counts = count(passes, linears, num_classes + len(test.unseen))
    return [float(one.overall()["acc1"] or 0) for one in counts], int(counts[0].support.sum())


def _zero_shot(task: Task, test: TestRows, linear: Linear) -> float:
    num_classes = len(linear[1])
    passes = test.embeddings(task.device).passes(test.chosen, block_rows(num_classes, task.device))
    (counts,) = count(passes, [linear], num_classes)
    return float(counts.overall()["acc1"] or 0)


def _summarise(
    task: Task,
    test: TestRows,
    test_rows: int,
    draws: tuple[int, ...],
    points: tuple[FewShotPoint, ...],
    zero_shot: float | None,
    num_templates: int,
    started: float,
) -> FewShotCurve:
    return FewShotCurve(
        out=str(task.out),
        model=task.model.spec.name,
        features=task.features,
        vectors=task.model.features,
        classes=len(task.classes),
        test=test.source,
        test_rows=test_rows,
        seeds=draws,
        points=points,
        zero_shot=zero_shot,
        templates=0 if zero_shot is None else num_templates,
        seconds=round(time.perf_counter() - started, 3),
    )
