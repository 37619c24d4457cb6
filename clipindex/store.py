"""Embedding directories: what is written for each shard, and how it is read back.

    DIR/dataset.json               format version, model, dim, dtype
    DIR/embeddings/<name>.parquet  one per tar; it is there whole, or not at all
    DIR/rejects/<name>.parquet     samples of that tar that did not become rows; only where there are any

Row id = (shard, row). The footer of each embeddings file carries, under the key `clipindex`, a `ShardRecord` as JSON.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipindex.errors import FingerprintError, StoreError
from clipindex.fileio import AtomicFile, create_exclusive, exclusively, remove_stale_temporaries
from clipindex.types import Float32Array, ModelInfo, ModelSpec, Preprocess, Reject, Sample, Shard

FORMAT_VERSION = 1
ROW_GROUP_ROWS = 16_384
"""16 MiB of 512 float16: read back at 870k rows/s, where groups of 200k rows give 180k (page-faulting fresh memory)."""
PENDING_BYTES = 64 << 20
"""Rows are written out at this size as well: captions may be of any length."""
DTYPES = ("float16", "float32")

_FOOTER_KEY = b"clipindex"
_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What Arrow raises at damaged files: names of columns may be no UTF-8 any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """What all shards of an embedding directory share: the content of dataset.json."""

    format_version: int
    model: ModelInfo
    dtype: str
    """Of the embedding column: 'float16' or 'float32'."""
    created_by: str
    """Program and version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """Where a published shard came from and what became of its samples."""

    name: str
    url: str
    size: int
    """Bytes of the tar."""
    version: str
    """Of the tar when it was read, as in `Shard`."""
    samples: int
    rows: int
    rejects: int
    fingerprint: str
    precision: str
    """Of the weights, when these rows were made."""
    decoder: str
    """'exact' or 'fast'."""
    device: str
    seconds: float
    """From the shard's first sample to its publication."""
    broken: str | None = None
    """Where and why the tar's stream breaks, of a shard whose samples before that were salvaged."""


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


def embedding_schema(dim: int, dtype: str) -> pa.Schema:
    """Arrow schema of an embeddings file; no part of an embedding is nullable, which quintuples reading speed."""
    element = pa.float16() if dtype == "float16" else pa.float32()
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("embedding", pa.list_(pa.field("element", element, nullable=False), dim), nullable=False),
            pa.field("norm", pa.float32(), nullable=False),
            pa.field("label", pa.int32()),
            pa.field("caption", pa.string()),
            pa.field("meta", pa.string()),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("tar_offset", pa.int64()),
            pa.field("tar_size", pa.int64(), nullable=False),
        ]
    )


REJECT_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("member", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("tar_offset", pa.int64()),
    ]
)


def open_dataset(folder: Path, model: ModelInfo, dtype: str, created_by: str) -> Dataset:
    """Make a directory the home of one model's embeddings, or check that it is already.

    Raises:
        FingerprintError: It holds another model's embeddings; both are named.
        StoreError: It holds embeddings of another dtype, or dataset.json is damaged.
    """
    wanted = Dataset(format_version=FORMAT_VERSION, model=model, dtype=dtype, created_by=created_by)
    document = json.dumps(asdict(wanted), indent=2).encode() + b"\n"
    create_exclusive(folder / "dataset.json", document)
    found = read_dataset(folder)
    check_fingerprint(folder, found.model, model)
    if found.dtype != dtype:
        raise StoreError(f"{folder} holds {found.dtype} embeddings; pass --dtype {found.dtype} or another --out")
    remove_stale_temporaries(folder)
    remove_stale_temporaries(folder / "embeddings")
    remove_stale_temporaries(folder / "rejects")
    return found


def read_dataset(folder: str | Path) -> Dataset:
    """What a directory's dataset.json says.

    Raises:
        StoreError: There is none, or it cannot be understood.
    """
    path = Path(folder) / "dataset.json"
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StoreError(f"{folder} is no embedding directory: it has no dataset.json") from None
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}); restore it, or embed into a new directory") from error
    if isinstance(document, dict) and document.get("format_version") != FORMAT_VERSION:
        found = document.get("format_version")
        raise StoreError(f"{path}: format version {found}; this clipindex reads version {FORMAT_VERSION}")
    try:
        return replace(Dataset(**document), model=_model_info(document["model"]))
    except (TypeError, KeyError, ValueError) as error:
        raise StoreError(f"{path} lacks what it should hold ({error}); restore it") from error


