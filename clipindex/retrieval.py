"""Search of a directory by text, by image, or by one of its own rows."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipindex.decode import decode_image
from clipindex.devices import choose_device, choose_precision
from clipindex.encode import ImageTower, TextTower
from clipindex.errors import SampleError, SourceError, StoreError, UsageError
from clipindex.models import LoadedModel, load_model_of
from clipindex.nearest import Filter, Nearest, nearest
from clipindex.store import (
    LABELS_TYPE,
    AtomicParquet,
    Dataset,
    VectorReader,
    read_columns,
    read_dataset,
    read_record,
    read_rows,
    shard_states,
)
from clipindex.types import Float32Array, ModelSpec
from clipindex.urls import read_range, stat_source

ATTEMPTS = 5
"""Where another run replaces shards while they are searched: rows would be others than those that were found."""
MOST_HITS = 1_000_000
"""Of a query; more are an export."""

_COLUMNS = ("key", "label", "labels", "caption", "tar_offset", "tar_size")
_STARTS = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"II*": "tif", b"MM": "tif"}
_HITS_SCHEMA = pa.schema(
    [
        ("query", pa.int32()),
        ("text", pa.string()),
        ("rank", pa.int32()),
        ("key", pa.string()),
        ("cosine", pa.float32()),
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("label", pa.int32()),
        ("labels", LABELS_TYPE),
        ("caption", pa.string()),
        ("url", pa.string()),
        ("tar_offset", pa.int64()),
        ("tar_size", pa.int64()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """What to look for: the sum of unit vectors, less those of `minus`, brought to unit length."""

    texts: tuple[str, ...] = ()
    images: tuple[str | Path, ...] = ()
    """Image files."""
    keys: tuple[str, ...] = ()
    """Of rows of the directory; SHARD:KEY where several shards have the key."""
    minus: tuple[str, ...] = ()
    """Texts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """A row that was found."""

    key: str
    cosine: float
    shard: str
    """Its name."""
    row: int
    """In the shard."""
    label: int | None
    caption: str | None
    url: str
    """Of its tar, or of the file it was imported from."""
    tar_offset: int | None
    """None where the tar is compressed, or where there is none."""
    tar_size: int
    labels: tuple[int, ...] | None = None
    """Of a row with any number of classes."""


def search(
    folder: str | Path,
    queries: Sequence[Query],
    *,
    k: int = 10,
    where: Filter | None = None,
    exact: bool = False,
    model: ModelSpec | None = None,
    device: str = "auto",
    precision: str = "auto",
    on_progress: Callable[[int], None] = lambda num_rows: None,
) -> list[list[Hit]]:
    """Find the rows with the highest cosine to each query: through the directory's index, or by looking at all rows.

    Args:
        folder: The embedding directory.
        queries: What to look for.
        k: Rows for each query; fewer where fewer pass the filter.
        where: Which rows may be found.
        exact: Look at all rows, though there is an index.
        model: How to load the model, where the directory's record does not lead to its weights on this machine. It is
            loaded only for texts and images.
        device: Where to run it.
        precision: In which.
        on_progress: Called with the number of rows searched.

    Returns:
        For each query its hits, best first.

    Raises:
        UsageError: A query is empty, or its parts cancel out.
        StoreError: A key is not in the directory, or in several shards.
        ClipindexError: Others of its kinds; see `errors`.
    """
    if not 1 <= k <= MOST_HITS:
        raise UsageError(f"k {k}: give at least 1, and at most {MOST_HITS:,}")
    if any(not text.strip() for query in queries for text in (*query.texts, *query.minus)):
        raise UsageError("a text is empty")
    if not queries:
        return []
    folder = Path(folder)
    dataset = read_dataset(folder)
    vectors = _query_vectors(folder, dataset, queries, model, device, precision)
    for _ in range(ATTEMPTS):
        states = shard_states(folder)
        failed: StoreError | None = None
        try:
            found = nearest(folder, vectors, k, where=where or Filter(), exact=exact, on_progress=on_progress)
            hits = _hits(folder, found)
        except StoreError as error:
            failed = error
        now = shard_states(folder)
        if all(now.get(name) == state for name, state in states.items()):  # others may have come
            if failed is not None:
                raise failed
            return hits
    raise StoreError(f"shards of {folder} are replaced faster than they are searched; wait until that is done")


