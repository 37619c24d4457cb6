"""What a shard's own two files tell: schema, vectors, keys, order, rejects."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from clipindex.errors import StoreError
from clipindex.multi_label import unpack_labels
from clipindex.shards import shard_name
from clipindex.store import (
    NORM_COLUMNS,
    PRE_PROJECTION,
    Dataset,
    EmbeddingBatch,
    ShardRecord,
    read_embeddings,
    read_rejects,
)
from clipindex.verification.faults import Fault, fault_of

UNIT_TOLERANCE = 1e-3
"""Of an embedding's length; rounding to float16 moves it by less."""
COLUMNS = ("key", "norm", "label", "labels", "caption", "meta", "width", "height", "tar_offset", "tar_size")
"""All but the vectors."""


def check_shard(folder: Path, dataset: Dataset, record: ShardRecord) -> Iterator[Fault]:
    """What the shard's own two files tell."""
    path = folder / "embeddings" / f"{record.name}.parquet"
    remedy = f"delete {path.name} and {'import' if record.is_imported else 'embed'} {record.url} again"

    def fault(what: str) -> Fault:
        return Fault(path=str(path), what=what, remedy=remedy)

    if record.name != shard_name(record.url):
        yield fault(f"it is not named for what it was made of, {record.url}")
    keys: set[str] = set()
    last_offset, rows = -1, 0
    try:
        rejects = read_rejects(folder, record.name)
        for batch in read_embeddings(folder, COLUMNS, [record.name]):
            pa.table(batch.columns).validate(full=True)
            yield from map(fault, _bad_vectors(batch, "embedding"))
            yield from map(fault, _bad_lists(batch))
            keys.update(batch.columns["key"].to_pylist())
            rows += len(batch.embedding)
            offsets = batch.columns["tar_offset"].drop_null().to_numpy()
            if np.any(np.diff(offsets, prepend=last_offset) <= 0):
                yield fault(f"rows from {batch.first_row} on are not in the order of their tar")
            last_offset = offsets[-1] if len(offsets) else last_offset
        if dataset.pre_projection is not None:
            columns = ("key", NORM_COLUMNS[PRE_PROJECTION])
            for batch in read_embeddings(folder, columns, [record.name], PRE_PROJECTION):
                yield from map(fault, _bad_vectors(batch, PRE_PROJECTION))
    except (StoreError, pa.ArrowException) as error:
        yield fault_of(path, error, remedy)
        return
    if len(keys) != rows:
        yield fault(f"{rows - len(keys)} keys come twice")
    # A key that came twice in the tar is a row once, and a reject of the tar stage after that.
    stages = zip(rejects["key"].to_pylist(), rejects["stage"].to_pylist(), strict=True)
    both = next((key for key, stage in stages if stage != "tar" and key in keys), None)
    if both is not None:
        yield fault(f"key {both!r} is a row and a reject at once")


_AN = {"embedding": "an embedding", PRE_PROJECTION: "a pre_projection"}


def _bad_vectors(batch: EmbeddingBatch, column: str) -> Iterator[str]:
    lengths = np.linalg.norm(batch.embedding.astype(np.float32), axis=1)
    norms = batch.columns[NORM_COLUMNS[column]].to_numpy()
    for what, values, bad in (
        (f"{_AN[column]} of length", lengths, ~(np.abs(lengths - 1) <= UNIT_TOLERANCE)),
        (f"a {NORM_COLUMNS[column]} of", norms, ~(np.isfinite(norms) & (norms > 0))),
    ):
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            key = batch.columns["key"][at].as_py()
            yield f"row {batch.first_row + at} (key {key!r}) has {what} {values[at]:.4g}"


def _bad_lists(batch: EmbeddingBatch) -> Iterator[str]:
    """Lists of labels are ascending class numbers, each once."""
    lists = unpack_labels(batch.columns["labels"])
    falls = (np.diff(lists.rows) == 0) & (np.diff(lists.classes) <= 0)
    bad = lists.rows[(lists.classes < 0) | np.append(falls, False)[: len(lists.rows)]]
    if len(bad):
        key = batch.columns["key"][int(bad[0])].as_py()
        yield f"row {batch.first_row + bad[0]} (key {key!r}) has labels that are no ascending class numbers"
