"""Inverted lists on disk: several sources merged, list by list, into one file that FAISS maps.

The file has the layout of FAISS's OnDiskInvertedLists: of each list its codes, then its ids (int64), nothing between.
It is written from front to back, so that merging needs memory for one list, whatever the size of the index.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import faiss
import numpy as np

Mask = np.ndarray[Any, np.dtype[np.bool_]]


def write_lists(file: BinaryIO, sources: Sequence[faiss.InvertedLists], keep: Mask | None) -> faiss.OnDiskInvertedLists:
    """Write the entries of all sources, in their order, to a file.

    Args:
        file: Empty.
        sources: Of one number of lists and one code size.
        keep: Of the first source, only entries whose ids [I] are true here; all by default.

    Returns:
        Where each list lies in the file, not yet mapped.
    """
    sizes = np.zeros(sources[0].nlist, np.uint64)
    for number in range(len(sizes)):
        entries = [_entries(source, number) for source in sources]
        if keep is not None:
            codes, ids = entries[0]
            entries[0] = codes[keep[ids]], ids[keep[ids]]
        for codes, _ in entries:
            file.write(codes.tobytes())
        for _, ids in entries:
            file.write(ids.tobytes())
        sizes[number] = sum(len(ids) for _, ids in entries)
    file.flush()
    placed = faiss.OnDiskInvertedLists()
    placed.nlist, placed.code_size = len(sizes), sources[0].code_size
    placed.lists.resize(len(sizes))
    placed.set_all_lists_sizes(faiss.swig_ptr(sizes))
    placed.totsize = file.tell()
    return placed


def map_lists(lists: faiss.OnDiskInvertedLists, path: Path, num_threads: int) -> None:
    """Map the file of lists, to be read; with threads that read ahead where there are any."""
    lists.filename = str(path)
    lists.read_only = True
    lists.prefetch_nthread = num_threads
    if lists.totsize:
        lists.do_mmap()


def ids_in(source: faiss.InvertedLists, number: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Ids [n] of one list: a view, valid while the source lives."""
    size = source.list_size(number)
    ids: np.ndarray[Any, np.dtype[np.int64]] = (
        faiss.rev_swig_ptr(source.get_ids(number), size) if size else np.empty(0, np.int64)
    )
    return ids


def _entries(
    source: faiss.InvertedLists, number: int
) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], np.ndarray[Any, np.dtype[np.int64]]]:
    """Codes [n, B] and ids [n] of one list: views, valid while the source lives."""
    size = source.list_size(number)
    if not size:
        return np.empty((0, source.code_size), np.uint8), ids_in(source, number)
    codes = faiss.rev_swig_ptr(source.get_codes(number), size * source.code_size)
    return codes.reshape(size, source.code_size), ids_in(source, number)
