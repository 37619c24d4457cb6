"""Vectors that another program made, as shards of an embedding directory."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipindex.errors import FingerprintError, ShardError, SourceError, StoreError, UsageError
from clipindex.exchange.checked import CheckedBlock, open_checked
from clipindex.exchange.note import NOTE, read_note
from clipindex.exchange.sources import VECTORS, Pair, list_pairs
from clipindex.exchange.twins import Twins
from clipindex.models import load_model
from clipindex.store import (
    DTYPES,
    IMPORTED,
    Dataset,
    ShardRecord,
    ShardWriter,
    claim_dataset,
    describe_model,
    open_dataset,
    plan_shards,
    published_shards,
)
from clipindex.types import ModelInfo, ModelSpec, Reject, Sample, Shard, Vectors
from clipindex.urls import local_path, stat_source
from clipindex.version import CREATED_BY

UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportSummary:
    """What an import did."""

    source: str
    out: str
    model: str
    """Which is what the user says: vectors do not tell."""
    fingerprint: str
    shards: int
    """Files of vectors that have rows beside them."""
    shards_done_before: int
    shards_imported: int
    shards_changed: list[str]
    """Files that differ from what their published rows were made of, and were left so."""
    shards_done_elsewhere: int
    """By another run on the same directory, since this one began."""
    shards_there: dict[str, str]
    """Files whose rows the directory had already, of another source or of a tar, and the shard that has them."""
    shards_failed: dict[str, str]
    """File and why; these are not published."""
    samples: int
    """Vectors of this run, as all counts below."""
    rows: int
    rejects: int
    rejects_by_stage: dict[str, int]
    normalised: int
    """Rows whose vectors were not of unit length; their length is kept."""
    seconds: float
    vectors_per_s: float

    @property
    def reject_rate(self) -> float:
        """Rejects of all samples, 0 to 1."""
        return self.rejects / self.samples if self.samples else 0.0


class _Imported(NamedTuple):
    record: ShardRecord
    is_ours: bool
    reject_stages: Counter[str]
    normalised: int


class _Outcome(NamedTuple):
    """What became of each file of a run."""

    imported: list[_Imported]
    there: dict[str, str]
    """As of `ImportSummary.shards_there`, and so the next."""
    failed: dict[str, str]


class _Progress:
    """Adds up vectors, and bytes of files: also of those that end early."""

    def __init__(self, num_bytes: int, report: Callable[[int, float], None]) -> None:
        self._num_bytes = num_bytes
        self._report = report
        self._rows = 0
        self._bytes_of_file = self._bytes_before = 0

    def add(self, rows: int, num_bytes: int) -> None:
        self._rows += rows
        self._bytes_of_file += num_bytes
        self._report(self._rows, (self._bytes_before + self._bytes_of_file) / self._num_bytes)

    def finish(self, shard: Shard) -> None:
        self._bytes_before += shard.size
        self._bytes_of_file = 0


def import_embeddings(
    source: str | Path,
    out: str | Path,
    *,
    model: str,
    pretrained: str | None = None,
    random_init: int | None = None,
    quick_gelu: bool | None = None,
    ids: str | Path | None = None,
    dtype: str = "float16",
    refresh: bool = False,
    on_progress: Callable[[int, float], None] = lambda rows, share: None,
) -> ImportSummary:
    """Take over vectors that another program made: each .npy file becomes a shard.

    Columns `key` (else `image_path`), `label`, `labels`, `caption`, `width`, `height` and `norm` of the rows keep their
    places; all others go into `meta`. Files that are published already are passed over, and so are those whose rows
    (the same keys in the same order, with the same vectors; rejects apart) a shard of another source has. A directory
    without dataset.json gets one when the first file has been read and is about to be published.

    Args:
        source: What clip-retrieval wrote (``img_emb/*.npy``, ``metadata/*.parquet``), or one .npy file.
        out: The embedding directory, made where there is none.
        model: That made the vectors, as for `embed_job.embed`. Nothing in the vectors can prove it; the model is loaded
            for its fingerprint and what goes with it. Of an export of this program, features before the projection are
            known again, and another model is refused.
        pretrained: open_clip tag or local weights file.
        random_init: Seed of random weights in place of trained ones.
        quick_gelu: Activation of a weights file that does not say.
        ids: For one .npy file: whose vectors they are. A text with an id a line, Parquet, or a .npy of strings.
        dtype: Of the embedding column: 'float16' or 'float32'.
        refresh: Import changed files again.
        on_progress: Called with vectors read and the share of all bytes, 0 to 1.

    Raises:
        ClipindexError: Whatever is the caller's to mend. A file that does not fit its rows is no error: the others go
            on, and the summary names it.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    pairs, failed = list_pairs(source, ids)
    info = _load_info(
        source, ModelSpec(name=model, pretrained=pretrained, random_init=random_init, quick_gelu=quick_gelu)
    )
    folder = Path(out)
    if folder.is_file():
        raise StoreError(f"{folder} is a file; embeddings go into a folder")
    dataset = open_dataset(folder, info, dtype, CREATED_BY, create=False)
    published = published_shards(folder)
    plan = plan_shards([pair.shard for pair in pairs], published, dataset, refresh=refresh)
    started = time.perf_counter()
    todo = set(plan.todo)
    twins = Twins(folder, published, [*plan.done, *plan.todo])
    found = _import_all([pair for pair in pairs if pair.shard in todo], folder, dataset, twins, on_progress)
    seconds = time.perf_counter() - started
    ours = [one for one in found.imported if one.is_ours]
    samples = sum(one.record.samples for one in ours)
    return ImportSummary(
        source=str(source),
        out=str(folder),
        model=info.spec.name,
        fingerprint=info.fingerprint,
        shards=len(pairs),
        shards_done_before=len(plan.done),
        shards_imported=len(ours),
        shards_changed=[shard.url for shard in plan.changed],
        shards_done_elsewhere=len(found.imported) - len(ours),
        shards_there=found.there,
        shards_failed=failed | found.failed,
        samples=samples,
        rows=sum(one.record.rows for one in ours),
        rejects=sum(one.record.rejects for one in ours),
        rejects_by_stage=dict(sorted(sum((one.reject_stages for one in ours), Counter[str]()).items())),
        normalised=sum(one.normalised for one in ours),
        seconds=round(seconds, 3),
        vectors_per_s=round(samples / seconds, 1) if samples else 0.0,
    )


def _load_info(source: str | Path, spec: ModelSpec) -> ModelInfo:
    """The model that made a source's vectors: what the user says, and of an export of this program what its note says.

    Raises:
        FingerprintError: The two differ.
        StoreError: The note is damaged.
    """
    path = Path(local_path(str(source)))
    folder = path if path.is_dir() else path.parent.parent
    # A lone file is of an export where it lies as an export has it; elsewhere the note is of something else.
    note: Any = read_note(folder) if folder == path or path.parent.name == VECTORS else None
    is_ours = isinstance(note, dict) and "fingerprint" in note
    info = load_model(spec, pre_projection=is_ours and note.get("vectors") == "pre-projection").info
    if is_ours and note["fingerprint"] != info.fingerprint:
        raise FingerprintError(
            f"{source} is an export of embeddings with fingerprint {str(note['fingerprint'])[:12]}, not of"
            f" {describe_model(info)}; name the model that its {NOTE} names"
        )
    return info


def _import_all(
    pairs: Sequence[Pair], folder: Path, dataset: Dataset, twins: Twins, on_progress: Callable[[int, float], None]
) -> _Outcome:
    """Import file by file; what is wrong with one does not stop the others."""
    found = _Outcome([], {}, {})
    progress = _Progress(sum(pair.shard.size for pair in pairs), on_progress)
    for pair in pairs:
        try:
            twin = twins.find(pair, dataset.model.dim)
            if twin is None:
                found.imported.append(_import_pair(pair, folder, dataset, progress))
            else:
                found.there[pair.shard.url] = twin
        except (ShardError, SourceError) as error:
            found.failed[pair.shard.url] = str(error)
        progress.finish(pair.shard)
    return found


def _import_pair(pair: Pair, folder: Path, dataset: Dataset, progress: _Progress) -> _Imported:
    started = time.perf_counter()
    file = open_checked(pair, dataset.model.dim)
    writer = ShardWriter(folder, pair.shard, dataset)
    try:
        stages, normalised = _append_all(writer, file.blocks, progress)
        if stat_source(pair.shard.url) != (pair.shard.size, pair.shard.version):
            raise ShardError(f"{pair.shard.url} changed while it was read; run again")
        claim_dataset(folder, dataset)  # not before there is something to publish: what does not fit claims nothing
        record, is_ours = writer.publish(
            samples=file.num_rows,
            precision=UNKNOWN,
            decoder=IMPORTED,
            device=UNKNOWN,
            seconds=time.perf_counter() - started,
        )
    except BaseException:
        writer.abort()
        raise
    return _Imported(record, is_ours, stages, normalised)


def _append_all(writer: ShardWriter, blocks: Iterable[CheckedBlock], progress: _Progress) -> tuple[Counter[str], int]:
    """Write all rows of a shard; how many were rejected at which stage, and how many were not of unit length."""
    stages: Counter[str] = Counter()
    normalised = 0
    for block in blocks:
        for at, (stage, reason) in block.faults.items():
            stages[stage] += 1
            member = f"row {block.first + at}"
            writer.reject(Reject(key=block.rows.keys[at], member=member, stage=stage, reason=reason, tar_offset=None))
        _append(writer, block)
        normalised += int((~block.vectors.is_unit[block.kept]).sum())
        progress.add(len(block.rows.keys), block.num_bytes)
    return stages, normalised


def _append(writer: ShardWriter, block: CheckedBlock) -> None:
    """Vectors of unit length may come with the length they had; of all others it is measured."""
    rows, vectors, kept = block.rows, block.vectors, block.kept
    said = np.array([np.nan if norm is None else norm for norm in rows.norms], np.float32)
    is_said = vectors.is_unit & np.isfinite(said) & (said > 0)
    samples = [
        Sample(
            key=rows.keys[at],
            member="",
            image=b"",
            tar_offset=None,
            label=rows.labels[at],
            caption=rows.captions[at],
            meta=rows.metas[at],
            labels=rows.label_lists[at],
        )
        for at in kept
    ]
    if samples:
        norms = np.where(is_said, said, vectors.lengths)
        writer.append(samples, Vectors(vectors.unit[kept], norms[kept]), [rows.sizes[at] for at in kept])
