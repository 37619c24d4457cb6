"""Near-duplicates: rows whose cosine is above a threshold, joined into groups, with the one of each to keep."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from clipindex.allocator import keep_freed_memory
from clipindex.atomic import remove_stale_temporaries, write_json
from clipindex.devices import PRECISIONS, choose_device, choose_precision
from clipindex.duplicates.copies import first_copies
from clipindex.duplicates.joining import join_rows
from clipindex.duplicates.lists import read_lists
from clipindex.duplicates.reach import Search, find_reach
from clipindex.duplicates.rows import AGAIN, OnProgress, Rows
from clipindex.errors import IndexingError, UsageError
from clipindex.index.files import OpenIndex, open_index
from clipindex.index.plan import default_memory_bytes
from clipindex.nearest import Arithmetic, check_model, compare_shards, full_sums, locate
from clipindex.store import AtomicParquet, VectorReader, read_dataset, read_rows, shard_states
from clipindex.types import IntArray

LOST = 1e-3
"""Of the pairs that are looked for in the result, the share that may be missing, or one of few: where a score that is
summed in another order is rounded to the other side of the reach, which happens to one in a hundred thousand."""
_COLUMNS = ("key", "width", "height")
_SCHEMA = pa.schema(
    [
        ("group", pa.int64()),
        ("keep", pa.bool_()),
        ("key", pa.string()),
        ("cosine", pa.float32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("shard", pa.string()),
        ("row", pa.int64()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DuplicateSummary:
    """What was found."""

    out: str
    """Where groups.parquet lies."""
    threshold: float
    rows: int
    groups: int
    duplicates: int
    """Rows that could go: those in groups less one of each."""
    largest: int
    """Rows of the largest group."""
    recall: float
    """Share of the true pairs that are found, averaged over rows that have any; by exact search of a sample."""
    checked: int
    """Rows of that sample that have any."""
    lists: float
    """Of the index, that a row is compared with on average; its own among them."""
    seconds: float


def find_duplicates(
    folder: str | Path,
    *,
    threshold: float = 0.95,
    target_recall: float = 0.99,
    out: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    on_progress: OnProgress = lambda step, done, total: None,
) -> DuplicateSummary:
    """Group the rows of a directory that are nearly the same, by the directory's index.

    Rows are joined where their cosine is at least the threshold, and what is joined to one is joined to the others
    (single linkage): a group may hold rows that are less alike than that, by a chain of others. The largest image of a
    group is the one to keep, and of those the first.

    The rows of an index without lists (flat, hnsw) are all compared with one another. Of vectors as many are in memory
    as an eighth of it holds, and on a CUDA device a quarter of what is free there; beside them numbers of all
    rows, some 100 bytes a row, and in the end some 300 for each row of a group. On a CPU the process's memory allocator
    is tuned; see `allocator`.

    Args:
        folder: The embedding directory, with an index that knows all of its rows.
        threshold: Cosine.
        target_recall: Share of the true pairs to find; with 1, each row is compared with each.
        out: Folder of summary.json and of groups.parquet, which has a row for each row of a group, the one to keep
            first: group, keep, key, cosine to the one to keep, width, height, shard, row. `folder`/duplicates by
            default.
        device: Where rows are compared.
        precision: Of the products; what they leave open is computed again in float32.
        seed: Of the sample that is compared with exact search.
        on_progress: See `OnProgress`.

    Raises:
        IndexingError: The directory has no index, or one that does not know all rows.
        StoreError: A file is damaged.
    """
    if not 0 < threshold < 1:
        raise UsageError(f"threshold {threshold}: give a cosine between 0 and 1")
    folder = Path(folder)
    target = Path(out) if out is not None else folder / "duplicates"
    started = time.perf_counter()
    chosen = choose_device(device)
    if chosen.type == "cpu":
        keep_freed_memory()
    arithmetic = Arithmetic(chosen, PRECISIONS[choose_precision(precision, chosen)])
    opened = _up_to_date(folder)
    rows = Rows(folder, opened, [shard.name for shard in opened.shards], VectorReader(folder))
    on_progress("look for copies", 0, 0)
    first = first_copies(rows)
    lists = read_lists(rows, first)
    with full_sums(chosen):
        search = find_reach(
            rows, lists, first, threshold, target_recall, seed, arithmetic,
            lambda done: on_progress("search exactly", done, opened.record.rows),
        )  # fmt: skip
        memory = default_memory_bytes() // 4
        names = join_rows(rows, search, first, threshold, arithmetic, memory, on_progress)
    members, groups = _groups(names)
    on_progress("write", 0, 0)
    table = _table(rows, members, groups)
    if not _is_up_to_date(folder, opened):
        raise IndexingError(f"shards of {folder} were replaced meanwhile; {AGAIN}")
    _check(names, search, arithmetic)
    remove_stale_temporaries(target)
    with AtomicParquet(target / "groups.parquet", _SCHEMA, compression="zstd") as parquet:
        parquet.write(table)
    sizes = np.bincount(groups)
    summary = DuplicateSummary(
        out=str(target),
        threshold=threshold,
        rows=opened.record.rows,
        groups=len(sizes),
        duplicates=len(members) - len(sizes),
        largest=int(sizes.max(initial=0)),
        recall=search.recall,
        checked=search.checked,
        lists=round(search.lists_a_row, 2),
        seconds=round(time.perf_counter() - started, 3),
    )
    write_json(target / "summary.json", asdict(summary))
    return summary


def _up_to_date(folder: Path) -> OpenIndex:
    read_dataset(folder)
    opened = open_index(folder, default_memory_bytes())
    if opened is None:
        raise IndexingError(f"{folder} has no index; build it with clipindex index")
    check_model(folder, opened)
    if not _is_up_to_date(folder, opened):
        raise IndexingError(f"the index of {folder} is not that of its shards any more; run clipindex index")
    return opened


def _is_up_to_date(folder: Path, opened: OpenIndex) -> bool:
    known, new = compare_shards(shard_states(folder), opened.shards)
    return not new and len(known) == len(opened.shards)


def _check(names: IntArray, search: Search, arithmetic: Arithmetic) -> None:
    """Refuse groups that lack what a sample says will be found: a share that is only expected certifies nothing."""
    expected = search.expected
    lost = int((names[expected[:, 0]] != names[expected[:, 1]]).sum())
    if lost > max(1, LOST * len(expected)):
        raise IndexingError(
            f"{lost} of {len(expected)} pairs at the threshold were not joined: products in {arithmetic.dtype} on"
            f" {arithmetic.device} are too far from cosines; run with --precision fp32 or --device cpu, and report it"
            " where that fails as well"
        )


def _groups(roots: IntArray) -> tuple[IntArray, IntArray]:
    """Ids [n] that are not alone, by group, and the number [n] of each one's group, in order of their first rows."""
    members = np.flatnonzero(np.bincount(roots, minlength=len(roots))[roots] > 1)
    members = members[np.argsort(roots[members], kind="stable")]
    return members, np.unique(roots[members], return_inverse=True)[1].astype(np.int64)


def _table(rows: Rows, members: IntArray, groups: IntArray) -> pa.Table:
    shards, numbers = locate(rows.opened, members)
    order = np.lexsort((numbers, shards))
    tables = [
        read_rows(rows.folder, rows.names[shards[at[0]]], numbers[at], _COLUMNS)
        for at in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1)
        if len(at)
    ]
    if not tables:
        return _SCHEMA.empty_table()
    columns = pa.concat_tables(tables).take(pa.array(np.argsort(order)))
    area = columns["width"].to_numpy().astype(np.int64) * columns["height"].to_numpy()
    ranked = np.lexsort((members, -area, groups))
    kept = ranked[np.searchsorted(groups[ranked], groups)]  # of each row's group the first of the ranked
    found = {
        "group": groups,
        "keep": kept == np.arange(len(kept)),
        "cosine": rows.cosines(members[kept], members),
        "shard": pa.array(rows.names, pa.string()).take(pa.array(shards)),
        "row": numbers,
        **{name: columns[name] for name in _COLUMNS},
    }
    return pa.table({name: found[name] for name in _SCHEMA.names}, schema=_SCHEMA).take(pa.array(ranked))
