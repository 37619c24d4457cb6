"""Encoded batches to Parquet shards: rows and rejects go home, in order."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clipindex.errors import StoreError
from clipindex.pipeline.batch import EncodedBatch, ShardEnd, Slot, sample_reject
from clipindex.stages import StageClock
from clipindex.store import Dataset, ShardRecord, ShardWriter
from clipindex.types import ImageEncoder, Reject, Shard, Vectors


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardResult:
    """What became of one shard: published, or left out for `error`."""

    shard: Shard
    record: ShardRecord | None
    """Of what is published."""
    error: str | None
    reject_stages: Counter[str]
    """Rejects by stage; each one's reason is in the rejects file."""
    is_ours: bool = True
    """Published by this run, not by another one meanwhile."""


class Counts(NamedTuple):
    """How far a pipeline is; counts of this run only."""

    rows: int = 0
    rejects: int = 0
    shards: int = 0
    """Finished, published or failed."""
    bytes: int = 0
    """Of finished tars and of the part read of the current one."""


class Home:
    """Brings events back to their shards: one open shard at a time, since they come in tar order."""

    def __init__(self, folder: Path, dataset: Dataset, encoder: ImageEncoder, decoder: Callable[[], str]) -> None:
        self._folder = folder
        self._dataset = dataset
        self._encoder = encoder
        self._decoder = decoder
        self._writer: ShardWriter | None = None
        self._started = 0.0
        self._stages: Counter[str] = Counter()
        self._rows = self._rejects = self._shards = self._bytes = self._position = 0

    def counts(self) -> Counts:
        """How far it is."""
        return Counts(self._rows, self._rejects, self._shards, self._bytes + self._position)

    def receive(self, encoded: Iterable[EncodedBatch], clock: StageClock) -> Iterator[list[ShardResult]]:
        """Take batches in; after each, yield the shards that it finished.

        Raises:
            StoreError: A shard cannot be written; the one in hand is dropped.
        """
        try:
            for batch in encoded:
                with clock.timing("write"):
                    finished = list(self._take(batch))
                yield finished
        except OSError as error:
            raise StoreError(
                f"{self._folder}: {error.strerror or error}; published shards are kept: mend that and run again"
            ) from error
        finally:
            if self._writer is not None:
                self._writer.abort()

    def _take(self, batch: EncodedBatch) -> Iterator[ShardResult]:
        run: list[Slot] = []
        for event in batch.events:
            if isinstance(event, Slot):
                run.append(event)
                continue
            self._rows_home(run, batch)
            run = []
            if isinstance(event, Shard):
                self._writer = ShardWriter(self._folder, event, self._dataset)
                self._stages, self._started = Counter(), time.perf_counter()
            elif isinstance(event, Reject):
                self._reject_home(event)
            else:
                yield self._finish(event)
        self._rows_home(run, batch)

    def _rows_home(self, run: Sequence[Slot], batch: EncodedBatch) -> None:
        if not run:
            return
        assert self._writer is not None
        faulty = _faulty_norms(batch.vectors)
        rows: list[Slot] = []
        for slot in run:
            outcome = batch.outcomes[slot.place]
            if isinstance(outcome, Reject):
                self._reject_home(outcome)
                continue
            if slot.place in faulty:
                reason = f"embedding of norm {faulty[slot.place]}"
                self._reject_home(sample_reject(slot.sample, "encode", reason))
                continue
            rows.append(slot)
        if rows:
            assert batch.vectors is not None
            at = [slot.place for slot in rows]
            sizes = [size for index in at if not isinstance(size := batch.outcomes[index], Reject)]
            self._writer.append([slot.sample for slot in rows], batch.vectors.take(at), sizes)
        self._rows += len(rows)
        last = run[-1].sample
        self._position = (last.tar_offset or 0) + len(last.image)

    def _reject_home(self, reject: Reject) -> None:
        assert self._writer is not None
        self._writer.reject(reject)
        self._rejects += 1
        self._stages[reject.stage] += 1

    def _finish(self, end: ShardEnd) -> ShardResult:
        assert self._writer is not None
        writer, self._writer = self._writer, None
        self._shards += 1
        self._bytes, self._position = self._bytes + end.shard.size, 0
        if end.error is not None:
            writer.abort()
            return ShardResult(shard=end.shard, record=None, error=end.error, reject_stages=self._stages)
        try:
            record, is_ours = writer.publish(
                samples=end.samples,
                precision=self._encoder.precision,
                decoder=self._decoder(),
                device=self._encoder.device,
                seconds=time.perf_counter() - self._started,
                broken=end.broken,
            )
        except BaseException:
            writer.abort()
            raise
        return ShardResult(shard=end.shard, record=record, error=None, reject_stages=self._stages, is_ours=is_ours)


def _faulty_norms(vectors: Vectors | None) -> dict[int, float]:
    """Of images with a vector, or one of two, that is no number or nothing: its norm, by row."""
    if vectors is None:
        return {}
    faulty = np.flatnonzero(~((vectors.norms > 0) & (vectors.norms < np.inf)))
    return _faulty_norms(vectors.pre_projection) | dict(
        zip(faulty.tolist(), vectors.norms[faulty].tolist(), strict=True)
    )
