"""Classifying the rows of a directory: predictions, and metrics where there are labels."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipindex.agreement import Agreement
from clipindex.atomic import remove_stale_temporaries, write_json
from clipindex.errors import UsageError
from clipindex.index.exact import Neighbours, stored_vectors
from clipindex.metrics import ClassificationCounts
from clipindex.models import load_model_of
from clipindex.multi_label import check_labels, class_average_precision
from clipindex.predictions import METRICS_FILE, PredictionWriter, earlier_predictions, prediction_table
from clipindex.prompts import read_classes, read_templates
from clipindex.recall import draw_rows, read_drawn
from clipindex.store import (
    EmbeddingBatch,
    check_cosines,
    published_shards,
    read_dataset,
    read_embeddings,
)
from clipindex.threads import map_in_order, num_cores
from clipindex.types import ModelSpec
from clipindex.zeroshot.classifier import ZeroShotClassifier, build_classifier

NUM_RANKED = 5
"""Neighbours that acc5 needs, however few are written."""
SCORES_AT_ONCE = 1 << 29
"""Of rows with classes, between two reports of progress: some seconds of a core."""
AGREEMENT_ROWS = 1000
"""On which approximate classification is compared with exact; a share of 0.99 is then known to 0.003."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifySummary:
    """What a classification found; metrics.json beside the predictions holds the same, and the prompts."""

    out: str
    """Where the predictions lie."""
    model: str
    fingerprint: str
    classes: int
    templates: int
    rows: int
    labelled: int
    acc1: float | None
    """Of labelled rows; None without any, as the next two."""
    acc5: float | None
    mean_per_class_recall: float | None
    per_class: list[dict[str, Any]]
    """In class order: id, name, support (rows with that label), recall, recall5; None where a class does not occur."""
    multi_labelled: int
    """Rows with any number of classes; where there are such, those with a single label are among them."""
    mean_average_precision: float | None
    """Of those rows, over all classes, as CLIP_benchmark defines it (see `average_precision`); None without any, or
    where `no_average_precision` says why."""
    average_precision: list[dict[str, Any]]
    """Of those rows, in class order: id, name, support, average_precision, which is 0 where a class does not occur."""
    seconds: float
    """Reading, search and writing; loading the model, embedding the prompts and ranking for mAP apart."""
    images_per_s: float
    agreement: Agreement | None = None
    """With exact classification, where this one was approximate."""
    no_average_precision: str | None = None
    """The first label in a list that is beyond the classes, where there is one: such lists are not ranked."""


def classify(
    folder: str | Path,
    *,
    classes: str | Path | Sequence[str],
    templates: str | Path | Sequence[str] = "simple",
    top: int = 5,
    model: ModelSpec | None = None,
    shards: Sequence[str] | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    approximate: bool = False,
    on_classes: Callable[[int], None] = lambda num_classes: None,
    on_progress: Callable[[int], None] = lambda num_rows: None,
    on_ranked: Callable[[int], None] = lambda num_rows: None,
) -> ClassifySummary:
    """Classify a directory of embeddings without training, and measure the accuracy where rows have labels.

    Args:
        folder: The embedding directory.
        classes: A file with a name a line, or the names.
        templates: A file, a built-in set (`prompts.TEMPLATE_SETS`), or the templates.
        top: Classes to write for each image.
        model: How to load the model, where the directory's record does not lead to its weights on this machine.
        shards: Names of the shards to classify, as in `ShardRecord`; all by default.
        out: Where predictions go; `folder`/predictions by default. An earlier run's are replaced.
        device: Where to run the text tower.
        precision: Of the text tower.
        approximate: For tens of thousands of classes and more: find the best by a bf16 product, and measure how far
            that agrees with exact classification. Cosines are exact; probabilities are over all classes, those of the
            best from exact cosines, the rest of the sum from bf16 ones.
        on_classes: Called with the number of classes whose prompts are embedded.
        on_progress: Called with the number of rows classified.
        on_ranked: Called with the number of rows looked at for mAP, twice each; only where rows have lists of classes.

    Returns:
        The summary; predictions lie in `out`, a Parquet file a shard, beside metrics.json.

    Raises:
        ClassesError: Class names or templates will not do, or the label of a row of one class is beyond the class list.
        FingerprintError: The embeddings are not of `model`.
        UsageError: `out` holds Parquet files that no classification wrote.
        ClipindexError: Others of its kinds; see `errors`.
    """
    if top < 1:
        raise UsageError(f"top {top}: give at least 1")
    folder = Path(folder)
    dataset = read_dataset(folder)
    target = Path(out) if out is not None else folder / "predictions"
    earlier = earlier_predictions(target)
    names = read_classes(classes) if isinstance(classes, str | Path) else classes
    prompts = read_templates(templates) if isinstance(templates, str | Path) else templates
    loaded = load_model_of(folder, dataset.model, model)
    where: dict[str, Any] = {"device": device, "precision": precision, "approximate": approximate}
    classifier = build_classifier(loaded, names, prompts, on_classes=on_classes, **where)
    multi_labelled, no_average_precision = check_labels(folder, shards, len(names))
    agreement = classifier.agreement(_sample(folder, shards), max(top, NUM_RANKED)) if approximate else None
    _clear(target, earlier)
    started, counts = time.perf_counter(), ClassificationCounts(len(names))
    written, rows = predict_directory(folder, classifier, target, top, counts, on_progress, shards)
    seconds = time.perf_counter() - started
    ranked = None
    if multi_labelled and no_average_precision is None:
        ranked = class_average_precision(folder, stored_vectors(classifier.index), written, on_ranked)
    measured = counts.overall()
    summary = ClassifySummary(
        out=str(target),
        model=dataset.model.spec.name,
        fingerprint=dataset.model.fingerprint,
        classes=len(names),
        templates=len(prompts),
        rows=rows,
        labelled=int(measured["labelled"] or 0),
        acc1=measured["acc1"],
        acc5=measured["acc5"],
        mean_per_class_recall=measured["mean_per_class_recall"],
        per_class=_by_class(names, counts.per_class()),
        multi_labelled=multi_labelled,
        mean_average_precision=None if ranked is None else ranked.mean(),
        average_precision=[] if ranked is None else _by_class(names, ranked.describe()),
        seconds=round(seconds, 3),
        images_per_s=round(rows / seconds, 1),
        agreement=agreement,
        no_average_precision=no_average_precision,
    )
    write_json(target / METRICS_FILE, {**asdict(summary), "prompts": list(prompts), "shards": written})
    return summary


