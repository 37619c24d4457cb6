"""The index of an embedding directory: built, kept up to date, and measured before it appears."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from clipindex.devices import PRECISIONS, choose_device, choose_precision
from clipindex.errors import FingerprintError, IndexingError, StoreError, UsageError
from clipindex.index.build import sample_rows, train_index
from clipindex.index.files import (
    FORMAT_VERSION,
    Effort,
    IndexedShard,
    IndexRecord,
    NextIndex,
    OpenIndex,
    Recall,
    open_index,
)
from clipindex.index.plan import KINDS, Plan, default_memory_bytes, make_plan
from clipindex.indexing.certify import certified, drift_of, faults, pose
from clipindex.nearest import compare_shards, ids_of
from clipindex.recall import draw_rows, read_drawn
from clipindex.store import (
    Dataset,
    published_shards,
    read_dataset,
    read_embeddings,
    shard_states,
)
from clipindex.types import Float32Array, ModelSpec
from clipindex.version import __version__

GONE = 0.2
"""Share of the vectors of an hnsw index, which forgets none, from which on it is built anew."""
GROWN = 4
"""Times the rows it was trained on, from which on an index should be trained anew: its lists have become long."""
OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexSummary:
    """What an index is, how much it finds, and what this run did."""

    folder: str
    """Of the embeddings."""
    kind: str
    rows: int
    shards: int
    shards_added: int
    shards_removed: int
    """Or replaced by others of the same name."""
    is_new: bool
    """Trained by this run, not added to."""
    index_bytes: int
    """Of all its files."""
    row_bytes: int
    effort: Effort
    target_recall: float
    recall: dict[str, Recall]
    ms_per_query: float
    queries_per_s: float
    drift: dict[str, float]
    """Recall@10 with the effort found before, of an index that was added to, by the kind of query."""
    advice: str | None
    """Why to train it anew, where that is due."""
    seconds: float
    steps: dict[str, float]
    """Seconds of each."""


def build_index(
    folder: str | Path,
    *,
    kind: str = "auto",
    memory_bytes: int | None = None,
    target_recall: float = 0.95,
    max_query_ms: float | None = None,
    accept_recall: bool = False,
    prompts: Sequence[str] = (),
    rebuild: bool = False,
    model: ModelSpec | None = None,
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    on_progress: OnProgress = lambda step, done, total: None,
) -> IndexSummary:
    """Index a directory's embeddings, or add what is new to the index that it has.

    The index appears when it has been measured; until then the earlier one stays, and is searched.

    Args:
        folder: The embedding directory.
        kind: One of `index.plan.KINDS`, or 'auto', which goes by rows and memory; see `index.plan`. An index that was
            asked for by kind keeps it until `rebuild`.
        memory_bytes: What the index may take; half of the machine's by default. Lists that are larger stay on disk.
        target_recall: Recall@10 to reach, with each kind of query.
        max_query_ms: Most time for a query alone.
        accept_recall: Publish an index that misses the target.
        prompts: Texts to measure with as well: they find other rows than images do.
        rebuild: Train anew, though there is an index.
        model: How to load the model that embeds the prompts, where the directory's record does not lead to it.
        device: Where to find centroids, and to embed prompts.
        precision: Of both; recall is measured with float32 products.
        seed: Of all that is drawn.
        on_progress: See `OnProgress`.

    Raises:
        IndexingError: The target is missed, or there is nothing to index.
        UsageError: No such kind, or it does not fit in memory.
        StoreError: A file is damaged, or cannot be written.
        FingerprintError: Embeddings of several models lie in the directory.
    """
    if kind not in ("auto", *KINDS):
        raise UsageError(f"kind {kind!r} is unknown; give auto, {', '.join(KINDS)}")
    if not 0 < target_recall <= 1:
        raise UsageError(f"target recall {target_recall}: give a share above 0, of at most 1")
    folder = Path(folder)
    steps = _Steps()
    memory = memory_bytes or default_memory_bytes()
    chosen = choose_device(device)
    dtype = PRECISIONS[choose_precision(precision, chosen)]
    dataset, published = _published(folder)
    texts = _embed_prompts(folder, dataset, prompts, model, device, precision)
    current = None if rebuild else open_index(folder, memory)
    kind = current.record.asked_kind if current and kind == "auto" else kind
    current = current if current and _can_grow(dataset, published, current, kind, memory) else None
    states = {name: state for name, (_, state) in published.items()}
    known, new = compare_shards(states, current.shards) if current else ([], sorted(states))
    changes = _Changes(len(new), len(current.shards) - len(known) if current else 0, is_new=not current)
    if current:
        texts = current.prompts if texts is None else texts
        max_query_ms = max_query_ms or current.record.max_query_ms
        as_it_is = not new and not changes.removed and not prompts and max_query_ms == current.record.max_query_ms
        if as_it_is and current.record.target_recall == target_recall and not faults(current.record, accept_recall):
            return _summary(folder, current.record, len(known), changes, steps)
    with steps.timed("train"):
        if current:
            opened = replace(current, shards=known)
        else:
            plan = make_plan(kind, sum(rows for rows, _ in published.values()), dataset.model.dim, memory)
            opened = _trained(folder, dataset, published, kind, plan, str(chosen), dtype, seed, on_progress)
    with NextIndex(folder, opened.faiss) as files:
        with steps.timed("add"):
            opened = _filled(folder, files, opened, new, published, str(chosen), dtype, memory, on_progress)
        try:
            with steps.timed("search exactly"):
                tuning, asked = pose(folder, opened, texts, str(chosen), seed, on_progress)
            with steps.timed("measure"):
                on_progress("measure recall", 0, 0)
                drift = drift_of(folder, opened, asked) if current else {}
                record = certified(folder, opened, tuning, asked, target_recall, max_query_ms)
        except StoreError as error:
            if len(compare_shards(shard_states(folder), opened.shards)[0]) < len(opened.shards):
                raise StoreError(f"shards of {folder} were replaced while they were indexed; run again") from error
            raise
        wrong = faults(record, accept_recall)
        if wrong:
            raise IndexingError(
                f"no index was published: {'; '.join(wrong)} ({record.plan.kind}, {record.ms_per_query:.2f} ms a query)"
                "; lower --target-recall, raise --memory or --max-query-ms, try --kind hnsw, or pass --accept-recall"
            )
        with steps.timed("write"):
            record = files.publish(replace(record, build=steps.seconds), opened.shards, texts)
    return _summary(folder, record, len(opened.shards), changes, steps, drift)


class _Changes(NamedTuple):
    """What a run did to the set of shards."""

    added: int
    removed: int
    is_new: bool


class _Steps:
    """How long each step took."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[step] = round(time.perf_counter() - started, 3)


