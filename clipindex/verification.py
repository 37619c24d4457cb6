"""Whether an embedding directory is what it says it is: its files, the law, and on wish the tars it was made of."""

import contextlib
import itertools
import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipindex.decode import decode_image
from clipindex.devices import choose_device, choose_precision
from clipindex.encode import ImageTower
from clipindex.errors import SampleError, ShardError, SourceError, StoreError
from clipindex.index.files import METADATA, check_files, open_index
from clipindex.index.files import read_record as read_index_record
from clipindex.index.plan import default_memory_bytes
from clipindex.models import load_model
from clipindex.multi_label import unpack_labels
from clipindex.nearest import compare_shards
from clipindex.shards import list_shards, read_samples, shard_name
from clipindex.store import (
    Dataset,
    EmbeddingBatch,
    ShardRecord,
    check_fingerprint,
    read_dataset,
    read_embeddings,
    read_record,
    read_rejects,
    shard_states,
)
from clipindex.types import ImageEncoder, ModelSpec, Reject, Sample, Shard, UInt8Array
from clipindex.urls import read_range, stat_source

UNIT_TOLERANCE = 1e-3
"""Of an embedding's length; rounding to float16 moves it by less."""
LEAST_COSINE = 0.999
"""Of an embedding made anew with the stored one; precisions and devices differ by a tenth of what is left."""
SAMPLE = 256
AT_ONCE = 32
"""Images that are embedded anew together."""
FAULTS_A_SHARD = 20
"""After which nobody needs to be told more of it."""