def predict_directory(
    folder: Path,
    classifier: ZeroShotClassifier,
    target: Path,
    top: int,
    counts: ClassificationCounts,
    on_progress: Callable[[int], None] = lambda num_rows: None,
    shards: Sequence[str] | None = None,
) -> tuple[list[str], int]:
    """Classify every row of a directory; this thread reads and writes, one a core searches.

    Args:
        folder: The embedding directory.
        classifier: Of the same model.
        target: Where the predictions go.
        top: Classes to write for each image.
        counts: Added to, from the rows that have labels, all of which are within its classes.
        on_progress: Called with the number of rows classified.
        shards: Names of the shards to classify; all by default.

    Returns:
        Names of the shards that have predictions, and the number of rows.

    Raises:
        StoreError: A file is damaged.
    """
    rows = 0
    names = pa.array(classifier.classes, pa.string())
    at_once = max(1, SCORES_AT_ONCE // len(names))
    batches = _pieces(read_embeddings(folder, ("key", "label", "labels"), shards), at_once)

    def search(batch: EmbeddingBatch) -> tuple[EmbeddingBatch, Neighbours, pa.Table]:
        neighbours = classifier.predict(batch.embedding, max(top, NUM_RANKED))
        check_cosines(batch, neighbours.cosines)
        return batch, neighbours, prediction_table(batch, neighbours, names, top)

    with (
        contextlib.closing(map_in_order(search, batches, num_cores())) as found,
        PredictionWriter(target) as writer,
    ):
        for batch, neighbours, table in found:
            labels = batch.columns["label"]
            labelled = np.asarray(labels.is_valid())
            counts.add(labels.fill_null(0).to_numpy()[labelled], neighbours.ids[labelled])
            writer.write(batch.shard.name, table)
            rows += len(neighbours.ids)
            on_progress(rows)
    return writer.shards, rows


def _pieces(batches: Iterable[EmbeddingBatch], rows: int) -> Iterator[EmbeddingBatch]:
    """The same rows, so many at most at once."""
    for batch in batches:
        for first in range(0, len(batch.embedding), rows):
            columns = {name: column.slice(first, rows) for name, column in batch.columns.items()}
            part = batch.embedding[first : first + rows]
            yield replace(batch, first_row=batch.first_row + first, embedding=part, columns=columns)


def _clear(target: Path, earlier: Iterable[Path]) -> None:
    """Remove what an earlier run wrote, or left unfinished."""
    for path in earlier:
        path.unlink()
    remove_stale_temporaries(target)


def _by_class(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": at, "name": name, **row} for at, (name, row) in enumerate(zip(names, rows, strict=True))]


def _sample(folder: Path, shards: Sequence[str] | None) -> np.ndarray[Any, Any]:
    """Vectors [n, D] of rows drawn evenly."""
    sizes = {name: record.rows for name, record in published_shards(folder).items() if shards is None or name in shards}
    drawn = draw_rows(sizes, AGREEMENT_ROWS, seed=0)
    return read_drawn(folder, drawn) if drawn else np.empty((0, read_dataset(folder).model.dim), np.float32)
