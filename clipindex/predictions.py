"""Predictions as they lie in a folder: a Parquet file a shard, beside the metrics that list them."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipindex.errors import UsageError
from clipindex.index.exact import Neighbours
from clipindex.store import AtomicParquet, EmbeddingBatch

METRICS_FILE = "metrics.json"


def prediction_table(batch: EmbeddingBatch, found: Neighbours, names: pa.StringArray, top: int) -> pa.Table:
    """Rows of a predictions file: the best `top` classes [n] of a batch, or as many as there are."""
    top = min(top, len(names))
    ids, cosines, probabilities = (pa.array(np.ascontiguousarray(field[:, :top]).reshape(-1)) for field in found)

    def lists(values: pa.Array) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(values, top)

    return pa.table(
        {
            "key": batch.columns["key"],
            "shard": pa.repeat(batch.shard.name, len(found.ids)),
            "label": batch.columns["label"],
            "labels": batch.columns["labels"],
            "class_id": lists(ids),
            "class_name": lists(names.take(ids)),
            "cosine": lists(cosines),
            "probability": lists(probabilities),
        }
    )


class PredictionWriter:
    """One predictions file a shard, each appearing when its last row is in."""

    def __init__(self, target: Path) -> None:
        self.shards: list[str] = []
        self._target = target
        self._parquet: AtomicParquet | None = None

    def __enter__(self) -> "PredictionWriter":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self._finish()
        elif self._parquet is not None:
            self._parquet.abort()

    def write(self, shard: str, table: pa.Table) -> None:
        """Add rows of a shard; its rows come one after another."""
        if not self.shards or self.shards[-1] != shard:
            self._finish()
            self.shards.append(shard)
            # Class ids and names repeat; cosines do not, and a dictionary of them takes half of the writing time.
            repeating = ["shard", "label", *(f"{name}.list.element" for name in ("labels", "class_id", "class_name"))]
            self._parquet = AtomicParquet(
                self._target / f"{shard}.parquet", table.schema, compression="zstd", use_dictionary=repeating
            )
        assert self._parquet is not None
        self._parquet.write(table)

    def _finish(self) -> None:
        if self._parquet is not None:
            self._parquet.commit()
        self._parquet = None


def earlier_predictions(target: Path) -> list[Path]:
    """Files of an earlier run, by its own list of them; refuses a folder that holds other Parquet files."""
    metrics = target / METRICS_FILE
    listed: list[str] = []
    if metrics.exists():
        try:
            listed = [str(name) for name in json.loads(metrics.read_bytes())["shards"]]
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{metrics} is not of a classification; write predictions elsewhere") from error
    ours = {target / f"{name}.parquet" for name in listed if "/" not in name}
    found = sorted(target.glob("[!.]*.parquet"))
    for path in found:
        if path not in ours and not _is_prediction(path):
            raise UsageError(f"{path} was written by no classification; write predictions elsewhere")
    return [*found, metrics] if metrics.exists() else found


def _is_prediction(path: Path) -> bool:
    """Whether a file has a prediction's columns: a run that was stopped left no list of its own."""
    try:
        return {"class_id", "probability"} <= set(pq.read_schema(path).names)
    except (pa.ArrowException, OSError):
        return False
