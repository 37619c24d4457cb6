"""How good a probe is on labelled rows, and what it says of any rows."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from clipindex.devices import choose_device
from clipindex.errors import ClassesError, StoreError
from clipindex.logistic import Block, Linear, Passes, block_rows, map_blocks
from clipindex.metrics import ClassificationCounts, wilson_interval
from clipindex.multi_label import with_single_labels
from clipindex.probing.lists import LISTS_COLUMN, label_kinds, read_all_lists, take_lists
from clipindex.probing.probe import Probe
from clipindex.probing.ranking import EVALUATION_PASSES, MultiLabelEvaluation, evaluate_lists
from clipindex.probing.rows import Ids, Labels, Streamed, read_all_labels, take_part
from clipindex.products import multiply
from clipindex.store import (
    LABELS_TYPE,
    NORM_COLUMNS,
    AtomicParquet,
    EmbeddingBatch,
    find_vectors,
    read_dataset,
    read_embeddings,
)
from clipindex.threads import map_in_order, num_cores

NUM_RANKED = 5

Ranked = tuple[Ids, npt.NDArray[np.float64]]
"""The best classes [n, at most 5], and the probability of the best [n]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What a probe got right; accuracies are those of CLIP_benchmark, see `metrics.ClassificationCounts`."""

    labelled: int
    """Rows that were measured."""
    left_out: int
    """Rows without a label."""
    unseen: dict[int, int]
    """Labels that the probe was not trained on, and how many rows have them: they count as wrong."""
    acc1: float
    acc5: float | None
    """None below five classes."""
    mean_per_class_recall: float
    intervals: dict[str, tuple[float, float]]
    """95 % of acc1 and acc5, Wilson 1927."""
    calibration_error: float
    """Expected calibration error, Guo et al. 2017, 15 bins."""
    calibration: list[dict[str, float | int]]
    """Its bins: samples, accuracy, mean confidence."""
    per_class: list[dict[str, Any]]
    """Label, name, support, recall with interval, recall5, precision; None where it is not defined."""
    confusion: list[tuple[int, int, int]]
    """Label, predicted label, rows; cells without rows left out."""


def evaluate_probe(
    folder: str | Path,
    probe: Probe,
    *,
    device: str = "auto",
    on_progress: Callable[[int, int], None] = lambda rows, total: None,
) -> Evaluation | MultiLabelEvaluation:
    """Measure a probe on the labelled rows of a directory: on those with lists of labels, if it was trained on such.

    Args:
        folder: The embedding directory.
        probe: Of the same model.
        device: 'auto', 'cpu', 'cuda' or 'cuda:N'.
        on_progress: Called with the number of rows looked at, and of all that are; rows with lists are, three times.

    Raises:
        FingerprintError: The embeddings are of another model.
        ClassesError: No row has a label, or a list of them, of the kind that the probe was trained on.
        StoreError: A file is damaged.
    """
    folder = Path(folder)
    vectors = find_vectors(folder, read_dataset(folder), probe.model)
    chosen = choose_device(device)
    if probe.multi_label:
        return _evaluate_lists(folder, probe, vectors, chosen, on_progress)
    labels = _read_single_labels(folder)
    part, unseen = take_part(labels, probe.classes)
    rows = Streamed([replace(part, vectors=vectors)], probe.features, chosen)
    linear = (probe.weights.to(chosen), probe.intercept.to(chosen))
    total = len(rows.class_ids)
    (counts,) = count(
        rows.passes(at_once=block_rows(len(probe.classes), chosen)),
        [linear],
        len(probe.classes) + len(unseen),
        lambda done: on_progress(done, total),
    )
    return summarise(counts, probe.classes, probe.names, unseen, labels.left_out)


def _read_single_labels(folder: Path) -> Labels:
    try:
        return read_all_labels(folder)
    except ClassesError:
        if label_kinds([folder]):
            raise ClassesError(
                f"{folder}: the rows have lists of labels, and the probe is of one class a row; measure one that was"
                " trained on lists"
            ) from None
        raise ClassesError(
            f"{folder}: no row has a label to measure a probe by; labels come from the .cls members of the tars"
        ) from None


def _evaluate_lists(
    folder: Path, probe: Probe, vectors: str, device: torch.device, on_progress: Callable[[int, int], None]
) -> MultiLabelEvaluation:
    labels = read_all_lists(folder)
    part, lists, unseen = take_lists(labels, probe.classes)
    rows = Streamed([replace(part, vectors=vectors)], probe.features, device)
    total = EVALUATION_PASSES * len(rows.class_ids)
    return evaluate_lists(
        rows.passes(at_once=block_rows(len(probe.classes), device)),
        lists.to(device),
        (probe.weights.to(device), probe.intercept.to(device)),
        probe.classes,
        probe.names,
        unseen,
        labels.left_out,
        lambda done: on_progress(done, total),
    )


def count(
    passes: Passes,
    linears: Sequence[Linear],
    num_classes: int,
    on_rows: Callable[[int], None] = lambda rows: None,
    on_ranked: Callable[[Ids, list[Ranked]], None] = lambda labels, ranked: None,
) -> list[ClassificationCounts]:
    """What each of several classifiers gets right, in one pass over rows with class ids below `num_classes`.

    Args:
        passes: The rows.
        linears: The classifiers.
        num_classes: Of the rows, which may be more than those of the classifiers.
        on_rows: Called with the number of rows so far.
        on_ranked: Called with class ids [n] of some rows at a time, and what each classifier makes of them.
    """
    counts = [ClassificationCounts(num_classes) for _ in linears]
    rows = 0

    def rank(block: Block) -> tuple[Ids, list[Ranked]]:
        x = block.features()
        best = [best_classes(x, linear, NUM_RANKED) for linear in linears]
        return block.labels.cpu().numpy(), [
            (one.indices.cpu().numpy(), one.values[:, 0].double().cpu().numpy()) for one in best
        ]

    for labels, ranked in map_blocks(rank, passes()):
        for one, (ids, confidence) in zip(counts, ranked, strict=True):
            one.add(labels, ids, confidence)
        rows += len(labels)
        on_rows(rows)
        on_ranked(labels, ranked)
    return counts


def best_classes(x: torch.Tensor, linear: Linear, number: int, independent: bool = False) -> torch.return_types.topk:
    """The best classes [n, at most number] of features [n, D], and their probabilities, each on its own or of all."""
    weights, intercept = linear
    logits = multiply(x, weights.T) + intercept
    return torch.topk(torch.sigmoid(logits) if independent else torch.softmax(logits, 1), min(number, len(intercept)))


def summarise(
    counts: ClassificationCounts,
    classes: Sequence[int],
    names: Sequence[str] | None,
    unseen: dict[int, int],
    left_out: int,
) -> Evaluation:
    """The evaluation that follows from counts over `classes` and, after them, those that are `unseen`."""
    labels = [*classes, *unseen]
    overall = counts.overall()
    error, bins = counts.calibration()
    truth, predicted, cells = counts.confusion()
    num_predicted = np.bincount(predicted, cells, minlength=len(labels))
    return Evaluation(
        labelled=int(overall["labelled"] or 0),
        left_out=left_out,
        unseen=unseen,
        acc1=float(overall["acc1"] or 0),
        acc5=overall["acc5"],
        mean_per_class_recall=float(overall["mean_per_class_recall"] or 0),
        intervals=counts.intervals(),
        calibration_error=error,
        calibration=bins,
        per_class=[
            {
                "label": label,
                "name": names[at] if names and at < len(names) else None,
                **row,
                "recall_interval": wilson_interval(int(counts.hits_1[at]), int(counts.support[at]))
                if counts.support[at]
                else None,
                "precision": float(counts.hits_1[at] / num_predicted[at]) if num_predicted[at] else None,
            }
            for at, (label, row) in enumerate(zip(labels, counts.per_class(), strict=True))
        ],
        confusion=[
            (labels[label], labels[best], number)
            for label, best, number in zip(truth.tolist(), predicted.tolist(), cells.tolist(), strict=True)
        ],
    )


def write_predictions(
    folder: str | Path,
    probe: Probe,
    out: str | Path,
    *,
    top: int = 5,
    device: str = "auto",
    on_progress: Callable[[int], None] = lambda rows: None,
) -> int:
    """Write what a probe says of every row of a directory, labelled or not.

    Args:
        folder: The embedding directory.
        probe: Of the same model.
        out: A Parquet file with key, shard, label (or labels, of a probe of such: a single label is a list of one),
            and lists of the best classes: class_label, class_name, probability, which is each class's own where a row
            may have any number of them.
        top: How many classes.
        device: As in `evaluate`.
        on_progress: Called with the number of rows written.

    Returns:
        The number of rows.

    Raises:
        FingerprintError: The embeddings are of another model.
        StoreError: A file is damaged.
    """
    folder = Path(folder)
    vectors = find_vectors(folder, read_dataset(folder), probe.model)
    norm = NORM_COLUMNS[vectors]
    chosen = choose_device(device)
    linear = (probe.weights.to(chosen), probe.intercept.to(chosen))
    top = min(top, len(probe.classes))
    batches = read_embeddings(folder, ("key", "label", "labels", norm), vectors=vectors)
    schema = _prediction_schema(probe, top)
    parquet = AtomicParquet(Path(out), schema, compression="zstd")
    names = [probe.name(at) for at in range(len(probe.classes))]
    classes = (pa.array(probe.classes, pa.int32()), pa.array(names, pa.string()))
    predict = functools.partial(
        _predictions, folder=folder, probe=probe, linear=linear, norm=norm, classes=classes, schema=schema, top=top
    )
    rows = 0
    try:
        with contextlib.closing(map_in_order(predict, batches, num_cores() if chosen.type == "cpu" else 1)) as tables:
            for table in tables:
                parquet.write(table)
                rows += len(table)
                on_progress(rows)
    except BaseException:
        parquet.abort()
        raise
    parquet.commit()
    return rows


def _predictions(
    batch: EmbeddingBatch,
    *,
    folder: Path,
    probe: Probe,
    linear: Linear,
    norm: str,
    classes: tuple[pa.Array, pa.Array],
    schema: pa.Schema,
    top: int,
) -> pa.Table:
    device = linear[0].device
    x = torch.from_numpy(batch.embedding).to(device).float()
    if probe.features == "raw":
        x = x * torch.from_numpy(batch.columns[norm].to_numpy().copy()).to(device)[:, None]
    # A few rows at once, since a batch's scores of many thousand classes are gigabytes.
    parts = torch.split(x, block_rows(len(probe.classes), device))
    found = [best_classes(part, linear, top, independent=probe.multi_label) for part in parts]
    values, ids = (torch.cat(column).cpu() for column in zip(*found, strict=True))
    if not bool(torch.isfinite(values).all()):
        wrong = batch.first_row + int(torch.nonzero(~torch.isfinite(values))[0, 0])
        raise StoreError(
            f"{folder}/embeddings/{batch.shard.name}.parquet: row {wrong} is not a number; delete the file and embed"
            " its tar again"
        )
    places = pa.array(ids.numpy().reshape(-1))
    lists = (*(each.take(places) for each in classes), pa.array(values.numpy().reshape(-1)))
    columns = (pa.FixedSizeListArray.from_arrays(each, top) for each in lists)
    shard = pa.repeat(pa.scalar(batch.shard.name, pa.string()), len(x))
    said = batch.columns["label"]
    if probe.multi_label:
        said = with_single_labels(said, batch.columns["labels"])
    return pa.Table.from_arrays([batch.columns["key"], shard, said, *columns], schema=schema)


def _prediction_schema(probe: Probe, top: int) -> pa.Schema:
    truth = LISTS_COLUMN if probe.multi_label else "label"
    return pa.schema(
        [
            ("key", pa.string()),
            ("shard", pa.string()),
            (truth, LABELS_TYPE if truth == LISTS_COLUMN else pa.int32()),
            ("class_label", pa.list_(pa.int32(), top)),
            ("class_name", pa.list_(pa.string(), top)),
            ("probability", pa.list_(pa.float32(), top)),
        ]
    )
