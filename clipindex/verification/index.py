"""Of the index, where there is one: whether its files are whole, of these embeddings, and of all of them."""

from pathlib import Path

from clipindex.errors import StoreError
from clipindex.index.files import METADATA, check_files, open_index
from clipindex.index.files import read_record as read_index_record
from clipindex.index.plan import default_memory_bytes
from clipindex.nearest import compare_shards
from clipindex.store import Dataset, shard_states
from clipindex.verification.faults import Fault, fault_of

_REMEDY = "run clipindex index --rebuild"


def check_index(folder: Path, dataset: Dataset) -> tuple[list[Fault], list[str]]:
    """Faults of a directory's index, and what is no fault but might puzzle."""
    path = folder / "index" / METADATA
    try:
        record = read_index_record(folder)
        if record is None:
            return [], []
        wrong = [Fault(path=str(at), what=what, remedy=_REMEDY) for at, what in check_files(folder, record)]
        if record.fingerprint != dataset.model.fingerprint:
            wrong.append(Fault(path=str(path), what="is of another model's embeddings", remedy=_REMEDY))
        opened = None if wrong else open_index(folder, default_memory_bytes())
    except StoreError as error:
        return [fault_of(path, error, _REMEDY)], []
    if opened is None:
        return wrong, []
    known, new = compare_shards(shard_states(folder), opened.shards)
    if not new and len(known) == len(opened.shards):
        return [], []
    return [], ["the index is not that of the shards as they are now; clipindex index brings it up to date"]