Published = dict[str, tuple[int, str]]
"""Rows and state of each shard, by name and in name order: looked up once, since other runs may go on publishing."""


def _published(folder: Path) -> tuple[Dataset, Published]:
    dataset = read_dataset(folder)
    states = shard_states(folder)
    records = published_shards(folder)
    for name, record in records.items():
        if record.fingerprint != dataset.model.fingerprint:
            raise FingerprintError(
                f"shard {name} has fingerprint {record.fingerprint[:12]}, its directory"
                f" {dataset.model.fingerprint[:12]}; delete its file and embed its tar again"
            )
    if not any(record.rows for record in records.values()):
        raise IndexingError(f"{folder} has no rows to index")
    return dataset, {name: (records[name].rows, state) for name, state in states.items() if name in records}


def _embed_prompts(
    folder: Path, dataset: Dataset, prompts: Sequence[str], model: ModelSpec | None, device: str, precision: str
) -> Float32Array | None:
    if not prompts:
        return None
    # Two seconds that an index without prompts need not wait for.
    from clipindex.encode import TextTower
    from clipindex.models import load_model_of

    loaded = load_model_of(folder, dataset.model, model)
    chosen = choose_device(device)
    return TextTower(loaded, device=chosen, precision=choose_precision(precision, chosen)).encode(list(prompts))


def _can_grow(dataset: Dataset, published: Published, current: OpenIndex, kind: str, memory: int) -> bool:
    """Whether an index can be added to, or has to be built anew."""
    plan = current.record.plan
    if current.record.fingerprint != dataset.model.fingerprint or kind not in ("auto", plan.kind):
        return False
    rows = sum(rows for rows, _ in published.values())
    if make_plan(kind, rows, dataset.model.dim, memory).row_bytes < plan.row_bytes:  # it would outgrow its memory
        return False
    known, new = compare_shards({name: state for name, (_, state) in published.items()}, current.shards)
    is_same = not new and len(known) == len(current.shards)
    if plan.kind == "flat" and not is_same:  # built as fast as it is read
        return False
    kept = sum(shard.rows for shard in known)
    return kept > 0 and (plan.kind != "hnsw" or kept >= (1 - GONE) * current.record.next_id)


