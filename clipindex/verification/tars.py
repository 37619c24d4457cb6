"""What the tars tell: that nothing of them is missing, and that rows are what their images give."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipindex.decode import decode_image
from clipindex.errors import SampleError, ShardError, SourceError, StoreError
from clipindex.shards import list_shards, read_samples
from clipindex.store import PRE_PROJECTION, Dataset, ShardRecord, read_embeddings, read_rejects
from clipindex.types import ImageEncoder, Reject, Sample, Shard, UInt8Array
from clipindex.urls import read_range, stat_source
from clipindex.verification.faults import REFRESH, Fault
from clipindex.verification.shards import COLUMNS

LEAST_COSINE = 0.999
"""Of an embedding made anew with the stored one; precisions and devices differ by a tenth of what is left."""
AT_ONCE = 32
"""Images that are embedded anew together."""


class Anew:
    """Embeds drawn images anew, some at a time, and keeps the cosines with what is stored."""

    def __init__(self, encoder: ImageEncoder, rows: set[int]) -> None:
        self.encoder = encoder
        self.rows = rows
        """Row numbers of the shard in hand."""
        self._pixels: list[UInt8Array] = []
        self._stored: list[list[np.ndarray[Any, Any]]] = []
        self._cosines: list[float] = []

    def add(self, pixels: UInt8Array, stored: list[np.ndarray[Any, Any]]) -> None:
        """Take a row's pixels [H, W, 3], and its stored vectors: of all kinds that the encoder gives, in its order."""
        self._pixels.append(pixels)
        self._stored.append([vector.astype(np.float32) for vector in stored])
        if len(self._pixels) == AT_ONCE:
            self._flush()

    def cosines(self) -> list[float]:
        """Of what was added, each the lesser where a row has two vectors."""
        self._flush()
        return self._cosines

    def _flush(self) -> None:
        if self._pixels:
            anew = self.encoder.encode(np.stack(self._pixels))
            kinds = [anew] if anew.pre_projection is None else [anew, anew.pre_projection]
            stored = zip(*self._stored, strict=True)
            cosines = [np.einsum("nd,nd->n", one.unit, np.stack(of)) for one, of in zip(kinds, stored, strict=True)]
            self._cosines += np.min(cosines, axis=0).tolist()
        self._pixels, self._stored = [], []


def missing_shards(sources: Sequence[str], records: Sequence[ShardRecord]) -> Iterator[Fault]:
    """Tars that ought to be published and are not, or not as they are now."""
    published = {record.name: record for record in records}
    for shard in list_shards(sources):
        record = published.get(shard.name)
        if record is None:
            yield Fault(path=shard.url, what="is not embedded", remedy="run embed on it")
        elif (record.size, record.version) != (shard.size, shard.version):
            yield Fault(path=shard.url, what="changed since it was embedded", remedy=REFRESH)


def check_tar(folder: Path, record: ShardRecord, dataset: Dataset, anew: Anew) -> Iterator[Fault]:
    """What the tar tells; what is drawn is embedded anew."""
    try:
        size, version = stat_source(record.url)
    except SourceError as error:
        yield Fault(
            path=record.url,
            what=str(error).removeprefix(f"{record.url}: ").partition("; ")[0],
            remedy="bring it back, or verify without --deep",
        )
        return
    if (size, version) != (record.size, record.version):
        yield Fault(path=record.url, what="changed since it was embedded", remedy=REFRESH)
        return
    shard = Shard(url=record.url, name=record.name, size=size, version=version)
    try:
        yield from _compare(folder, shard, record, dataset, anew)
    except SourceError as error:
        yield Fault(path=record.url, what=f"cannot be read: {error}", remedy="verify again once it can be")
    except (StoreError, pa.ArrowException):  # said by the check of the shard's own files
        return


