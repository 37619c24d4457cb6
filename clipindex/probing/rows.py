"""Labelled rows of embedding directories, as blocks of features: held in memory where they fit, else read each time.

Labels are kept in any case, eight bytes a row; an embedding of 512 half floats is 1 KiB.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from clipindex.devices import machine_memory_bytes
from clipindex.errors import ClassesError, StoreError, UsageError
from clipindex.logistic import Block, Passes
from clipindex.probing.stored import check_unchanged, read_stored
from clipindex.store import DTYPES, NORM_COLUMNS, EmbeddingBatch, read_dataset, read_embeddings
from clipindex.threads import prefetch

Ids = npt.NDArray[np.int64]

FEATURES = ("raw", "normalized")
"""What a probe sees of a row: the encoder's output as it was, or brought to unit length."""
LABEL_COLUMN = "label"

_BATCHES_AHEAD = 2
_MEMORY_SHARE = 4
"""A quarter of the machine's memory may hold embeddings, unless the user says otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """The labels of a directory, shard by shard in name order."""

    folder: Path
    shards: Mapping[str, str]
    """Which, and in what state they were read."""
    labels: Ids
    """[rows], 0 where there is none."""
    is_labelled: npt.NDArray[np.bool_]
    """[rows]."""

    @property
    def left_out(self) -> int:
        """Rows without a label."""
        return int((~self.is_labelled).sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Rows of one directory that are taken, with their classes."""

    folder: Path
    shards: Mapping[str, str]
    """Which, and in what state their labels were read: they must be in it whenever their vectors are."""
    class_ids: Ids
    """For each row of these shards, -1 where it is not taken."""
    vectors: str = "embedding"
    """The column of them."""


def read_all_labels(folder: str | Path, column: str = LABEL_COLUMN) -> Labels:
    """The labels of a directory.

    Raises:
        UsageError: There is no such column of labels.
        ClassesError: No row has one.
        StoreError: A file is damaged.
    """
    if column != LABEL_COLUMN:
        raise UsageError(f"--label {column}: the column of class labels is {LABEL_COLUMN!r}, that of lists 'labels'")
    folder = Path(folder)
    stored = read_stored(folder, ("label",))
    labels, is_labelled = stored.numbers("label")
    found = Labels(folder=folder, shards=stored.states, labels=labels, is_labelled=is_labelled)
    if not found.is_labelled.any():
        raise ClassesError(
            f"{folder}: none of {len(found.labels):,} rows has a label; a probe learns from labels, which come from"
            " the .cls members of the tars; lists of labels are asked for by --label labels"
        )
    return found


def find_classes(labels: Labels) -> tuple[int, ...]:
    """The labels that occur, ascending.

    Raises:
        ClassesError: There are fewer than two.
    """
    values = np.unique(labels.labels[labels.is_labelled])
    if len(values) < 2:
        raise ClassesError(
            f"{labels.folder}: all labelled rows have label {values[0]}; a probe tells two or more apart"
        )
    return tuple(values.tolist())


def take_part(labels: Labels, classes: Sequence[int]) -> tuple[Part, dict[int, int]]:
    """All labelled rows of a directory, and how many have which label that is none of `classes`.

    Those have class ids from `len(classes)` on, in the order of their labels.
    """
    known = np.asarray(classes, np.int64)
    present, counts = np.unique(labels.labels[labels.is_labelled], return_counts=True)
    is_unseen = ~np.isin(present, known)
    unseen = dict(zip(present[is_unseen].tolist(), counts[is_unseen].tolist(), strict=True))
    values = np.concatenate([known, present[is_unseen]])
    order = np.argsort(values)
    ids = order[np.searchsorted(values[order], np.where(labels.is_labelled, labels.labels, values[0]))]
    part = Part(
        folder=labels.folder, shards=labels.shards, class_ids=np.where(labels.is_labelled, ids, -1).astype(np.int64)
    )
    return part, unseen