def _trained(
    folder: Path,
    dataset: Dataset,
    published: Published,
    kind: str,
    plan: Plan,
    device: str,
    dtype: torch.dtype,
    seed: int,
    on_progress: OnProgress,
) -> OpenIndex:
    """A new index without vectors."""
    sizes = {name: rows for name, (rows, _) in published.items()}
    rows = sum(sizes.values())
    on_progress("train", 0, 0)
    number = sample_rows(plan, rows, np.dtype(dataset.dtype).itemsize) if plan.num_lists else 0
    drawn = draw_rows(sizes, number, seed)
    sample = read_drawn(folder, drawn) if drawn else np.empty((0, plan.dim), np.float32)
    index = train_index(
        plan, sample, device=device, dtype=dtype, seed=seed, on_progress=lambda done, of: on_progress("train", done, of)
    )
    record = IndexRecord(
        format_version=FORMAT_VERSION,
        created_by=f"clipindex {__version__}",
        fingerprint=dataset.model.fingerprint,
        asked_kind=kind,
        plan=plan,
        rows=rows,
        next_id=0,
        trained_rows=rows,
        effort=Effort(),
        target_recall=0.0,
        max_query_ms=None,
        recall={},
        ms_per_query=0.0,
        queries_per_s=0.0,
    )
    return OpenIndex(record=record, shards=[], faiss=index)


def _filled(
    folder: Path,
    files: NextIndex,
    opened: OpenIndex,
    new: Sequence[str],
    published: Published,
    device: str,
    dtype: torch.dtype,
    memory: int,
    on_progress: OnProgress,
) -> OpenIndex:
    """The index with the rows of new shards, and without those of shards that are not in its list."""
    total = sum(published[name][0] for name in new)
    shards, next_id, first = list(opened.shards), opened.record.next_id, opened.record.next_id
    with files.filler(device=device, dtype=dtype) as filler:
        for name in new:
            shard = IndexedShard(name, next_id, *published[name])
            for batch in read_embeddings(folder, names=[name]):
                if batch.shard.rows != shard.rows:
                    raise StoreError(f"shard {name} was replaced while it was read; run again")
                filler.add(batch.embedding, next_id)
                next_id += len(batch.embedding)
                on_progress("add", next_id - first, total)
            if next_id != shard.first_id + shard.rows:
                raise StoreError(f"shard {name} was replaced while it was read; run again")
            shards.append(shard)
        if opened.record.plan.num_lists:
            files.take_lists(filler, ids_of(opened.shards, first), memory)
    record = replace(opened.record, next_id=next_id, rows=sum(shard.rows for shard in shards))
    return replace(opened, record=record, shards=shards)


def _summary(
    folder: Path,
    record: IndexRecord,
    num_shards: int,
    changes: _Changes,
    steps: _Steps,
    drift: dict[str, float] | None = None,
) -> IndexSummary:
    return IndexSummary(
        folder=str(folder),
        kind=record.plan.kind,
        rows=record.rows,
        shards=num_shards,
        shards_added=changes.added,
        shards_removed=changes.removed,
        is_new=changes.is_new,
        index_bytes=sum(size for _, size, _ in record.files.values()),
        row_bytes=record.plan.row_bytes,
        effort=record.effort,
        target_recall=record.target_recall,
        recall=record.recall,
        ms_per_query=record.ms_per_query,
        queries_per_s=record.queries_per_s,
        drift=drift or {},
        advice=_advice(record, changes, drift or {}),
        seconds=round(time.perf_counter() - steps.started, 3),
        steps=steps.seconds,
    )


def _advice(record: IndexRecord, changes: _Changes, drift: dict[str, float]) -> str | None:
    if record.rows > GROWN * record.trained_rows and record.plan.num_lists:
        return f"it was trained on {record.trained_rows:,} rows and has {record.rows:,}; --rebuild trains it anew"
    if (changes.added or changes.removed) and min(drift.values(), default=1) < record.target_recall:
        return "what was added is unlike what it was trained on, and more is searched for it; --rebuild trains it anew"
    return None
