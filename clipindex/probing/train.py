"""Training a probe on a directory's embeddings."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clipindex.errors import UsageError
from clipindex.logistic import Fit, block_rows
from clipindex.probing.adamw import search_decay, train_adamw
from clipindex.probing.evaluation import Evaluation, count, summarise
from clipindex.probing.lists import LISTS_COLUMN
from clipindex.probing.one_vs_rest import train_one_vs_rest
from clipindex.probing.probe import Probe, write_probe
from clipindex.probing.protocols import PROTOCOLS, README_C, Setting, check_c, describe_search, fit_at, name_protocol
from clipindex.probing.ranking import MultiLabelEvaluation, evaluate_lists
from clipindex.probing.rows import Held, Ids, Rows, hold_if_fits, split, usable_bytes
from clipindex.probing.task import Task, TestRows, pose_task

SPLIT = 0.2
"""Fraction of the training rows that a search validates on; the protocols leave it open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSummary:
    """What a training gave; probe.json holds the same."""

    out: str
    """Where the probe lies."""
    protocol: str
    c: float | None
    features: str
    vectors: str
    """'projected', 'pre-projection' or 'pooled'; see `types.ModelInfo`."""
    classes: int
    rows: int
    """Labelled, that were learned from."""
    left_out: int
    """Rows of the directory without a label."""
    training: dict[str, Any]
    test: Evaluation | MultiLabelEvaluation | None
    """On held-out rows; None where there were none."""
    seconds: float
    """From the first read to the trained weights."""


def train_probe(
    folder: str | Path,
    *,
    label: str = "label",
    c: float | None = README_C,
    protocol: str | None = None,
    features: str | None = None,
    pre_projection: bool = False,
    test: str | Path | None = None,
    held_out: float | None = None,
    balanced: bool = False,
    seed: int = 0,
    names: str | Path | Sequence[str] | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    memory_bytes: int | None = None,
    on_progress: Callable[[str], None] = lambda note: None,
) -> TrainSummary:
    """Train a linear classifier on a directory's embeddings and labels, and measure it on held-out rows.

    The process's memory allocator is tuned; see `allocator.share_one_arena`.

    Args:
        folder: The embedding directory.
        label: The column of labels; 'labels', of rows with any number of classes, asks for one-vs-rest.
        c: scikit-learn's C, the inverse of the regularisation; None to search it as CLIP's appendix A.3 does.
        protocol: 'clip-benchmark' for that recipe, which knows no C; otherwise it follows from `c`.
        features: 'raw' (as in the README of CLIP, and by default) or 'normalized' (as in CLIP_benchmark).
        pre_projection: Learn from the features before the projection, where `folder` holds both kinds: those that the
            CLIP paper's probes are fitted to.
        test: Another directory of the same model, to test on.
        held_out: Or a fraction of each class of this one; of its rows, where they have any number of classes.
        balanced: Whether classes count alike, however many rows they have.
        seed: Of what is drawn: held-out rows, validation rows, AdamW's order.
        names: Class names, or a file with one a line, whose place is the label.
        out: Where the probe goes; `folder`/probe by default.
        device: 'auto', 'cpu', 'cuda' or 'cuda:N'.
        memory_bytes: What embeddings may take; see `rows.hold_if_fits`. What does not fit is read in each pass.
        on_progress: Called now and then with what is being done.

    Raises:
        UsageError: Options contradict each other.
        ClassesError: Labels or names cannot define a probe.
        FingerprintError: `test` is of another model.
        StoreError: A file is damaged.
    """
    started = time.perf_counter()
    check_c(c)
    uses_adamw = protocol == "clip-benchmark"
    if uses_adamw:
        _check_adamw(label, balanced)
    usual = "normalized" if uses_adamw else "raw"
    task = pose_task(
        folder,
        label=label,
        features=usual if features is None else features,
        test=test,
        held_out=held_out,
        seed=seed,
        names=names,
        device=device,
        pre_projection=pre_projection,
        out=out,
    )
    rows = hold_if_fits(task.rows, memory_bytes, task.device)
    if uses_adamw:
        probe = _train_adamw(task, _held(rows, memory_bytes, task.device), seed, on_progress)
    else:
        train = _train_logistic if task.lists is None else _train_lists
        probe = train(task, rows, c, balanced, seed, on_progress)
    seconds = time.perf_counter() - started
    evaluation = None if task.test is None else _test(task, task.test, rows, probe)
    if evaluation is not None and task.test is not None:
        probe = replace(probe, metrics={"source": task.test.source, **asdict(evaluation)})
    write_probe(task.out, probe)
    return TrainSummary(
        out=str(task.out),
        protocol=probe.protocol,
        c=probe.c,
        features=task.features,
        vectors=task.model.features,
        classes=len(task.classes),
        rows=len(task.training),
        left_out=task.left_out,
        training=probe.training,
        test=evaluation,
        seconds=round(seconds, 3),
    )