class Streamed:
    """Rows that are read from Parquet in each pass.

    Args:
        parts: Which, of directories with one number of dimensions.
        features: One of `FEATURES`.
        device: Where blocks go.
    """

    def __init__(self, parts: Sequence[Part], features: str, device: torch.device) -> None:
        assert features in FEATURES
        self.class_ids: Ids = np.concatenate([part.class_ids[part.class_ids >= 0] for part in parts])
        self.dim = _dim(parts[0])
        self._parts = parts
        self._features = features
        self._device = device

    @property
    def held_bytes(self) -> int:
        """What `hold` would take."""
        widest = max(np.dtype(read_dataset(part.folder).dtype).itemsize for part in self._parts)
        return len(self.class_ids) * self.dim * widest

    def passes(self, chosen: Ids | None = None, at_once: int = 2048) -> Passes:
        """Passes over rows, or over those whose numbers among them are `chosen`, ascending."""

        def blocks() -> Iterator[Block]:
            for embedding, norm, ids in self._read(chosen):
                for first in range(0, len(ids), at_once):
                    rows = slice(first, first + at_once)
                    scale = None if norm is None else norm[rows].to(self._device)
                    yield Block(embedding[rows].to(self._device), scale, ids[rows].to(self._device))

        return blocks

    def hold(self, chosen: Ids | None = None) -> "Held":
        """Read rows into memory, in the type in which they are stored and in the order of `chosen`, if given."""
        class_ids = self.class_ids if chosen is None else self.class_ids[chosen]
        held = _empty_held(self._parts, self.dim, class_ids, self._features, self._device)
        places = None if chosen is None else torch.from_numpy(np.argsort(chosen)).to(self._device)
        at = 0
        for embedding, norm, _ in self._read(chosen):
            read = slice(at, at + len(embedding))
            rows = read if places is None else places[read]
            held.embedding[rows] = embedding.to(self._device)
            if held.norm is not None and norm is not None:
                held.norm[rows] = norm.to(self._device)
            at = read.stop
        pa.default_memory_pool().release_unused()  # Arrow would keep as much as the rows take, for its next reading
        return held

    def _read(self, chosen: Ids | None) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
        """Stored embeddings [n, D], norms [n] for raw features, class ids [n].

        What was yielded counts only once all is: shards may be replaced until the last row of them is read.
        """
        is_chosen: npt.NDArray[np.bool_] | None = None
        if chosen is not None:
            is_chosen = np.zeros(len(self.class_ids), np.bool_)
            is_chosen[chosen] = True
        taken = 0
        for part in self._parts:
            row = 0
            norm = NORM_COLUMNS[part.vectors] if self._features == "raw" else None
            columns = () if norm is None else (norm,)
            check_unchanged(part.folder, part.shards)
            batches = prefetch(read_embeddings(part.folder, columns, tuple(part.shards), part.vectors), _BATCHES_AHEAD)
            with contextlib.closing(batches):
                for batch in batches:
                    ids = part.class_ids[row : row + len(batch.embedding)]
                    row += len(batch.embedding)
                    wanted = np.flatnonzero(ids >= 0)
                    taken += len(wanted)
                    if is_chosen is not None:
                        wanted = wanted[is_chosen[taken - len(wanted) : taken]]
                    if len(ids) < len(batch.embedding):
                        break
                    if len(wanted):
                        yield (*_values(batch, norm, wanted, part.folder), torch.from_numpy(ids[wanted]))
            check_unchanged(part.folder, part.shards)
            assert row == len(part.class_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Rows in the memory of a device."""

    embedding: torch.Tensor
    """[n, D], as stored."""
    norm: torch.Tensor | None
    """Float32 [n], for raw features."""
    labels: torch.Tensor
    """Class ids, int64 [n]."""
    class_ids: Ids
    """The same in NumPy."""

    def passes(self, chosen: Ids | None = None, at_once: int = 2048) -> Passes:
        """Passes over rows, or over those whose numbers are `chosen`, in that order."""
        device = self.embedding.device
        numbers = None if chosen is None else torch.from_numpy(chosen).to(device)
        count = len(self.labels) if numbers is None else len(numbers)

        def blocks() -> Iterator[Block]:
            for first in range(0, count, at_once):
                part = slice(first, first + at_once)
                if numbers is None:
                    yield Block(self.embedding[part], None if self.norm is None else self.norm[part], self.labels[part])
                else:
                    yield Block(*self._take(numbers[part]))

        return blocks

    def hold(self, chosen: Ids) -> "Held":
        """Some of the rows, in the order of `chosen`."""
        embedding, norm, labels = self._take(torch.from_numpy(chosen).to(self.embedding.device))
        return Held(embedding=embedding, norm=norm, labels=labels, class_ids=self.class_ids[chosen])

    def _take(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Embeddings, norms and labels of rows; by `index_select`, as indexing takes eight times as long on a CPU."""
        norm = None if self.norm is None else self.norm[numbers]
        return self.embedding.index_select(0, numbers), norm, self.labels[numbers]


Rows = Streamed | Held


def hold_if_fits(rows: Streamed, memory_bytes: int | None, device: torch.device, chosen: Ids | None = None) -> Rows:
    """The rows in memory, where they fit into what may be used.

    Args:
        rows: The rows.
        memory_bytes: What may be used; by default a quarter of the machine's memory, or two thirds of what is free on a
            CUDA device.
        device: Where they go.
        chosen: The order in which they are held, all of them; as stored by default.
    """
    return rows.hold(chosen) if rows.held_bytes <= (memory_bytes or usable_bytes(device)) else rows


def usable_bytes(device: torch.device) -> int:
    """Memory that embeddings may take, by default."""
    if device.type == "cuda":
        return 2 * torch.cuda.mem_get_info(device)[0] // 3
    return machine_memory_bytes() // _MEMORY_SHARE


def random_ranks(class_ids: Ids, seed: int) -> Ids:
    """The place of each row among those of its class, which are shuffled: what all draws of rows are made with."""
    order = np.lexsort((np.random.default_rng(seed).random(len(class_ids)), class_ids))
    counts = np.bincount(class_ids)
    ranks = np.empty(len(class_ids), np.int64)
    ranks[order] = np.arange(len(class_ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks


def split(class_ids: Ids, fraction: float, seed: int) -> tuple[Ids, Ids]:
    """Row numbers that stay and that are held out: of each class the same fraction, rounded, and never all of it.

    Raises:
        ClassesError: No class has rows enough to hold one out.
    """
    counts = np.bincount(class_ids)
    out = np.minimum(np.round(counts * fraction), np.maximum(counts - 1, 0)).astype(np.int64)
    is_out = random_ranks(class_ids, seed) < out[class_ids]
    if not is_out.any():
        raise ClassesError(
            f"{len(class_ids):,} rows of {len(counts)} classes are too few to hold {fraction:g} of each class out"
        )
    return np.flatnonzero(~is_out), np.flatnonzero(is_out)


def _empty_held(parts: Sequence[Part], dim: int, class_ids: Ids, features: str, device: torch.device) -> Held:
    stored = [DTYPES.index(read_dataset(part.folder).dtype) for part in parts]
    dtype = (torch.float16, torch.float32)[max(stored)]
    return Held(
        embedding=torch.empty(len(class_ids), dim, dtype=dtype, device=device),
        norm=torch.empty(len(class_ids), device=device) if features == "raw" else None,
        labels=torch.from_numpy(class_ids).to(device),
        class_ids=class_ids,
    )


def _dim(part: Part) -> int:
    dataset = read_dataset(part.folder)
    model = dataset.model if part.vectors == "embedding" else dataset.pre_projection
    assert model is not None
    return model.dim


def _values(
    batch: EmbeddingBatch, norm_column: str | None, wanted: Ids, folder: Path
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embeddings and norms of some rows of a batch; refuses what is no number."""
    embedding = batch.embedding if len(wanted) == len(batch.embedding) else batch.embedding[wanted]
    norm = None if norm_column is None else batch.columns[norm_column].to_numpy()[wanted]
    sums = torch.from_numpy(embedding).sum(1, dtype=torch.float32)
    if norm is not None:
        sums = sums * torch.from_numpy(norm)
    wrong = torch.nonzero(~torch.isfinite(sums))
    if len(wrong):
        row = batch.first_row + int(wanted[int(wrong[0, 0])])
        raise StoreError(
            f"{folder}/embeddings/{batch.shard.name}.parquet: row {row} is not a number; delete the file and embed its"
            " tar again"
        )
    return torch.from_numpy(embedding), None if norm is None else torch.from_numpy(norm)
