"""An embedding directory in the layouts of other tools."""

import fnmatch
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from clipindex.atomic import create_exclusive, remove_stale_temporaries
from clipindex.errors import StoreError, UsageError
from clipindex.exchange import layouts
from clipindex.exchange.layouts import Block, Part
from clipindex.exchange.note import NOTE, read_note
from clipindex.store import (
    DTYPES,
    NORM_COLUMNS,
    Dataset,
    ShardRecord,
    find_vectors,
    model_before_projection,
    published_shards,
    read_dataset,
    read_embeddings,
)
from clipindex.types import ModelInfo

log = logging.getLogger(__name__)

_COLUMNS = ("key", "label", "labels", "caption", "meta", "width", "height", "tar_offset", "tar_size")


class _Layout(NamedTuple):
    paths: Callable[[Part], tuple[Path, ...]]
    write: Callable[[Path, Part, Iterable[Block]], None]


_LAYOUTS = {
    "npy": _Layout(layouts.npy_paths, layouts.write_npy),
    "parquet": _Layout(layouts.parquet_paths, layouts.write_parquet),
    "arrow": _Layout(layouts.arrow_paths, layouts.write_arrow),
}
FORMATS = tuple(_LAYOUTS)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSummary:
    """What an export did."""

    source: str
    out: str
    format: str
    dtype: str
    model: str
    fingerprint: str
    """Of the model; no other tool will keep it with the vectors."""
    vectors: str
    """As `ModelInfo.features`."""
    shards: int
    shards_done_before: int
    """By an earlier run that was stopped."""
    shards_empty: int
    """Without rows; there is no file for them."""
    rows: int
    """Of all shards."""
    seconds: float


def export_embeddings(
    folder: str | Path,
    out: str | Path,
    *,
    format: str,
    dtype: str | None = None,
    shards: Sequence[str] = (),
    pre_projection: bool = False,
    on_progress: Callable[[int, int], None] = lambda rows, total: None,
) -> ExportSummary:
    """Write an embedding directory's rows for other tools, a file or a pair of files a shard.

    A run that was stopped is finished by calling this again.

    Args:
        folder: The embedding directory.
        out: A folder that is new, empty, or of the same export.
        format: 'npy' (``img_emb/*.npy`` and ``metadata/*.parquet``, as clip-retrieval has them), 'parquet' (embeddings
            as lists), or 'arrow' (for ``datasets.load_from_disk``).
        dtype: Of the vectors: 'float16' or 'float32'. By default the directory's own; of 'parquet' float32, which more
            readers know.
        shards: Names of shards, or patterns of names; all by default.
        pre_projection: Write the features before the projection, and their norms, in the place of the embeddings.
        on_progress: Called with rows written or found, of how many.

    Raises:
        UsageError: No such format or dtype, no such shard, or no features before a projection.
        StoreError: The directory is none, is damaged or has no rows; or `out` holds something else.
    """
    started = time.perf_counter()
    if format not in _LAYOUTS:
        raise UsageError(f"format {format!r}: choose one of {', '.join(FORMATS)}")
    if dtype not in (None, *DTYPES):
        raise UsageError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    dataset = read_dataset(folder)
    model = _model(folder, dataset, pre_projection)
    vectors = find_vectors(Path(folder), dataset, model)
    chosen = dtype or ("float32" if format == "parquet" else dataset.dtype)
    records = _chosen(published_shards(folder), shards)
    filled = [record for record in records if record.rows]
    if not filled:
        raise StoreError(f"{folder} has no rows to export")
    _claim(Path(out), model, filled, format, chosen)
    layout = _LAYOUTS[format]
    total, rows, done_before = sum(record.rows for record in filled), 0, 0
    parts = [
        Part(name=record.name, number=at, of=len(filled), rows=record.rows, dim=model.dim, dtype=chosen)
        for at, record in enumerate(filled)
    ]
    for part, record in zip(parts, filled, strict=True):
        if all((Path(out) / path).exists() for path in layout.paths(part)):
            done_before += 1
        else:
            layout.write(Path(out), part, _blocks(folder, record, vectors, rows, total, on_progress))
        rows += part.rows
        on_progress(rows, total)
    if format == "arrow":
        layouts.finish_arrow(Path(out), parts)
    return ExportSummary(
        source=str(folder),
        out=str(out),
        format=format,
        dtype=chosen,
        model=model.spec.name,
        fingerprint=model.fingerprint,
        vectors=model.features,
        shards=len(filled),
        shards_done_before=done_before,
        shards_empty=len(records) - len(filled),
        rows=rows,
        seconds=round(time.perf_counter() - started, 3),
    )


