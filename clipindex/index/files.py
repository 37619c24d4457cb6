"""The files of an index: all of one generation, or all of the next.

metadata.json names the others, which carry a token of their own, and is written last. Whoever has read it opens files
that nobody changes any more; they are removed when the next generation is there, and then reading starts over.
"""

import contextlib
import json
import os
import re
import secrets
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from clipindex.atomic import create_temporary, exclusively, remove_stale_temporaries, sync_folder, write_json
from clipindex.errors import StoreError
from clipindex.index.build import Filler, ivf_of, write_index
from clipindex.index.lists import Mask, map_lists
from clipindex.index.plan import Plan
from clipindex.types import Float32Array

FORMAT_VERSION = 1
METADATA = "metadata.json"
AHEAD_THREADS = 16
"""To read lists ahead, of an index that does not fit in memory."""

_SHARD_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("first_id", pa.int64(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("state", pa.string(), nullable=False),
    ]
)


class IndexedShard(NamedTuple):
    """A shard whose rows are in an index."""

    name: str
    first_id: int
    """Id of its first row; the others follow."""
    rows: int
    state: str
    """Of its embeddings file when it was indexed: another one means that other rows are there now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recall:
    """What was measured with one set of queries, against an exact search."""

    queries: int
    recall_at_1: float
    recall_at_10: float
    recall_at_100: float
    """Share of the 1, 10, 100 best rows that were found."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How much an index looks at for a query: more costs time and finds more."""

    probes: int = 0
    """Lists of an IVF kind (FAISS: nprobe), or nodes of hnsw that are kept in mind (efSearch); 0 of flat."""
    candidates: int = 1
    """Of as many times k rows the cosines are taken from the embeddings themselves, and the best k kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexRecord:
    """The content of metadata.json."""

    format_version: int
    created_by: str
    fingerprint: str
    """Of the model."""
    asked_kind: str
    """Or 'auto'; an index that has to be built anew stays what was asked for."""
    plan: Plan
    rows: int
    next_id: int
    """Above `rows` where rows have gone since."""
    trained_rows: int
    """Rows there were when it was trained."""
    effort: Effort
    target_recall: float
    """Of recall@10, with each set of queries."""
    max_query_ms: float | None
    """Of a query alone, where that was asked for."""
    recall: dict[str, Recall]
    """By the kind of query: 'image', and 'text' where prompts were given."""
    ms_per_query: float
    """One query at a time, k = 10."""
    queries_per_s: float
    """A thousand at a time, k = 10."""
    build: dict[str, float] = field(default_factory=dict)
    """Seconds of each step, of the run that wrote this."""
    files: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    """Name, bytes and CRC-32 (of files that are read whole) by role: 'index', 'lists', 'shards'."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenIndex:
    """An index, to be searched."""

    record: IndexRecord
    shards: list[IndexedShard]
    """By their first id."""
    faiss: Any
    """The faiss.Index."""
    prompts: Float32Array | None = None
    """Unit vectors [P, D] of the texts that it is measured with as well."""


def read_record(folder: str | Path) -> IndexRecord | None:
    """What an embedding directory's index is; None where it has none.

    Raises:
        StoreError: metadata.json is damaged.
    """
    path = Path(folder) / "index" / METADATA
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}); {REBUILD}") from error
    try:
        if document["format_version"] != FORMAT_VERSION:
            raise StoreError(f"{path}: format version {document['format_version']}, not {FORMAT_VERSION}; {REBUILD}")
        record = IndexRecord(
            **{
                **document,
                "plan": Plan(**document["plan"]),
                "effort": Effort(**document["effort"]),
                "recall": {kind: Recall(**measured) for kind, measured in document["recall"].items()},
                "files": {
                    role: (str(name), int(size), int(crc)) for role, (name, size, crc) in document["files"].items()
                },
            }
        )
        numbers = (record.plan.num_lists, record.plan.dim, record.effort.probes, record.effort.candidates,
                   record.rows, record.next_id)  # fmt: skip
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("a count is none")
        if set(record.files) - {"prompts"} != {"index", "shards", *(["lists"] if record.plan.num_lists else [])}:
            raise ValueError("its files are others")
        return record
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{path} lacks what it should hold ({error}); {REBUILD}") from error


def open_index(folder: str | Path, memory_bytes: int) -> OpenIndex | None:
    """Open a directory's index; None where it has none.

    Args:
        folder: The embedding directory.
        memory_bytes: Lists beyond it are read ahead of their search.

    Raises:
        StoreError: A file of it is missing, damaged or contradicts the others.
    """
    record = read_record(folder)
    while record is not None:
        try:
            return _open(Path(folder) / "index", record, memory_bytes)
        except (StoreError, FileNotFoundError) as error:
            again = read_record(folder)
            if again == record:  # or the next generation has taken its place meanwhile
                if isinstance(error, FileNotFoundError):
                    raise StoreError(f"{error.filename} is missing; {REBUILD}") from error
                raise
            record = again
    return None


def check_files(folder: str | Path, record: IndexRecord) -> list[tuple[Path, str]]:
    """Files of an index that are not what its record says, each with what is wrong."""
    wrong = []
    for name, size, crc in record.files.values():
        path = Path(folder) / "index" / name
        if not path.exists():
            wrong.append((path, "is missing"))
        elif path.stat().st_size != size:
            wrong.append((path, f"has {path.stat().st_size:,} bytes, not {size:,}"))
        elif _checksum(path) != crc:
            wrong.append((path, "is damaged: its checksum is another"))
    return wrong