def _model_info(document: dict[str, Any]) -> ModelInfo:
    preprocess: dict[str, Any] = {
        field: tuple(value) if isinstance(value, list) else value for field, value in document["preprocess"].items()
    }
    return ModelInfo(**{**document, "spec": ModelSpec(**document["spec"]), "preprocess": Preprocess(**preprocess)})


def check_fingerprint(where: Path, found: ModelInfo, wanted: ModelInfo) -> None:
    """Refuse to mix models.

    Raises:
        FingerprintError: The fingerprints differ.
    """
    if found.fingerprint != wanted.fingerprint:
        raise FingerprintError(
            f"{where} holds embeddings of {describe_model(found)}, not of {describe_model(wanted)};"
            " use that model, or another directory"
        )


def describe_model(model: ModelInfo) -> str:
    """One phrase for a person: name, weights, dimensions, short fingerprint."""
    spec = model.spec
    weights = f"random weights, seed {spec.random_init}" if spec.random_init is not None else spec.pretrained
    return f"{spec.name}{f' ({weights})' if weights else ''} [{model.dim}-d, fingerprint {model.fingerprint[:12]}]"


class AtomicParquet:
    """A Parquet file that appears under its name with its last row, or not at all; `commit` or `abort` ends it."""

    def __init__(self, path: Path, schema: pa.Schema, **options: Any) -> None:  # noqa: ANN401 - of pq.ParquetWriter
        self._file = AtomicFile(path)
        self._writer = pq.ParquetWriter(self._file.file, schema, **options)

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
        self._schema = embedding_schema(dataset.model.dim, dataset.dtype)
        self._rejects = _RejectsWriter(folder / "rejects" / f"{shard.name}.parquet")
        self._pending: list[pa.RecordBatch] = []
        self._rows = 0
        self._pending_rows = 0
        self._pending_bytes = 0
        self._parquet = AtomicParquet(folder / "embeddings" / f"{shard.name}.parquet", self._schema, **_PARQUET_OPTIONS)

    def append(
        self,
        samples: Sequence[Sample],
        embeddings: Float32Array,
        norms: Float32Array,
        sizes: Sequence[tuple[int, int]],
    ) -> None:
        """Add rows: samples [n], unit embeddings [n, D], norms [n], source (width, height) [n]."""
        element = self._schema.field("embedding").type.value_type.to_pandas_dtype()
        flat = pa.array(embeddings.astype(element).reshape(-1))
        columns = [
            pa.array([sample.key for sample in samples], pa.string()),
            pa.FixedSizeListArray.from_arrays(flat, type=self._schema.field("embedding").type),
            pa.array(norms, pa.float32()),
            pa.array([sample.label for sample in samples], pa.int32()),
            pa.array([sample.caption for sample in samples], pa.string()),
            pa.array([sample.meta for sample in samples], pa.string()),
            pa.array([width for width, _ in sizes], pa.int32()),
            pa.array([height for _, height in sizes], pa.int32()),
            pa.array([sample.tar_offset for sample in samples], pa.int64()),
            pa.array([len(sample.image) for sample in samples], pa.int64()),
        ]
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
            self._parquet.commit({_FOOTER_KEY: json.dumps(asdict(record))})
            if not self._rejects.count:
                self._rejects.path.unlink(missing_ok=True)
        return record, True

    def abort(self) -> None:
        """Leave nothing behind."""
        self._parquet.abort()
        self._rejects.abort()

    def _flush(self) -> None:
        if self._pending:
            self._parquet.write(pa.Table.from_batches(self._pending))
        self._pending = []
        self._pending_rows = self._pending_bytes = 0


