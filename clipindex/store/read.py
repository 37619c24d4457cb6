"""Reading a directory back: records, rows, labels and rejects."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipindex.errors import FingerprintError, StoreError
from clipindex.store.dataset import (
    FOOTER_KEY,
    LABELS_TYPE,
    REJECT_SCHEMA,
    ROW_GROUP_ROWS,
    Dataset,
    ShardRecord,
    embedding_schema,
    read_dataset,
)
from clipindex.store.mapped import MappedVectors
from clipindex.types import IntArray, Shard

MOST_COSINE = 1.01
"""Rounding to float16 lengthens a vector by a tenth of that at most."""
_OPEN_FILES = 48
_STATE_BYTES = 8192
_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What Arrow raises at damaged files: names of columns may be no UTF-8 any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingBatch:
    """Consecutive rows of one shard."""

    shard: ShardRecord
    first_row: int
    """Row number, within the shard, of the first row."""
    embedding: np.ndarray[Any, Any]
    """Unit vectors [n, D], in the directory's dtype: a view of what Arrow read, the batch's own."""
    columns: dict[str, Any]
    """The other columns that were asked for, as Arrow arrays of length n."""


def published_shards(folder: str | Path) -> dict[str, ShardRecord]:
    """Records of all published shards of a directory, by name, in name order.

    Raises:
        StoreError: A file in embeddings/ is not one of clipindex.
    """
    paths = sorted((Path(folder) / "embeddings").glob("[!.]*.parquet"))
    with ThreadPoolExecutor(8) as pool:  # a footer is one small read; on a network file system, one round trip
        return {path.stem: record for path, record in zip(paths, pool.map(read_record, paths), strict=True)}


def shard_states(folder: str | Path) -> dict[str, str]:
    """What tells, of each published shard, one version of its rows from another, whatever its file was copied to."""
    paths = sorted((Path(folder) / "embeddings").glob("[!.]*.parquet"))
    with ThreadPoolExecutor(8) as pool:
        states = zip(paths, pool.map(_state, paths), strict=True)
        return {path.stem: state for path, state in states if state is not None}


def _state(path: Path) -> str | None:
    """Size, and a hash of the file's end: there stand the record, with its time, and what leads to each column.

    None where the file has gone since it was listed.
    """
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _STATE_BYTES))
        return f"{size}-{hashlib.sha256(file.read()).hexdigest()[:16]}"
    return None


def published_record(folder: Path, shard: Shard) -> ShardRecord | None:
    """The record of a shard that is published, from the tar as it is now; None otherwise.

    Raises:
        StoreError: The file that should hold it is damaged.
    """
    path = folder / "embeddings" / f"{shard.name}.parquet"
    if not path.exists():
        return None
    record = read_record(path)
    return record if (record.size, record.version) == (shard.size, shard.version) else None


def read_record(path: Path) -> ShardRecord:
    """The record in an embeddings file's footer.

    Raises:
        StoreError: The file is not Parquet, or not of clipindex.
    """
    with _open_parquet(path) as file:
        return _record(path, file)


def _record(path: Path, file: pq.ParquetFile) -> ShardRecord:
    footer = file.metadata.metadata or {}
    try:
        record = ShardRecord(**json.loads(footer[FOOTER_KEY]))
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} was not written by clipindex; move it out of embeddings/") from error
    if (
        record.rows != file.metadata.num_rows
        or record.rows + record.rejects != record.samples
        or record.name != path.stem
    ):
        raise StoreError(f"{path}: its footer contradicts it; delete it and embed its tar again")
    return record


def read_rejects(folder: str | Path, name: str) -> pa.Table:
    """Rejects of one published shard (key, member, stage, reason, tar_offset); no rows where it has none.

    Raises:
        StoreError: A file is damaged, or the rejects are not those of the shard's embeddings.
    """
    expected = read_record(Path(folder) / "embeddings" / f"{name}.parquet").rejects
    if not expected:  # a file there is of an earlier run, stopped before it was removed
        return REJECT_SCHEMA.empty_table()
    path = Path(folder) / "rejects" / f"{name}.parquet"
    with _open_parquet(path) as file:
        try:
            rejects = file.read()
            rejects.validate(full=True)
        except _DAMAGE as error:
            raise StoreError(f"{path} is damaged ({error}); delete embeddings/{name}.parquet and run again") from error
    if not rejects.schema.equals(REJECT_SCHEMA):
        raise StoreError(f"{path} is no file of rejects; delete embeddings/{name}.parquet and run again")
    if rejects.num_rows != expected:
        wrong = f"{rejects.num_rows} rejects instead of {expected}"
        raise StoreError(f"{path} has {wrong}; delete embeddings/{name}.parquet and run again")
    return rejects


def read_embeddings(
    folder: str | Path, columns: Sequence[str] = (), names: Sequence[str] | None = None, vectors: str = "embedding"
) -> Iterator[EmbeddingBatch]:
    """Stream a directory's rows, shard by shard in name order and row group by row group.

    Args:
        folder: The embedding directory.
        columns: What to read beside the embeddings: any of the schema's columns.
        names: Shards to read; all published ones by default.
        vectors: The column that is given as `EmbeddingBatch.embedding`; see `find_vectors`.

    Yields:
        At most 2 x `ROW_GROUP_ROWS` rows at a time; nothing of earlier batches is kept.

    Raises:
        StoreError: A file is damaged, or was made by another model than the directory's.
    """
    folder = Path(folder)
    dataset = read_dataset(folder)
    if names is None:
        names = sorted(path.stem for path in (folder / "embeddings").glob("[!.]*.parquet"))
    for name in names:
        yield from _read_file(folder / "embeddings" / f"{name}.parquet", dataset, columns, vectors)


def check_cosines(batch: EmbeddingBatch, cosines: np.ndarray[Any, Any]) -> None:
    """Refuse cosines that unit vectors cannot have: damaged ones would be the best hits of every search.

    Raises:
        StoreError: One is above 1, or no number.
    """
    if not (cosines <= MOST_COSINE).all():
        raise StoreError(
            f"shard {batch.shard.name} has a damaged embedding among rows {batch.first_row} to"
            f" {batch.first_row + len(batch.embedding) - 1}; clipindex verify finds it"
        )


def read_rows(folder: str | Path, name: str, rows: Sequence[int] | IntArray, columns: Sequence[str]) -> pa.Table:
    """Some columns of some rows of a shard, in the order asked for; row groups without any of them are not read.

    Args:
        folder: The embedding directory.
        name: Of the shard.
        rows: Row numbers, ascending.
        columns: Of the schema.

    Raises:
        StoreError: The file is damaged.
    """
    path = Path(folder) / "embeddings" / f"{name}.parquet"
    wanted = np.asarray(rows, np.int64)
    tables = []
    with _open_parquet(path) as file:
        ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
        groups = np.searchsorted(ends, wanted, "right")
        for group in np.unique(groups):
            try:
                table = file.read_row_group(int(group), columns=list(columns))
                table.validate(full=True)
            except _DAMAGE as error:
                raise _damaged(path, error) from None
            tables.append(table.take(wanted[groups == group] - (ends[group] - table.num_rows)))
    return pa.concat_tables(tables)


class VectorReader:
    """Vectors of any rows of a directory, each by a seek of its own; the files that were asked last stay open."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._dataset = read_dataset(folder)
        self.dim = self._dataset.model.dim
        self.dtype = np.dtype(self._dataset.dtype)
        self._open: dict[str, MappedVectors] = {}

    def take(self, name: str, rows: IntArray) -> np.ndarray[Any, Any]:
        """Vectors [n, D] of some rows of a shard, in any order, in the directory's dtype.

        Raises:
            StoreError: The file is damaged, or has no such rows.
        """
        path = self.folder / "embeddings" / f"{name}.parquet"
        vectors = self._open.pop(name, None)
        try:
            if vectors is None:
                vectors = _map_vectors(path, _open_parquet(path), self._dataset)
            self._open[name] = vectors  # at the end of the line
            if len(self._open) > _OPEN_FILES:
                del self._open[next(iter(self._open))]
            if len(rows) and not 0 <= rows.min() <= rows.max() < vectors.num_rows:
                raise StoreError(f"{path} has {vectors.num_rows} rows: none is {rows.min()} or {rows.max()}")
            return vectors.take(rows)
        except _DAMAGE as error:
            raise _damaged(path, error) from None