class NextIndex:
    """The files of the next generation until they appear. A context: leaving it drops what is not published."""

    def __init__(self, folder: Path, index: faiss.Index) -> None:
        self._dataset = folder / "dataset.json"
        self._folder = folder / "index"
        self._index = index
        self._temporaries: dict[str, tuple[Path, BinaryIO]] = {}

    def __enter__(self) -> "NextIndex":
        self._folder.mkdir(exist_ok=True)
        remove_stale_temporaries(self._folder)
        return self

    def __exit__(self, *_: object) -> None:
        for path, file in self._temporaries.values():
            with contextlib.suppress(OSError):  # a full disk fails the flush
                file.close()
            path.unlink(missing_ok=True)

    def filler(self, *, device: str, dtype: torch.dtype) -> Filler:
        """What adds vectors to the index."""
        return Filler(self._index, self._folder, device=device, dtype=dtype)

    def take_lists(self, filler: Filler, keep: Mask | None, memory_bytes: int) -> None:
        """Write the lists to their file, and have the index read them there; of an IVF kind only."""
        path, file = self._temporary("lists")
        filler.finish(file, keep)
        _map(self._index, path, memory_bytes)

    def publish(self, record: IndexRecord, shards: Sequence[IndexedShard], prompts: Float32Array | None) -> IndexRecord:
        """Let the files appear in place of the earlier ones, which are removed; the index is not to be used any more.

        Raises:
            StoreError: They cannot be written.
        """
        token = secrets.token_hex(4)
        names = {role: f"{role}-{token}.{suffix}" for role, suffix in _SUFFIXES.items()}
        if prompts is not None:
            _, file = self._temporary("prompts")
            np.save(file, prompts)
            file.flush()
        path, _ = self._temporary("shards")
        pq.write_table(pa.Table.from_pylist([shard._asdict() for shard in shards], schema=_SHARD_SCHEMA), path)
        ivf = ivf_of(self._index)
        if ivf is not None:
            faiss.downcast_InvertedLists(ivf.invlists).filename = names["lists"]
        path, _ = self._temporary("index")
        write_index(self._index, path)
        files = {
            role: (names[role], path.stat().st_size, _checksum(path)) for role, (path, _) in self._temporaries.items()
        }
        published = replace(record, files=files)
        for _, file in self._temporaries.values():
            os.fsync(file.fileno())
        # Under a lock, lest another run's cleaning meet files that its metadata does not name yet.
        with exclusively(self._dataset):
            for role, (path, _) in self._temporaries.items():
                path.rename(self._folder / names[role])
            sync_folder(self._folder)
            write_json(self._folder / METADATA, asdict(published))
            for path in self._folder.iterdir():
                if _NAME.fullmatch(path.name) and path.name not in {name for name, _, _ in files.values()}:
                    path.unlink()
        return published

    def _temporary(self, role: str) -> tuple[Path, BinaryIO]:
        self._temporaries[role] = create_temporary(self._folder / role, ".tmp")
        return self._temporaries[role]


def _open(folder: Path, record: IndexRecord, memory_bytes: int) -> OpenIndex:
    for role, (name, size, crc) in record.files.items():
        path = folder / name
        found = path.stat().st_size
        if found != size:
            raise StoreError(f"{path} has {found:,} bytes, not {size:,}; {REBUILD}")
        if role != "lists" and _checksum(path) != crc:  # FAISS trusts what it reads
            raise StoreError(f"{path} is damaged: its checksum is another; {REBUILD}")
    try:
        # FAISS itself would say on standard output where it maps the lists from.
        index = faiss.read_index(str(folder / record.files["index"][0]), faiss.IO_FLAG_SKIP_IVF_DATA)
        if "lists" in record.files:
            _map(index, folder / record.files["lists"][0], memory_bytes)
        rows = pq.read_table(folder / record.files["shards"][0], schema=_SHARD_SCHEMA).to_pylist()
        prompts = None
        if "prompts" in record.files:
            prompts = np.load(folder / record.files["prompts"][0], allow_pickle=False)
    except (RuntimeError, KeyError, ValueError, pa.ArrowException) as error:
        raise StoreError(f"{folder} cannot be read ({str(error).splitlines()[-1]}); {REBUILD}") from error
    shards = sorted((IndexedShard(**row) for row in rows), key=lambda shard: shard.first_id)
    if index.metric_type != faiss.METRIC_INNER_PRODUCT or index.d != record.plan.dim:
        raise StoreError(
            f"{folder}: {index.d}-d, metric {index.metric_type}, is no index of these embeddings; {REBUILD}"
        )
    if sum(shard.rows for shard in shards) != record.rows or not record.rows <= index.ntotal <= record.next_id:
        raise StoreError(f"{folder}: {index.ntotal:,} vectors contradict {METADATA}; {REBUILD}")
    return OpenIndex(record=record, shards=shards, faiss=index, prompts=prompts)


def _map(index: faiss.Index, path: Path, memory_bytes: int) -> None:
    ahead = AHEAD_THREADS if path.stat().st_size > memory_bytes else 0
    map_lists(faiss.downcast_InvertedLists(ivf_of(index).invlists), path, ahead)


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


_SUFFIXES = {"index": "faiss", "lists": "bin", "shards": "parquet", "prompts": "npy"}
_NAME = re.compile(r"(index|lists|shards|prompts)-[0-9a-f]{8}\.(faiss|bin|parquet|npy)")
REBUILD = "build the index again, with clipindex index --rebuild"