def read_image(folder: str | Path, hit: Hit) -> bytes:
    """The encoded image of a hit of this directory, cut out of its tar.

    Raises:
        SourceError: The tar cannot be read, is compressed, or has changed since; or the row was imported.
    """
    record = read_record(Path(folder) / "embeddings" / f"{hit.shard}.parquet")
    if record.is_imported:
        raise SourceError(
            f"{hit.url} was imported: there are vectors in it, no images; meta may say where a row is from"
        )
    if hit.tar_offset is None:
        raise SourceError(f"{hit.url} is compressed: no offset leads to its images")
    if stat_source(hit.url) != (record.size, record.version):
        raise SourceError(
            f"{hit.url} changed since it was embedded: its offsets lead elsewhere; embed it with --refresh"
        )
    return read_range(hit.url, hit.tar_offset, hit.tar_size)


def file_name(hit: Hit, image: bytes) -> str:
    """A name for a hit's image that is a name anywhere: the end of its key, and an extension by content."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", hit.key)[-80:]
    kind = next((extension for start, extension in _STARTS.items() if image.startswith(start)), "img")
    return f"{stem}.{'webp' if image[8:12] == b'WEBP' else kind}"


def read_queries(path: str | Path) -> list[str]:
    """Texts, one a line; empty lines are passed over.

    Raises:
        UsageError: The file is missing, empty or no text.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise UsageError(f"{path}: no queries; write one a line")
    return texts


def write_hits(path: str | Path, queries: Sequence[Query], found: Sequence[Sequence[Hit]]) -> None:
    """Write all hits to a Parquet file: query (number from zero), text, rank (from one), and the fields of `Hit`."""
    rows = [
        {"query": at, "text": " + ".join(query.texts) or None, "rank": rank, **asdict(hit)}
        for at, (query, hits) in enumerate(zip(queries, found, strict=True))
        for rank, hit in enumerate(hits, 1)
    ]
    with AtomicParquet(Path(path), _HITS_SCHEMA, compression="zstd") as parquet:
        parquet.write(pa.Table.from_pylist(rows, schema=_HITS_SCHEMA))


def _query_vectors(
    folder: Path, dataset: Dataset, queries: Sequence[Query], model: ModelSpec | None, device: str, precision: str
) -> Float32Array:
    """Unit vectors [Q, D]."""
    loaded: LoadedModel | None = None
    if any(query.texts or query.images or query.minus for query in queries):
        loaded = load_model_of(folder, dataset.model, model)
    by_text = _embed_texts(
        loaded, [text for query in queries for text in (*query.texts, *query.minus)], device, precision
    )
    by_image = _embed_images(loaded, [path for query in queries for path in query.images], device, precision)
    by_key = _find_keys(folder, [key for query in queries for key in query.keys])
    sums = np.zeros((len(queries), dataset.model.dim), np.float32)
    for total, query in zip(sums, queries, strict=True):
        for text in query.texts:
            total += by_text[text]
        for text in query.minus:
            total -= by_text[text]
        for path in query.images:
            total += by_image[path]
        for key in query.keys:
            total += by_key[key]
    lengths = np.linalg.norm(sums, axis=1)
    if (lengths < 1e-6).any():
        raise UsageError(f"query {int(np.flatnonzero(lengths < 1e-6)[0]) + 1} is empty, or its parts cancel out")
    unit: Float32Array = sums / lengths[:, None]
    return unit