def read_columns(
    folder: str | Path, columns: Sequence[str], names: Sequence[str] | None = None
) -> Iterator[tuple[str, dict[str, pa.Array]]]:
    """Shard name and some columns of a few thousand rows at a time, without their embeddings.

    Args:
        folder: The embedding directory.
        columns: Of the schema, at least one.
        names: Shards to read; all published ones by default.

    Raises:
        StoreError: A file is damaged, not of clipindex, or not of such a directory.
    """
    embeddings = Path(folder) / "embeddings"
    dataset = read_dataset(folder)
    for name in names if names is not None else sorted(path.stem for path in embeddings.glob("[!.]*.parquet")):
        path = embeddings / f"{name}.parquet"
        with _open_parquet(path) as file:
            _record(path, file)  # refuses what is not ours
            try:
                _check_schema(path, file, dataset)
                present = _present(file, columns)
                for batch in file.iter_batches(ROW_GROUP_ROWS, columns=present):
                    yield name, _arrays(batch, columns)
            except _DAMAGE as error:
                raise _damaged(path, error) from None


def _read_file(path: Path, dataset: Dataset, columns: Sequence[str], vectors: str) -> Iterator[EmbeddingBatch]:
    row = 0
    with _open_parquet(path) as file:
        record = _record(path, file)
        if record.fingerprint != dataset.model.fingerprint:
            raise FingerprintError(
                f"{path} has fingerprint {record.fingerprint[:12]}, its directory {dataset.model.fingerprint[:12]};"
                " delete it and embed its tar again"
            )
        mapped = _map_vectors(path, file, dataset, vectors)
        for group in range(file.num_row_groups):
            try:
                embedding = mapped.group(group)
                present = _present(file, columns)
                table = file.read_row_group(group, columns=present, use_threads=False).combine_chunks()
            except _DAMAGE as error:
                raise _damaged(path, error) from None
            if not len(embedding):
                continue
            yield EmbeddingBatch(
                shard=record,
                first_row=row,
                embedding=embedding,
                columns=_arrays(table.to_batches()[0], columns) if columns else {},
            )
            row += len(embedding)


