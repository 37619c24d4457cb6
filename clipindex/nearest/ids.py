"""Which rows the ids of an index are, and which of them are there still."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from clipindex.errors import FingerprintError, StoreError
from clipindex.index.files import REBUILD, IndexedShard, OpenIndex
from clipindex.index.lists import Mask
from clipindex.store import read_dataset
from clipindex.types import IntArray


def locate(opened: OpenIndex, ids: IntArray) -> tuple[IntArray, IntArray]:
    """Place of the shard in `opened.shards`, and row within it, of each id; an id of -1 gets any.

    Raises:
        StoreError: An id is none of the index's.
    """
    first = np.array([shard.first_id for shard in opened.shards], np.int64)
    rows = np.array([shard.rows for shard in opened.shards], np.int64)
    shards = np.maximum(np.searchsorted(first, ids, "right") - 1, 0)
    within = np.where(ids < 0, 0, ids - first[shards])
    if ((ids >= 0) & (within >= rows[shards])).any():
        raise StoreError(f"the index is damaged: it holds ids that no row has; {REBUILD}")
    return shards, within


def check_model(folder: Path, opened: OpenIndex) -> None:
    """Refuse an index of another model's embeddings.

    Raises:
        FingerprintError: It is.
    """
    wanted = read_dataset(folder).model.fingerprint
    if opened.record.fingerprint != wanted:
        raise FingerprintError(
            f"{folder / 'index'} is of embeddings with fingerprint {opened.record.fingerprint[:12]},"
            f" the directory's have {wanted[:12]}; {REBUILD}"
        )


def compare_shards(states: Mapping[str, str], indexed: Sequence[IndexedShard]) -> tuple[list[IndexedShard], list[str]]:
    """Which of an index's shards are still the same, and the names of those that it does not have, or as others.

    Args:
        states: Of the published shards, as `store.shard_states` tells them.
        indexed: The index's shards.
    """
    known = [shard for shard in indexed if states.get(shard.name) == shard.state]
    return known, sorted(set(states) - {shard.name for shard in known})


def ids_of(shards: Sequence[IndexedShard], next_id: int) -> Mask | None:
    """Which ids [next_id] are of rows of these shards; None where all are."""
    if sum(shard.rows for shard in shards) == next_id:
        return None
    mask = np.zeros(next_id, np.bool_)
    for shard in shards:
        mask[shard.first_id : shard.first_id + shard.rows] = True
    return mask