def _compare(folder: Path, shard: Shard, record: ShardRecord, dataset: Dataset, anew: Anew) -> Iterator[Fault]:
    """Walk the tar beside what was made of it: each sample is the next row or the next reject."""

    def fault(what: str) -> Fault:
        path = folder / "embeddings" / f"{record.name}.parquet"
        return Fault(path=str(path), what=what, remedy=f"delete {path.name} and embed {record.url} again")

    rows, rejects = _rows(folder, record, dataset), iter(read_rejects(folder, record.name)["key"].to_pylist())
    row, reject = next(rows, None), next(rejects, None)
    breaks: list[str] = []
    for item in _until_it_breaks(shard, breaks):
        # A key that comes twice in the tar is a reject the second time.
        if row is not None and row["key"] == item.key and (isinstance(item, Sample) or reject != item.key):
            wrong = _differences(row, item)
            if wrong:
                yield fault(f"row {row['row']} (key {item.key!r}) is not the tar's: {', '.join(wrong)} differ")
            elif isinstance(item, Sample) and row["row"] in anew.rows:
                yield from map(fault, _embed_anew(shard, item, row, record, dataset, anew))
            row = next(rows, None)
        elif reject == item.key:
            reject = next(rejects, None)
        else:
            there = "no row" if row is None else f"the row of {row['key']!r}"
            yield fault(f"where the tar has key {item.key!r}, there is {there} and no reject")
            return
    if row is not None or reject is not None:
        yield fault(f"key {row['key'] if row else reject!r} is not in the tar")
    if breaks != ([] if record.broken is None else [record.broken]):
        said = " and ".join(breaks) or "it is whole"
        yield fault(f"its record says of the tar: {record.broken or 'it is whole'}; but {said}")


def _until_it_breaks(shard: Shard, breaks: list[str]) -> Iterator[Sample | Reject]:
    try:
        yield from read_samples(shard)
    except ShardError as error:
        breaks.append(str(error))


def _rows(folder: Path, record: ShardRecord, dataset: Dataset) -> Iterator[dict[str, Any]]:
    before = dataset.pre_projection
    for batch in read_embeddings(folder, COLUMNS if before is None else (*COLUMNS, PRE_PROJECTION), [record.name]):
        vectors = [batch.embedding]
        if before is not None:
            vectors.append(batch.columns.pop(PRE_PROJECTION).flatten().to_numpy().reshape(-1, before.dim))
        for at, row in enumerate(pa.table(batch.columns).to_pylist()):
            yield {**row, "row": batch.first_row + at, "vectors": [kind[at] for kind in vectors]}


def _differences(found: dict[str, Any], item: Sample | Reject) -> list[str]:
    if isinstance(item, Reject):
        return [f"it is no image there ({item.reason}); all"]
    expected = {
        "label": item.label,
        "labels": None if item.labels is None else list(item.labels),
        "caption": item.caption,
        "meta": item.meta,
        "tar_offset": item.tar_offset,
        "tar_size": len(item.image),
    }
    return [name for name, value in expected.items() if found[name] != value]


def _embed_anew(
    shard: Shard, item: Sample, found: dict[str, Any], record: ShardRecord, dataset: Dataset, anew: Anew
) -> Iterator[str]:
    """Decode a row's image, from where its offset leads."""
    where = f"row {found['row']} (key {item.key!r})"
    if item.tar_offset is not None and read_range(shard.url, item.tar_offset, len(item.image)) != item.image:
        yield f"{where}: its offset does not lead to its image"
        return
    pixels = np.empty((*dataset.model.preprocess.size, 3), np.uint8)
    try:
        size = decode_image(item.image, dataset.model.preprocess, pixels, fast=record.decoder == "fast")
    except SampleError as error:
        yield f"{where}: its image cannot be decoded now: {error}"
        return
    if size != (found["width"], found["height"]):
        yield f"{where}: its image is {size[0]} x {size[1]} pixels, not {found['width']} x {found['height']}"
    anew.add(pixels, found["vectors"])


def unlike_anew(folder: Path, record: ShardRecord, anew: Anew) -> Iterator[Fault]:
    """Whether rows of a shard are not what their images give."""
    cosines = anew.cosines()
    bad = sum(not cosine >= LEAST_COSINE for cosine in cosines)
    if bad:
        path = folder / "embeddings" / f"{record.name}.parquet"
        what = f"{bad} of {len(cosines)} images embedded anew differ: cosine {min(cosines):.4f} at worst"
        yield Fault(path=str(path), what=what, remedy=f"delete {path.name} and embed {record.url} again")
