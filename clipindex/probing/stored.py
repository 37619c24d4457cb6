"""Columns of a directory in memory, and whether its shards are still those that they were read from.

Labels and keys are read once, embeddings after them and often many times; what belongs together is told by its place.
A shard that is replaced in between may have as many rows in another order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clipindex.errors import StoreError
from clipindex.multi_label import with_single_labels
from clipindex.store import embedding_schema, read_columns, read_dataset, shard_states


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Some columns of all rows of a directory."""

    states: Mapping[str, str]
    """Of each shard with rows, in name order, as `store.shard_states` tells it."""
    sizes: tuple[int, ...]
    """Rows of each of these shards."""
    columns: Mapping[str, pa.ChunkedArray]

    def numbers(self, column: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """A column of integers [rows], 0 where there is none, and whether there is one [rows]."""
        values = self.columns[column]
        return values.fill_null(0).to_numpy().astype(np.int64), values.is_valid().to_numpy()


def read_stored(folder: Path, columns: Sequence[str]) -> Stored:
    """Read some columns of a directory, all rows of them.

    Where some rows have lists of `labels`, those of others that have a single one are lists of one.

    Raises:
        StoreError: A file is damaged, or the folder is no embedding directory.
    """
    schema = embedding_schema(read_dataset(folder))
    states = shard_states(folder)  # before the rows: what is replaced between the two has another state from then on
    sizes: dict[str, int] = {}
    wanted = tuple(dict.fromkeys((*columns, "label"))) if "labels" in columns else columns
    chunks: dict[str, list[pa.Array]] = {column: [] for column in wanted}
    for name, arrays in read_columns(folder, wanted, list(states)):
        sizes[name] = sizes.get(name, 0) + len(arrays[wanted[0]])
        for column in wanted:
            chunks[column].append(arrays[column])
    if any(chunk.null_count < len(chunk) for chunk in chunks.get("labels", [])):
        chunks["labels"] = list(map(with_single_labels, chunks["label"], chunks["labels"]))
    return Stored(
        states={name: states[name] for name in sizes},
        sizes=tuple(sizes.values()),
        columns={column: pa.chunked_array(found, schema.field(column).type) for column, found in chunks.items()},
    )


def check_unchanged(folder: Path, states: Mapping[str, str]) -> None:
    """Refuse shards that are not what they were.

    Raises:
        StoreError: One has gone, or was replaced.
    """
    if not states.items() <= shard_states(folder).items():
        raise StoreError(f"{folder} changed while it was read; run again when nothing writes to it")
