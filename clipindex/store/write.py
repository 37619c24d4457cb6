"""Writing a shard: its rows, its rejects, and the moment at which both appear."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipindex.atomic import AtomicFile, exclusively
from clipindex.errors import StoreError
from clipindex.store.dataset import (
    FOOTER_KEY,
    LABELS_TYPE,
    NORM_COLUMNS,
    PRE_PROJECTION,
    REJECT_SCHEMA,
    ROW_GROUP_ROWS,
    Dataset,
    ShardRecord,
    embedding_schema,
)
from clipindex.store.read import published_record
from clipindex.types import Float32Array, Reject, Sample, Shard, Vectors

PENDING_BYTES = 64 << 20
"""Rows are written out at this size as well: captions may be of any length."""


class AtomicParquet:
    """A Parquet file that appears under its name with its last row, or not at all.

    `commit` or `abort` ends it, or leaving it as a context.
    """

    def __init__(self, path: Path, schema: pa.Schema, **options: Any) -> None:  # noqa: ANN401 - of pq.ParquetWriter
        self._file = AtomicFile(path)
        self._writer = pq.ParquetWriter(self._file.file, schema, **options)

    def __enter__(self) -> "AtomicParquet":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.commit()
        else:
            self.abort()

    def write(self, table: pa.Table, row_group_size: int = 2 * ROW_GROUP_ROWS) -> None:
        """Append a table as row groups of at most `row_group_size` rows."""
        self._writer.write_table(table, row_group_size=row_group_size)

    def commit(self, footer: dict[bytes, str] | None = None) -> None:
        """Write the footer, with what is to be said in it, and let the file appear."""
        try:
            if footer:
                self._writer.add_key_value_metadata(footer)
            self._writer.close()
        except BaseException:
            self._file.abort()
            raise
        self._file.commit()

    def abort(self) -> None:
        """Leave nothing behind; safe to call after `commit` failed."""
        with contextlib.suppress(OSError, pa.ArrowException):  # closing writes, perhaps to a full disk
            self._writer.close()
        self._file.abort()


class ShardWriter:
    """The two files of one shard while they are being written; `publish` or `abort` ends it."""

    def __init__(self, folder: Path, shard: Shard, dataset: Dataset) -> None:
        self._folder = folder
        self._shard = shard
        self._dataset = dataset
        self._schema = embedding_schema(dataset)
        self._rejects = _RejectsWriter(folder / "rejects" / f"{shard.name}.parquet")
        self._pending: list[pa.RecordBatch] = []
        self._rows = 0
        self._pending_rows = 0
        self._pending_bytes = 0
        self._parquet = AtomicParquet(folder / "embeddings" / f"{shard.name}.parquet", self._schema, **_PARQUET_OPTIONS)

    def append(
        self,
        samples: Sequence[Sample],
        vectors: Vectors,
        sizes: Sequence[tuple[int, int]],
    ) -> None:
        """Add n rows: their samples, their vectors, and (width, height) of their images."""
        columns = [
            pa.array([sample.key for sample in samples], pa.string()),
            self._lists("embedding", vectors.unit),
            pa.array(vectors.norms, pa.float32()),
            pa.array([sample.label for sample in samples], pa.int32()),
            pa.array([sample.labels for sample in samples], LABELS_TYPE),
            pa.array([sample.caption for sample in samples], pa.string()),
            pa.array([sample.meta for sample in samples], pa.string()),
            pa.array([width for width, _ in sizes], pa.int32()),
            pa.array([height for _, height in sizes], pa.int32()),
            pa.array([sample.tar_offset for sample in samples], pa.int64()),
            pa.array([len(sample.image) for sample in samples], pa.int64()),
        ]
        if vectors.pre_projection is not None:
            columns.append(self._lists(PRE_PROJECTION, vectors.pre_projection.unit))
            columns.append(pa.array(vectors.pre_projection.norms, pa.float32()))
        self._pending.append(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self._pending_rows += len(samples)
        self._pending_bytes += self._pending[-1].nbytes
        self._rows += len(samples)
        if self._pending_rows >= ROW_GROUP_ROWS or self._pending_bytes >= PENDING_BYTES:
            self._flush()

    def reject(self, reject: Reject) -> None:
        """Add a sample that is no row."""
        self._rejects.append(reject)

    def publish(
        self, *, samples: int, precision: str, decoder: str, device: str, seconds: float, broken: str | None = None
    ) -> tuple[ShardRecord, bool]:
        """Check the law, then make the shard appear: rejects first, since the embeddings file says that all is done.

        Returns:
            The published record, and whether it is this one: where another run was first, its files stay.

        Raises:
            StoreError: rows + rejects are not the number of samples that were read.
        """
        if self._rows + self._rejects.count != samples:
            raise StoreError(
                f"{self._shard.url}: {self._rows} rows + {self._rejects.count} rejects are not {samples} samples"
            )
        record = ShardRecord(
            name=self._shard.name,
            url=self._shard.url,
            size=self._shard.size,
            version=self._shard.version,
            samples=samples,
            rows=self._rows,
            rejects=self._rejects.count,
            fingerprint=self._dataset.model.fingerprint,
            precision=precision,
            decoder=decoder,
            device=device,
            seconds=round(seconds, 3),
            broken=broken,
        )
        self._flush()
        with exclusively(self._folder / "dataset.json"):  # lest the rejects be one run's and the rows another's
            earlier = published_record(self._folder, self._shard)
            if earlier is not None:
                self.abort()
                return earlier, False
            self._rejects.publish()
            self._parquet.commit({FOOTER_KEY: json.dumps(asdict(record))})
            if not self._rejects.count:
                self._rejects.path.unlink(missing_ok=True)
        return record, True

    def abort(self) -> None:
        """Leave nothing behind."""
        self._parquet.abort()
        self._rejects.abort()

    def _lists(self, column: str, vectors: Float32Array) -> pa.Array:
        kind = self._schema.field(column).type
        flat = pa.array(vectors.astype(kind.value_type.to_pandas_dtype()).reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, type=kind)

    def _flush(self) -> None:
        if self._pending:
            self._parquet.write(pa.Table.from_batches(self._pending))
        self._pending = []
        self._pending_rows = self._pending_bytes = 0


_PARQUET_OPTIONS: dict[str, Any] = {
    "use_dictionary": False,
    "data_page_size": 1 << 28,  # a page for each row group; see mapped
    "write_statistics": ["key", "label"],
    # Embeddings are as good as random bits to a compressor; captions and metadata halve.
    "compression": {
        "embedding.list.element": "none",
        f"{PRE_PROJECTION}.list.element": "none",
        **dict.fromkeys(("key", *NORM_COLUMNS.values(), "label", "caption", "meta", "width", "height"), "zstd"),
        **dict.fromkeys(("tar_offset", "tar_size", "labels.list.element"), "zstd"),
    },
}


class _RejectsWriter:
    """A rejects file that is begun with the first reject and written as they come: they may be many."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._pending: list[Reject] = []
        self._pending_bytes = 0
        self._parquet: AtomicParquet | None = None

    def append(self, reject: Reject) -> None:
        self.count += 1
        self._pending.append(reject)
        self._pending_bytes += len(reject.key) + len(reject.member) + len(reject.reason)
        if len(self._pending) >= ROW_GROUP_ROWS or self._pending_bytes >= PENDING_BYTES:
            self._flush()

    def publish(self) -> None:
        self._flush()
        if self._parquet is not None:
            self._parquet.commit()

    def abort(self) -> None:
        if self._parquet is not None:
            self._parquet.abort()

    def _flush(self) -> None:
        if not self._pending:
            return
        if self._parquet is None:
            self._parquet = AtomicParquet(self.path, REJECT_SCHEMA, compression="zstd")
        self._parquet.write(pa.Table.from_pylist([asdict(r) for r in self._pending], schema=REJECT_SCHEMA))
        self._pending, self._pending_bytes = [], 0