def _embed_texts(
    loaded: LoadedModel | None, texts: Sequence[str], device: str, precision: str
) -> dict[str, Float32Array]:
    if loaded is None or not texts:
        return {}
    chosen = choose_device(device)
    tower = TextTower(loaded, device=chosen, precision=choose_precision(precision, chosen))
    distinct = list(dict.fromkeys(texts))
    return dict(zip(distinct, tower.encode(distinct), strict=True))


def _embed_images(
    loaded: LoadedModel | None, paths: Sequence[str | Path], device: str, precision: str
) -> dict[str | Path, Float32Array]:
    if loaded is None or not paths:
        return {}
    chosen = choose_device(device)
    tower = ImageTower(loaded, device=chosen, precision=choose_precision(precision, chosen))
    distinct = list(dict.fromkeys(paths))
    pixels = tower.new_batch(len(distinct))
    for path, out in zip(distinct, pixels, strict=True):
        try:
            decode_image(Path(path).read_bytes(), loaded.info.preprocess, out)
        except OSError as error:
            raise SourceError(f"{path}: {error.strerror}") from error
        except SampleError as error:
            raise SampleError(f"{path}: {error}") from error
    return dict(zip(distinct, tower.encode(pixels).unit, strict=True))


def _find_keys(folder: Path, keys: Sequence[str]) -> dict[str, Float32Array]:
    """Vectors of rows, by what they are asked for as."""
    found: dict[str, list[tuple[str, Float32Array]]] = {key: [] for key in keys}
    if not keys:
        return {}
    wanted = pa.array(sorted({part for key in keys for part in (key, key.partition(":")[2])}), pa.string())
    reader, first = VectorReader(folder), dict[str, int]()
    for shard, columns in read_columns(folder, ("key",)):
        begin = first.setdefault(shard, 0)
        for at in np.flatnonzero(pc.is_in(columns["key"], wanted)).tolist():
            key = columns["key"][at].as_py()
            for name in (key, f"{shard}:{key}"):
                if name in found:
                    vector = reader.take(shard, np.array([begin + at]))[0]
                    found[name].append((shard, vector.astype(np.float32)))
        first[shard] = begin + len(columns["key"])
    for key, rows in found.items():
        if not rows:
            raise StoreError(f"{folder} has no row with key {key!r}; rejects have no embedding")
        if len(rows) > 1:
            shards = ", ".join(shard for shard, _ in rows[:4])
            raise StoreError(f"key {key!r} is in several shards: give SHARD:{key}, with one of {shards}")
    return {key: rows[0][1] for key, rows in found.items()}


def _hits(folder: Path, found: Nearest) -> list[list[Hit]]:
    hits = [
        [(found.names[shard], row, cosine) for shard, row, cosine in zip(*one, strict=True) if cosine > -np.inf]
        for one in zip(found.shards.tolist(), found.rows.tolist(), found.cosines.tolist(), strict=True)
    ]
    by_shard: dict[str, set[int]] = {}
    for shard, row, _ in itertools.chain.from_iterable(hits):
        by_shard.setdefault(shard, set()).add(row)
    urls: dict[str, str] = {}
    columns: dict[tuple[str, int], dict[str, Any]] = {}
    for shard, wanted in by_shard.items():
        urls[shard] = read_record(folder / "embeddings" / f"{shard}.parquet").url
        values = read_rows(folder, shard, sorted(wanted), _COLUMNS).to_pylist()
        for row, value in zip(sorted(wanted), values, strict=True):
            labels = value.pop("labels", None)  # which files of before there were lists lack
            columns[shard, row] = {**value, "labels": None if labels is None else tuple(labels)}
    return [
        [
            # Rounded to float16, a vector may be a hair longer than one.
            Hit(cosine=min(cosine, 1.0), shard=shard, row=row, url=urls[shard], **columns[shard, row])
            for shard, row, cosine in one
        ]
        for one in hits
    ]