_PARQUET_OPTIONS: dict[str, Any] = {
    "use_dictionary": False,
    "write_statistics": ["key", "label"],
    # Embeddings are as good as random bits to a compressor; captions and metadata halve.
    "compression": {
        "embedding.list.element": "none",
        **dict.fromkeys(("key", "norm", "label", "caption", "meta", "width", "height"), "zstd"),
        **dict.fromkeys(("tar_offset", "tar_size"), "zstd"),
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


def published_shards(folder: str | Path) -> dict[str, ShardRecord]:
    """Records of all published shards of a directory, by name, in name order.

    Raises:
        StoreError: A file in embeddings/ is not one of clipindex.
    """
    paths = sorted((Path(folder) / "embeddings").glob("[!.]*.parquet"))
    with ThreadPoolExecutor(8) as pool:  # a footer is one small read; on a network file system, one round trip
        return {path.stem: record for path, record in zip(paths, pool.map(read_record, paths), strict=True)}


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
        footer = file.metadata.metadata or {}
        rows = file.metadata.num_rows
    try:
        record = ShardRecord(**json.loads(footer[_FOOTER_KEY]))
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} was not written by clipindex; move it out of embeddings/") from error
    if record.rows != rows or record.rows + record.rejects != record.samples or record.name != path.stem:
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
    folder: str | Path, columns: Sequence[str] = (), names: Sequence[str] | None = None
) -> Iterator[EmbeddingBatch]:
    """Stream a directory's rows, shard by shard in name order and row group by row group.

    Args:
        folder: The embedding directory.
        columns: What to read beside the embeddings: any of the schema's columns.
        names: Shards to read; all published ones by default.

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
        path = folder / "embeddings" / f"{name}.parquet"
        record = read_record(path)
        if record.fingerprint != dataset.model.fingerprint:
            raise FingerprintError(
                f"{path} has fingerprint {record.fingerprint[:12]}, its directory {dataset.model.fingerprint[:12]};"
                " delete it and embed its tar again"
            )
        yield from _read_file(path, record, dataset, columns)


def read_labels(folder: str | Path, names: Sequence[str] | None = None) -> Iterator[tuple[str, pa.Array, pa.Array]]:
    """Shard name, keys and labels of each row group, without reading its embeddings.

    Raises:
        StoreError: A file is damaged, or not of clipindex.
    """
    embeddings = Path(folder) / "embeddings"
    for name in names if names is not None else sorted(path.stem for path in embeddings.glob("[!.]*.parquet")):
        read_record(embeddings / f"{name}.parquet")  # refuses what is not ours, which may lack the columns
        with _open_parquet(embeddings / f"{name}.parquet") as file:
            try:
                for batch in file.iter_batches(ROW_GROUP_ROWS, columns=["key", "label"]):
                    yield name, batch.column("key"), batch.column("label")
            except _DAMAGE as error:
                raise StoreError(f"{embeddings / name}.parquet is damaged ({error}); embed its tar again") from error


def _read_file(path: Path, record: ShardRecord, dataset: Dataset, columns: Sequence[str]) -> Iterator[EmbeddingBatch]:
    row = 0
    with _open_parquet(path) as file:
        expected = embedding_schema(dataset.model.dim, dataset.dtype)
        if not file.schema_arrow.equals(expected):
            raise StoreError(f"{path}: columns are not those of {dataset.model.dim}-d {dataset.dtype} embeddings")
        for group in range(file.num_row_groups):
            try:
                table = file.read_row_group(group, columns=["embedding", *columns], use_threads=False)
            except _DAMAGE as error:
                raise StoreError(f"{path} is damaged ({error}); delete it and embed its tar again") from error
            for batch in table.to_batches():
                flat = batch.column("embedding").flatten()
                # Through the buffer, since Arrow's own views are read-only, which PyTorch will not take.
                values = np.frombuffer(flat.buffers()[1], dataset.dtype)[flat.offset : flat.offset + len(flat)]
                yield EmbeddingBatch(
                    shard=record,
                    first_row=row,
                    embedding=values.reshape(batch.num_rows, dataset.model.dim),
                    columns={column: batch.column(column) for column in columns},
                )
                row += batch.num_rows


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except FileNotFoundError:
        raise StoreError(f"{path} is missing") from None
    except _DAMAGE as error:
        raise StoreError(f"{path} is damaged ({error}); delete it and embed its tar again") from error
