"""The check of a whole directory."""

import itertools
import random
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipindex.devices import choose_device, choose_precision
from clipindex.encode import ImageTower
from clipindex.errors import StoreError
from clipindex.models import load_model_of
from clipindex.store import Dataset, ShardRecord, check_fingerprint, read_dataset, read_record
from clipindex.types import ModelSpec
from clipindex.verification.faults import Fault, fault_of
from clipindex.verification.index import check_index
from clipindex.verification.shards import check_shard
from clipindex.verification.tars import Anew, check_tar, missing_shards, unlike_anew

SAMPLE = 256
FAULTS_A_SHARD = 20
"""After which nobody needs to be told more of it."""


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
    """Of those with what is stored, in whichever column of vectors."""
    seed: int
    """Of the drawing: other rows each time, unless it is given."""
    faults: list[Fault]
    notes: list[str]
    """What is no fault but might puzzle."""
    seconds: float


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
            texts and offset; and `sample` rows are embedded anew, for all columns of vectors. Imported shards have no
            tar, which is noted.
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
            faults.append(fault_of(path, error, "delete it and embed its tar again"))
    faults += missing_shards(sources, records) if sources else ()
    total = sum(record.rows for record in records)
    of_tars = sum(record.rows for record in records if not record.is_imported)
    chosen_seed = secrets.randbits(32) if seed is None else seed
    drawn = sorted(random.Random(chosen_seed).sample(range(of_tars), min(sample, of_tars)))
    cosines: list[float] = []
    checked = first = 0
    for record in records:
        found = check_shard(folder, dataset, record)
        if encoder is not None and not record.is_imported:
            anew = Anew(encoder, {at - first for at in drawn if first <= at < first + record.rows})
            found = itertools.chain(found, check_tar(folder, record, dataset, anew), unlike_anew(folder, record, anew))
            faults += itertools.islice(found, FAULTS_A_SHARD)
            cosines += anew.cosines()
            first += record.rows
        else:
            faults += itertools.islice(found, FAULTS_A_SHARD)
        checked += record.rows
        on_progress(checked, total)
    index_faults, index_notes = check_index(folder, dataset)
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
        faults=faults + index_faults,
        notes=[*_notes(folder, records), *index_notes, *(_not_checked(records) if deep else ())],
        seconds=round(time.perf_counter() - started, 3),
    )


def _encoder(folder: Path, dataset: Dataset, model: ModelSpec | None, device: str, precision: str) -> ImageTower:
    loaded = load_model_of(folder, dataset.model, model)
    both = dataset.pre_projection is not None
    if dataset.pre_projection is not None:
        check_fingerprint(folder, dataset.pre_projection, loaded.before_projection())
    chosen = choose_device(device)
    return ImageTower(loaded, device=chosen, precision=choose_precision(precision, chosen), with_pre_projection=both)


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