def _check_adamw(label: str, balanced: bool) -> None:
    if label == LISTS_COLUMN:
        raise UsageError("CLIP_benchmark's probe knows rows of one class only; leave the protocol out for 'labels'")
    if balanced:
        raise UsageError("CLIP_benchmark's probe does not balance classes")


def _held(rows: Rows, memory_bytes: int | None, device: torch.device) -> Held:
    """The rows, if they are in memory.

    Raises:
        UsageError: They are not.
    """
    if isinstance(rows, Held):
        return rows
    raise UsageError(
        "CLIP_benchmark's probe draws rows at random, so they must fit into memory: they take"
        f" {rows.held_bytes / 2**30:.3g} GiB, and {(memory_bytes or usable_bytes(device)) / 2**30:.3g} may be used;"
        " --memory says how much"
    )


def _train_logistic(
    task: Task, rows: Rows, c: float | None, balanced: bool, seed: int, on_progress: Callable[[str], None]
) -> Probe:
    setting = _setting(task, balanced, on_progress)
    searched = validation_split(rows.class_ids, task.training, seed) if c is None else None
    done, trials = fit_at(rows, task.training, c, searched, setting)
    found: dict[str, Any] = {}
    if searched is not None:
        found = {"validation_rows": len(searched[1]), "search": describe_search(trials)}
    record = {**_common(task, seed), **found, **_describe_fit(done, rows, balanced)}
    name = "clip-a3" if found else name_protocol(done.c, task.features)
    return _probe(task, name, done.c, record, done.weights, done.intercept)


def _train_lists(
    task: Task, rows: Rows, c: float | None, balanced: bool, seed: int, on_progress: Callable[[str], None]
) -> Probe:
    setting = _setting(task, balanced, on_progress)
    done, found = train_one_vs_rest(task, rows, c, SPLIT, seed, setting)
    record = {**_common(task, seed), **found, **_describe_fit(done, rows, balanced)}
    probe = _probe(task, "one-vs-rest", done.c, record, done.weights, done.intercept)
    return replace(probe, multi_label=True)


def _setting(task: Task, balanced: bool, on_progress: Callable[[str], None]) -> Setting:
    return Setting(
        num_classes=len(task.classes),
        balanced=balanced,
        low=task.low,
        device=task.device,
        on_pass=on_progress,
    )


def _describe_fit(done: Fit, rows: Rows, balanced: bool) -> dict[str, Any]:
    return {
        "balanced": balanced,
        "objective": done.objective,
        "largest_gradient": done.gradient,
        "passes": done.passes,
        "converged": done.converged,
        "in_memory": isinstance(rows, Held),
    }


def _train_adamw(task: Task, rows: Held, seed: int, on_progress: Callable[[str], None]) -> Probe:
    num_classes = len(task.classes)
    epochs = 0

    def on_epoch() -> None:
        nonlocal epochs
        epochs += 1
        on_progress(f"{epochs:,} epochs")

    training, validation = validation_split(rows.class_ids, task.training, seed)
    decay, trials = search_decay(rows, training, validation, num_classes, seed, on_epoch)
    weights, intercept = train_adamw(rows, task.training, num_classes, decay, seed, on_epoch)
    record = {
        **_common(task, seed),
        "validation_rows": len(validation),
        "weight_decay": decay,
        "search": describe_search(trials),
    }
    return _probe(task, "clip-benchmark", None, record, weights, intercept)


def _probe(
    task: Task, protocol: str, c: float | None, training: dict[str, Any], weights: torch.Tensor, intercept: torch.Tensor
) -> Probe:
    return Probe(
        model=task.model,
        features=task.features,
        classes=task.classes,
        names=task.names,
        protocol=protocol,
        c=c,
        training={"recipe": PROTOCOLS[protocol], **training},
        metrics=None,
        weights=weights,
        intercept=intercept,
    )


def validation_split(class_ids: Ids, training: Ids, seed: int) -> tuple[Ids, Ids]:
    """Of the rows to learn from, those that a search trains on, and those that it validates on."""
    kept, out = split(class_ids[training], SPLIT, seed)
    return training[kept], training[out]


def _test(task: Task, test: TestRows, rows: Rows, probe: Probe) -> Evaluation | MultiLabelEvaluation:
    # Rows held out of the directory itself may be in memory already.
    source = rows if test.chosen is not None else test.rows(task.features, task.device)
    num_classes = len(task.classes)
    passes = source.passes(test.chosen, block_rows(num_classes, task.device))
    linear = (probe.weights, probe.intercept)
    if test.lists is not None:
        lists = test.lists.to(task.device)
        return evaluate_lists(passes, lists, linear, task.classes, task.names, test.unseen, test.left_out)
    (counts,) = count(passes, [linear], num_classes + len(test.unseen))
    return summarise(counts, task.classes, task.names, test.unseen, test.left_out)


def _common(task: Task, seed: int) -> dict[str, Any]:
    return {
        "folder": str(task.folder),
        "rows": len(task.training),
        "left_out": task.left_out,
        "seed": seed,
        "device": str(task.device),
        "low_precision": str(task.low) if task.low else None,
    }
