"""The certificate of an index: the least effort that reaches the target, and what it finds with that."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from clipindex.index.files import Effort, IndexRecord, OpenIndex, Recall
from clipindex.nearest import widened
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
from clipindex.store import VectorReader
from clipindex.types import Float32Array

NUM_QUERIES = 1000
"""Rows that recall is measured with; half as many more are drawn to find the effort by, where there are so many."""
WIDER = 1.15
"""Times the effort, where the queries that are measured with miss a target that those it was found by reach."""


def pose(
    folder: Path,
    opened: OpenIndex,
    texts: Float32Array | None,
    device: str,
    seed: int,
    on_progress: Callable[[str, int, int], None],
) -> tuple[list[Questions], dict[str, Questions]]:
    """Queries with their exact answers: to find the effort by, and to measure with, by the kind of query.

    No query is for both, unless there are too few of a kind.
    """
    sizes = {shard.name: shard.rows for shard in opened.shards}
    drawn = draw_rows(sizes, NUM_QUERIES * 3 // 2, seed + 1)
    own = [(name, row) for name, part in drawn for row in part.tolist()]
    images = read_drawn(folder, drawn).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    sets = {"image": (images, own), **({} if texts is None else {"text": (texts, None)})}
    answers = exact_answers(
        folder,
        list(sizes),
        [vectors for vectors, _ in sets.values()],
        [rows for _, rows in sets.values()],
        device=device,
        on_progress=lambda done: on_progress("search exactly", done, opened.record.rows),
    )
    tuning, asked = [], {}
    for kind, questions in zip(sets, answers, strict=True):
        every_third = np.arange(len(questions.vectors)) % 3 == 0
        few = len(questions.vectors) < NUM_QUERIES * 3 // 2
        tuning.append(questions.of(every_third))
        asked[kind] = questions if few else questions.of(~every_third)
    return tuning, asked


def drift_of(folder: Path, opened: OpenIndex, asked: dict[str, Questions]) -> dict[str, float]:
    """Recall@10 with the effort that was found before the index was added to."""
    reader = VectorReader(folder)
    return {kind: measure(reader, opened, each, opened.record.effort).recall_at_10 for kind, each in asked.items()}


def certified(
    folder: Path,
    opened: OpenIndex,
    tuning: Sequence[Questions],
    asked: dict[str, Questions],
    target: float,
    max_query_ms: float | None,
) -> IndexRecord:
    """The index's record, with the least effort that reaches the target, and with what was measured at it.

    Where a limit of time allows less, the effort is what that allows.
    """
    reader = VectorReader(folder)

    def recall_at(effort: Effort) -> dict[str, Recall]:
        return {kind: measure(reader, opened, each, effort) for kind, each in asked.items()}

    effort = least_effort(reader, opened, tuning, target)
    recall = recall_at(effort)
    while min(each.recall_at_10 for each in recall.values()) < target:
        wider = widened(opened, effort, WIDER)
        if wider == effort:
            break
        effort, recall = wider, recall_at(wider)
    if max_query_ms is not None:
        held = within(reader, opened, asked["image"], effort, max_query_ms)
        effort, recall = held, recall if held == effort else recall_at(held)
    return replace(
        opened.record,
        effort=effort,
        target_recall=target,
        max_query_ms=max_query_ms,
        recall=recall,
        ms_per_query=round(milliseconds(reader, opened, asked["image"], effort), 3),
        queries_per_s=round(queries_per_s(reader, opened, asked["image"], effort), 1),
    )


def faults(record: IndexRecord, accept_recall: bool) -> list[str]:
    """In what an index misses what was asked of it, where that is not accepted."""
    kind, found = min(record.recall.items(), key=lambda item: item[1].recall_at_10)
    wrong = []
    if found.recall_at_10 < record.target_recall:
        wrong.append(f"recall@10 of {kind} queries is {found.recall_at_10:.4f}, below {record.target_recall}")
    if record.max_query_ms is not None and record.ms_per_query > record.max_query_ms:
        wrong.append(f"a query takes {record.ms_per_query:.2f} ms, above {record.max_query_ms}")
    return [] if accept_recall else wrong