def _present(file: pq.ParquetFile, columns: Sequence[str]) -> list[str]:
    """The columns that a file has: those of before `labels` came are read as if nothing were in it."""
    return [column for column in columns if column != "labels" or column in file.schema_arrow.names]


def _arrays(batch: pa.RecordBatch, columns: Sequence[str]) -> dict[str, pa.Array]:
    found = {column: batch.column(column) for column in columns if column in batch.schema.names}
    return {"labels": pa.nulls(batch.num_rows, LABELS_TYPE), **found} if "labels" in columns else found


def _check_schema(path: Path, file: pq.ParquetFile, dataset: Dataset) -> None:
    schema = embedding_schema(dataset)
    if not (file.schema_arrow.equals(schema) or file.schema_arrow.equals(schema.remove(schema.names.index("labels")))):
        before = "" if dataset.pre_projection is None else f" and {dataset.pre_projection.dim}-d pre-projection"
        raise StoreError(f"{path}: columns are not those of {dataset.model.dim}-d{before} {dataset.dtype} embeddings")


def _map_vectors(path: Path, file: pq.ParquetFile, dataset: Dataset, column: str = "embedding") -> MappedVectors:
    _check_schema(path, file, dataset)
    return MappedVectors(path, file, dataset.dtype, column)


def _damaged(path: Path, error: Exception) -> Exception:
    """What to raise at an error of reading a file; what the system says of itself is no damage."""
    if isinstance(error, OSError) and error.errno is not None:
        error.filename = error.filename or str(path)
        return error
    return StoreError(f"{path} is damaged ({error}); delete it and embed its tar again")


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except FileNotFoundError:
        raise StoreError(f"{path} is missing") from None
    except _DAMAGE as error:
        raise _damaged(path, error) from None