_REFRESH = "run embed with --refresh"
_COLUMNS = ("key", "norm", "label", "labels", "caption", "meta", "width", "height", "tar_offset", "tar_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something that is not as it should be."""

    path: str
    """File or URL."""
    what: str
    remedy: str


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifySummary:
    """What was checked, and what was found."""

    out: str
    model: str
    fingerprint: str
    shards: int
    samples: int
    rows: int
    rejects: int
    deep: bool
    embedded_again: int
    """Rows drawn at random whose images were cut out of their tars and embedded anew."""
    least_cosine: float | None
    """Of those with what is stored."""
    seed: int
    """Of the drawing: other rows each time, unless it is given."""
    faults: list[Fault]
    notes: list[str]
    """What is no fault but might puzzle."""
    seconds: float


class _Anew:
    """Embeds drawn images anew, some at a time, and keeps the cosines with what is stored."""

    def __init__(self, encoder: ImageEncoder, rows: set[int]) -> None:
        self.encoder = encoder
        self.rows = rows
        """Row numbers of the shard in hand."""
        self._pixels: list[UInt8Array] = []
        self._stored: list[np.ndarray[Any, Any]] = []
        self._cosines: list[float] = []

    def add(self, pixels: UInt8Array, stored: np.ndarray[Any, Any]) -> None:
        self._pixels.append(pixels)
        self._stored.append(stored.astype(np.float32))
        if len(self._pixels) == AT_ONCE:
            self._flush()

    def cosines(self) -> list[float]:
        """Of what was added."""
        self._flush()
        return self._cosines

    def _flush(self) -> None:
        if self._pixels:
            anew, _ = self.encoder.encode(np.stack(self._pixels))
            self._cosines += np.einsum("nd,nd->n", anew, np.stack(self._stored)).tolist()
        self._pixels, self._stored = [], []


def verify(
    folder: str | Path,
    sources: Sequence[str] = (),
    *,
    deep: bool = False,
    sample: int = SAMPLE,
    seed: int | None = None,
    model: ModelSpec | None = None,
    device: str = "auto",
    precision: str = "auto",
    on_progress: Callable[[int, int], None] = lambda rows, total: None,
) -> VerifySummary:
    """Check an embedding directory.

    Every file is read: records, schema, fingerprint, unit norms, the order of rows, keys, and that rows and rejects add
    up to samples.

    Args:
        folder: The embedding directory.
        sources: Tars that must all be there, as for `embed_job.embed`; without them, nobody can know what is missing.
        deep: Read the tars again as well: each sample must be at its place as a row or a reject, with its label,
            texts and offset; and `sample` rows are embedded anew. Imported shards have no tar, which is noted.
        sample: Rows, drawn at random over all shards.
        seed: Of the drawing.
        model: How to load the model, where the directory's record does not lead to its weights on this machine.
        device: Where to embed.
        precision: In which.
        on_progress: Called with rows checked, of how many.

    Raises:
        StoreError: The folder is no embedding directory.
        ClipindexError: The model for `deep` cannot be loaded or is another one. Faults are returned, not raised.
    """
    started = time.perf_counter()
    folder = Path(folder)
    dataset = read_dataset(folder)
    encoder = _encoder(folder, dataset, model, device, precision) if deep else None
    faults: list[Fault] = []
    records: list[ShardRecord] = []
    for path in sorted((folder / "embeddings").glob("[!.]*.parquet")):
        try:
            records.append(read_record(path))
        except StoreError as error:
            faults.append(_fault(path, error, "delete it and embed its tar again"))
    faults += _missing(sources, records) if sources else ()
    total = sum(record.rows for record in records)
    of_tars = sum(record.rows for record in records if not record.is_imported)
    chosen_seed = secrets.randbits(32) if seed is None else seed
    drawn = sorted(random.Random(chosen_seed).sample(range(of_tars), min(sample, of_tars)))
    cosines: list[float] = []
    checked = first = 0
    for record in records:
        found = _check_shard(folder, dataset, record)
        if encoder is not None and not record.is_imported:
            anew = _Anew(encoder, {at - first for at in drawn if first <= at < first + record.rows})
            found = itertools.chain(found, _check_tar(folder, record, dataset, anew), _unlike(folder, record, anew))
            faults += itertools.islice(found, FAULTS_A_SHARD)
            cosines += anew.cosines()
            first += record.rows
        else:
            faults += itertools.islice(found, FAULTS_A_SHARD)
        checked += record.rows
        on_progress(checked, total)
    faults += _check_index(folder, dataset)
    return VerifySummary(
        out=str(folder),
        model=dataset.model.spec.name,
        fingerprint=dataset.model.fingerprint,
        shards=len(records),
        samples=sum(record.samples for record in records),
        rows=total,
        rejects=sum(record.rejects for record in records),
        deep=deep,
        embedded_again=len(cosines),
        least_cosine=min(cosines, default=None),
        seed=chosen_seed,
        faults=faults,
        notes=[*_notes(folder, records), *_unindexed(folder), *(_not_checked(records) if deep else ())],
        seconds=round(time.perf_counter() - started, 3),
    )


def _encoder(folder: Path, dataset: Dataset, model: ModelSpec | None, device: str, precision: str) -> ImageTower:
    loaded = load_model(model or dataset.model.spec)
    check_fingerprint(folder, dataset.model, loaded.info)
    chosen = choose_device(device)
    return ImageTower(loaded, device=chosen, precision=choose_precision(precision, chosen))


def _fault(path: Path, error: Exception, remedy: str) -> Fault:
    """An error as a fault: its advice and its path are said once."""
    what = str(error).partition("; ")[0].removeprefix(str(path)).lstrip(": ")
    return Fault(path=str(path), what=what, remedy=remedy)


def _missing(sources: Sequence[str], records: Sequence[ShardRecord]) -> Iterator[Fault]:
    """Tars that ought to be published and are not, or not as they are now."""
    published = {record.name: record for record in records}
    for shard in list_shards(sources):
        record = published.get(shard.name)
        if record is None:
            yield Fault(path=shard.url, what="is not embedded", remedy="run embed on it")
        elif (record.size, record.version) != (shard.size, shard.version):
            yield Fault(path=shard.url, what="changed since it was embedded", remedy=_REFRESH)


def _check_index(folder: Path, dataset: Dataset) -> Iterator[Fault]:
    """Of the index, where there is one: whether its files are whole, and of these embeddings."""
    path = folder / "index" / METADATA
    remedy = "run clipindex index --rebuild"
    try:
        record = read_index_record(folder)
        if record is None:
            return
        wrong = [Fault(path=str(at), what=what, remedy=remedy) for at, what in check_files(folder, record)]
        if record.fingerprint != dataset.model.fingerprint:
            wrong.append(Fault(path=str(path), what="is of another model's embeddings", remedy=remedy))
        if not wrong:
            open_index(folder, default_memory_bytes())
        yield from wrong
    except StoreError as error:
        yield _fault(path, error, remedy)


def _unindexed(folder: Path) -> list[str]:
    with contextlib.suppress(StoreError):
        opened = open_index(folder, default_memory_bytes())
        known, new = compare_shards(shard_states(folder), opened.shards) if opened else ([], [])
        if opened and (new or len(known) < len(opened.shards)):
            return ["the index is not that of the shards as they are now; clipindex index brings it up to date"]
    return []


def _check_shard(folder: Path, dataset: Dataset, record: ShardRecord) -> Iterator[Fault]:
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
        for batch in read_embeddings(folder, _COLUMNS, [record.name]):
            pa.table(batch.columns).validate(full=True)
            yield from map(fault, _bad_vectors(batch))
            yield from map(fault, _bad_lists(batch))
            keys.update(batch.columns["key"].to_pylist())
            rows += len(batch.embedding)
            offsets = batch.columns["tar_offset"].drop_null().to_numpy()
            if np.any(np.diff(offsets, prepend=last_offset) <= 0):
                yield fault(f"rows from {batch.first_row} on are not in the order of their tar")
            last_offset = offsets[-1] if len(offsets) else last_offset
    except (StoreError, pa.ArrowException) as error:
        yield _fault(path, error, remedy)
        return
    if len(keys) != rows:
        yield fault(f"{rows - len(keys)} keys come twice")
    # A key that came twice in the tar is a row once, and a reject of the tar stage after that.
    stages = zip(rejects["key"].to_pylist(), rejects["stage"].to_pylist(), strict=True)
    both = next((key for key, stage in stages if stage != "tar" and key in keys), None)
    if both is not None:
        yield fault(f"key {both!r} is a row and a reject at once")


def _bad_vectors(batch: EmbeddingBatch) -> Iterator[str]:
    lengths = np.linalg.norm(batch.embedding.astype(np.float32), axis=1)
    norms = batch.columns["norm"].to_numpy()
    for what, values, bad in (
        ("an embedding of length", lengths, ~(np.abs(lengths - 1) <= UNIT_TOLERANCE)),
        ("a norm of", norms, ~(np.isfinite(norms) & (norms > 0))),
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


def _check_tar(folder: Path, record: ShardRecord, dataset: Dataset, anew: _Anew) -> Iterator[Fault]:
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
        yield Fault(path=record.url, what="changed since it was embedded", remedy=_REFRESH)
        return
    shard = Shard(url=record.url, name=record.name, size=size, version=version)
    try:
        yield from _compare(folder, shard, record, dataset, anew)
    except SourceError as error:
        yield Fault(path=record.url, what=f"cannot be read: {error}", remedy="verify again once it can be")
    except (StoreError, pa.ArrowException):  # said by the check of the shard's own files
        return


def _compare(folder: Path, shard: Shard, record: ShardRecord, dataset: Dataset, anew: _Anew) -> Iterator[Fault]:
    """Walk the tar beside what was made of it: each sample is the next row or the next reject."""

    def fault(what: str) -> Fault:
        path = folder / "embeddings" / f"{record.name}.parquet"
        return Fault(path=str(path), what=what, remedy=f"delete {path.name} and embed {record.url} again")

    rows, rejects = _rows(folder, record), iter(read_rejects(folder, record.name)["key"].to_pylist())
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


def _rows(folder: Path, record: ShardRecord) -> Iterator[dict[str, Any]]:
    for batch in read_embeddings(folder, _COLUMNS, [record.name]):
        for at, row in enumerate(pa.table(batch.columns).to_pylist()):
            yield {**row, "row": batch.first_row + at, "embedding": batch.embedding[at]}


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
    shard: Shard, item: Sample, found: dict[str, Any], record: ShardRecord, dataset: Dataset, anew: _Anew
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
    anew.add(pixels, found["embedding"])


def _unlike(folder: Path, record: ShardRecord, anew: _Anew) -> Iterator[Fault]:
    cosines = anew.cosines()
    bad = sum(not cosine >= LEAST_COSINE for cosine in cosines)
    if bad:
        path = folder / "embeddings" / f"{record.name}.parquet"
        what = f"{bad} of {len(cosines)} images embedded anew differ: cosine {min(cosines):.4f} at worst"
        yield Fault(path=str(path), what=what, remedy=f"delete {path.name} and embed {record.url} again")


def _notes(folder: Path, records: list[ShardRecord]) -> list[str]:
    rejects = {record.name: record.rejects for record in records}
    notes = [
        f"{path} belongs to no published shard; the next run that embeds its tar replaces it"
        for path in sorted((folder / "rejects").glob("[!.]*.parquet"))
        if not rejects.get(path.stem)
    ]
    notes += [f"{path} is of a run that goes on, or was killed; the next run then removes it"
              for path in sorted([*folder.rglob(".*.tmp"), *folder.glob(".run.*.hand")])]  # fmt: skip
    return notes + [
        f"{record.url} was salvaged: {record.broken.removeprefix(f'{record.url}: ')}"
        for record in records
        if record.broken is not None
    ]


def _not_checked(records: Sequence[ShardRecord]) -> list[str]:
    """What reading the tars again leaves open."""
    imported = [record for record in records if record.is_imported]
    if not imported:
        return []
    rows = sum(record.rows for record in imported)
    return [
        f"{len(imported):,} shards ({rows:,} rows) were imported, {imported[0].url} first: of these only their own"
        " files are checked, since there is no tar to compare them with and no image to embed anew"
    ]