def _model(folder: str | Path, dataset: Dataset, pre_projection: bool) -> ModelInfo:
    """Of the vectors that are exported."""
    if not pre_projection:
        if dataset.pre_projection is not None:
            log.info("%s: the features before the projection are not exported; --pre-projection exports them", folder)
        return dataset.model
    return model_before_projection(folder, dataset)


def _chosen(published: dict[str, ShardRecord], patterns: Sequence[str]) -> list[ShardRecord]:
    wanted: set[str] = set()
    for pattern in patterns:
        found = {pattern} & published.keys() or set(fnmatch.filter(published, pattern))
        if not found:
            raise UsageError(f"no shard is called {pattern!r}; their names are those of the files in embeddings/")
        wanted |= found
    return [record for name, record in published.items() if name in wanted or not patterns]


def _claim(out: Path, model: ModelInfo, records: Sequence[ShardRecord], form: str, dtype: str) -> None:
    """Make a folder the home of this export, or check that it is already."""
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out} is a file; an export goes into a folder")
    content = json.dumps([asdict(record) for record in records], sort_keys=True)
    note = {
        "format": form,
        "dtype": dtype,
        "model": asdict(model.spec),
        "fingerprint": model.fingerprint,
        "vectors": model.features,
        "shards": len(records),
        "rows": sum(record.rows for record in records),
        "records": hashlib.sha256(content.encode()).hexdigest(),
    }
    path = out / NOTE
    if not path.exists() and out.exists() and any(not found.name.startswith(".") for found in out.iterdir()):
        raise StoreError(f"{out} holds something that is no export; export into a new folder")
    create_exclusive(path, json.dumps(note, indent=2).encode() + b"\n")
    if read_note(out) != note:
        raise StoreError(f"{out} holds another export, or the directory has changed since; export into a new folder")
    for place in (out, out / "img_emb", out / "metadata"):
        remove_stale_temporaries(place)


def _blocks(
    folder: str | Path,
    record: ShardRecord,
    vectors: str,
    before: int,
    total: int,
    on_progress: Callable[[int, int], None],
) -> Iterator[Block]:
    """A shard's rows, `before` having come before; which shard it is, and which tar, goes with each of them."""
    norm = NORM_COLUMNS[vectors]
    for batch in read_embeddings(folder, (*_COLUMNS, norm), [record.name], vectors):
        count = len(batch.embedding)
        if batch.shard != record:
            raise StoreError(f"shard {record.name} was made anew while it was exported; export into a new folder")
        try:
            pa.table(batch.columns).validate(full=True)
        except pa.ArrowException as error:
            raise StoreError(f"shard {record.name} is damaged ({error}); clipindex verify says what to do") from error
        whence = {
            "shard": pa.array([record.name] * count, pa.string()),
            "tar_url": pa.array([record.url] * count, pa.string()),
        }
        if record.is_imported:
            whence |= {"tar_url": pa.nulls(count, pa.string()), "tar_size": pa.nulls(count, pa.int64())}
        yield Block(batch.embedding, {**batch.columns, "norm": batch.columns[norm], **whence})
        on_progress(before + batch.first_row + count, total)
