"""The index of an embedding directory: built, kept up to date, and measured before it appears."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
from clipindex.nearest import compare_shards, ids_of, widened
from clipindex.recall import (
    Questions,
    draw_rows,
    exact_answers,
    least_effort,
    measure,
    milliseconds,
    queries_per_s,
    read_drawn,
    within,
)
from clipindex.store import (
    Dataset,
    VectorReader,
    check_fingerprint,
    published_shards,
    read_dataset,
    read_embeddings,
    shard_states,
)
from clipindex.types import Float32Array, ModelSpec
from clipindex.version import __version__

NUM_QUERIES = 1000
"""Rows that recall is measured with; half as many more are drawn to find the effort by."""
GONE = 0.2
"""Share of the vectors of an hnsw index, which forgets none, from which on it is built anew."""
GROWN = 4
"""Times the rows it was trained on, from which on an index should be trained anew: its lists have become long."""
WIDER = 1.15
"""Times the effort, where queries that it was not found with miss the target."""

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
    dataset, sizes = _sizes(folder)
    texts = _embed_prompts(folder, dataset, prompts, model, device, precision)
    current = None if rebuild else open_index(folder, memory)
    kind = current.record.asked_kind if current and kind == "auto" else kind
    current = current if current and _can_grow(folder, dataset, current, kind) else None
    known, new = compare_shards(folder, current.shards) if current else ([], sorted(sizes))
    removed = len(current.shards) - len(known) if current else 0
    if current and not new and not removed and _is_measured(current.record, target_recall, max_query_ms, prompts):
        return _summary(folder, current.record, len(known), steps=steps)
    with steps.timed("train"):
        if current:
            opened = replace(current, record=replace(current.record, rows=sum(sizes.values())), shards=known)
        else:
            plan = make_plan(kind, sum(sizes.values()), dataset.model.dim, memory)
            opened = _trained(folder, dataset, sizes, kind, plan, str(chosen), dtype, seed, on_progress)
    with NextIndex(folder, opened.faiss) as files:
        with steps.timed("add"):
            opened = _filled(folder, files, opened, new, sizes, str(chosen), dtype, memory, on_progress)
        with steps.timed("search exactly"):
            tuning, asked = _questions(folder, opened, sizes, texts, str(chosen), seed, on_progress)
        with steps.timed("measure"):
            on_progress("measure recall", 0, 0)
            reader = VectorReader(folder)
            drift = _drift(reader, opened, asked) if current else {}
            record = _measured(reader, opened, tuning, asked, target_recall, max_query_ms)
            _check_target(record, max_query_ms, accept_recall)
        with steps.timed("write"):
            record = files.publish(replace(record, build=steps.seconds), opened.shards)
    return _summary(
        folder,
        record,
        len(opened.shards),
        added=len(new),
        removed=removed,
        is_new=not current,
        drift=drift,
        steps=steps,
    )


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


def _sizes(folder: Path) -> tuple[Dataset, dict[str, int]]:
    """The directory, and the rows of each of its shards, in name order."""
    dataset = read_dataset(folder)
    records = published_shards(folder)
    for name, record in records.items():
        if record.fingerprint != dataset.model.fingerprint:
            raise FingerprintError(
                f"shard {name} has fingerprint {record.fingerprint[:12]}, its directory"
                f" {dataset.model.fingerprint[:12]}; delete its file and embed its tar again"
            )
    if not any(record.rows for record in records.values()):
        raise IndexingError(f"{folder} has no rows to index")
    return dataset, {name: record.rows for name, record in records.items()}


def _embed_prompts(
    folder: Path, dataset: Dataset, prompts: Sequence[str], model: ModelSpec | None, device: str, precision: str
) -> Float32Array | None:
    if not prompts:
        return None
    # Two seconds that an index without prompts need not wait for.
    from clipindex.encode import TextTower
    from clipindex.models import load_model

    loaded = load_model(model or dataset.model.spec)
    check_fingerprint(folder, dataset.model, loaded.info)
    chosen = choose_device(device)
    return TextTower(loaded, device=chosen, precision=choose_precision(precision, chosen)).encode(list(prompts))


def _can_grow(folder: Path, dataset: Dataset, current: OpenIndex, kind: str) -> bool:
    """Whether an index can be added to, or has to be built anew."""
    plan = current.record.plan
    if current.record.fingerprint != dataset.model.fingerprint or kind not in ("auto", plan.kind):
        return False
    known, new = compare_shards(folder, current.shards)
    is_same = not new and len(known) == len(current.shards)
    if plan.kind == "flat" and not is_same:  # built as fast as it is read
        return False
    kept = sum(shard.rows for shard in known)
    return kept > 0 and (plan.kind != "hnsw" or kept >= (1 - GONE) * current.record.next_id)


def _is_measured(record: IndexRecord, target: float, max_query_ms: float | None, prompts: Sequence[str]) -> bool:
    """Whether what is asked for is what was measured."""
    return record.target_recall == target and max_query_ms is None and not prompts


def _trained(
    folder: Path,
    dataset: Dataset,
    sizes: dict[str, int],
    kind: str,
    plan: Plan,
    device: str,
    dtype: torch.dtype,
    seed: int,
    on_progress: OnProgress,
) -> OpenIndex:
    """A new index without vectors."""
    rows = sum(sizes.values())
    on_progress("train", 0, 0)
    drawn = draw_rows(sizes, sample_rows(plan, rows) if plan.num_lists else 0, seed)
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
    sizes: dict[str, int],
    device: str,
    dtype: torch.dtype,
    memory: int,
    on_progress: OnProgress,
) -> OpenIndex:
    """The index with the rows of new shards, and without those of shards that are not in its list."""
    total = sum(sizes[name] for name in new)
    states = shard_states(folder)
    shards, next_id, first = list(opened.shards), opened.record.next_id, opened.record.next_id
    with files.filler(device=device, dtype=dtype) as filler:
        for name in new:
            shards.append(IndexedShard(name, next_id, sizes[name], states[name]))
            for batch in read_embeddings(folder, names=[name]):
                filler.add(batch.embedding, shards[-1].first_id + batch.first_row)
                next_id += len(batch.embedding)
                on_progress("add", next_id - first, total)
            if next_id != shards[-1].first_id + sizes[name]:
                raise StoreError(f"shard {name} was replaced while it was read; run again")
        if opened.record.plan.num_lists:
            files.take_lists(filler, ids_of(opened.shards, first), memory)
    return replace(opened, record=replace(opened.record, next_id=next_id), shards=shards)


def _questions(
    folder: Path,
    opened: OpenIndex,
    sizes: dict[str, int],
    texts: Float32Array | None,
    device: str,
    seed: int,
    on_progress: OnProgress,
) -> tuple[list[Questions], dict[str, Questions]]:
    """What to find the effort with, and what to measure with, by the kind of query: no query is in both."""
    names = [shard.name for shard in opened.shards]
    rows = sum(sizes.values())
    drawn = draw_rows(sizes, NUM_QUERIES * 3 // 2, seed + 1)
    own = [(name, row) for name, part in drawn for row in part.tolist()]
    images = read_drawn(folder, drawn).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    both = [images] if texts is None else [images, texts]
    answers = exact_answers(
        folder, names, both, [own, None][: len(both)], device=device,
        on_progress=lambda done: on_progress("search exactly", done, rows),
    )  # fmt: skip
    tuning, asked = [], {}
    for kind, questions in zip(("image", "text"), answers, strict=False):
        every_third = np.arange(len(questions.vectors)) % 3 == 0
        few = len(questions.vectors) < 3
        tuning.append(questions.of(every_third | few))
        asked[kind] = questions.of(~every_third | few)
    return tuning, asked


def _drift(reader: VectorReader, opened: OpenIndex, asked: dict[str, Questions]) -> dict[str, float]:
    """Recall@10 with the effort that was found when the index was smaller."""
    return {kind: measure(reader, opened, each, opened.record.effort).recall_at_10 for kind, each in asked.items()}


def _measured(
    reader: VectorReader,
    opened: OpenIndex,
    tuning: Sequence[Questions],
    asked: dict[str, Questions],
    target: float,
    max_query_ms: float | None,
) -> IndexRecord:
    """The record with the least effort that reaches the target, and with what was measured at it."""
    effort = least_effort(reader, opened, tuning, target)
    recall = {kind: measure(reader, opened, each, effort) for kind, each in asked.items()}
    while min(each.recall_at_10 for each in recall.values()) < target and widened(opened, effort, WIDER) != effort:
        effort = widened(opened, effort, WIDER)
        recall = {kind: measure(reader, opened, each, effort) for kind, each in asked.items()}
    if max_query_ms is not None and (held := within(reader, opened, asked["image"], effort, max_query_ms)) != effort:
        effort, recall = held, {kind: measure(reader, opened, each, held) for kind, each in asked.items()}
    return replace(
        opened.record,
        effort=effort,
        target_recall=target,
        recall=recall,
        ms_per_query=round(milliseconds(reader, opened, asked["image"], effort), 3),
        queries_per_s=round(queries_per_s(reader, opened, asked["image"], effort), 1),
    )


def _check_target(record: IndexRecord, max_query_ms: float | None, accept_recall: bool) -> None:
    """Refuse an index that finds too little, or is too slow.

    Raises:
        IndexingError: It is.
    """
    kind, found = min(record.recall.items(), key=lambda item: item[1].recall_at_10)
    wrong = []
    if found.recall_at_10 < record.target_recall:
        wrong.append(f"recall@10 of {kind} queries is {found.recall_at_10:.4f}, below {record.target_recall}")
    if max_query_ms is not None and record.ms_per_query > max_query_ms:
        wrong.append(f"a query takes {record.ms_per_query:.2f} ms, above {max_query_ms}")
    if wrong and not accept_recall:
        raise IndexingError(
            f"no index was published: {'; '.join(wrong)} ({record.plan.kind}, {record.ms_per_query:.2f} ms a query);"
            " lower --target-recall, raise --memory or --max-query-ms, try --kind hnsw, or pass --accept-recall"
        )


def _summary(
    folder: Path,
    record: IndexRecord,
    num_shards: int,
    *,
    added: int = 0,
    removed: int = 0,
    is_new: bool = False,
    drift: dict[str, float] | None = None,
    steps: _Steps,
) -> IndexSummary:
    drifted = drift and min(drift.values()) < record.target_recall
    return IndexSummary(
        folder=str(folder),
        kind=record.plan.kind,
        rows=record.rows,
        shards=num_shards,
        shards_added=added,
        shards_removed=removed,
        is_new=is_new,
        index_bytes=sum(size for _, size, _ in record.files.values()),
        row_bytes=record.plan.row_bytes,
        effort=record.effort,
        target_recall=record.target_recall,
        recall=record.recall,
        ms_per_query=record.ms_per_query,
        queries_per_s=record.queries_per_s,
        drift=drift or {},
        advice=_advice(record, bool(drifted)),
        seconds=round(time.perf_counter() - steps.started, 3),
        steps=steps.seconds,
    )


def _advice(record: IndexRecord, drifted: bool) -> str | None:
    if not record.plan.num_lists:
        return None
    if record.rows > GROWN * record.trained_rows:
        return f"it was trained on {record.trained_rows:,} rows and has {record.rows:,}; --rebuild trains it anew"
    if drifted:
        return "what was added is unlike what it was trained on, and more is searched for it; --rebuild trains it anew"
    return None
