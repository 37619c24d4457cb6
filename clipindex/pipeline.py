"""The way from tar bytes to Parquet rows on one device; the only place where the stages meet.

    reader thread     tars ─▶ samples ─▶ slots of a fixed-size batch     (one thread; tar order)
    decode threads    encoded bytes ─▶ uint8 pixels, straight into slots (N threads; libjpeg and PyTorch drop the GIL)
    encode thread     batch ─▶ embeddings                                (one thread per device)
    caller's thread   rows go home to their shards, in order ─▶ Parquet

A batch is an ordered list of events (a shard begins, a sample, a reject, a shard ends) beside one pixel buffer, so
order never has to be restored. Batches span shards. What is in memory: the pixel buffers, which are reused, and the
encoded bytes of the samples in them.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clipindex.decode import decode_image
from clipindex.errors import SampleError, ShardError, SourceError, StoreError
from clipindex.fileio import stat_source
from clipindex.shards import read_samples
from clipindex.store import Dataset, ShardRecord, ShardWriter
from clipindex.threads import num_cores, prefetch
from clipindex.types import Float32Array, ImageEncoder, Preprocess, Reject, Sample, Shard, UInt8Array

BATCHES_AHEAD = 2
"""Assembled batches that wait for the device: one to start on at once, one in case the next decodes slowly."""
DECODE_CHUNK = 8
"""Images a decode task: about 10 ms of work, against 50 microseconds that a task costs under the GIL."""
EVENTS_PER_SLOT = 4
"""A batch is sent on when it has this many events a slot, so that a tar full of rejects cannot fill memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run is; counts of this run only."""

    rows: int = 0
    rejects: int = 0
    shards: int = 0
    """Finished, published or failed."""
    bytes: int = 0
    """Of finished tars and of the part read of the current one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardResult:
    """What became of one shard: published, or left out for `error`."""

    shard: Shard
    record: ShardRecord | None
    error: str | None
    reject_stages: Counter[str]
    """Rejects by stage; each one's reason is in the rejects file."""


@dataclass(frozen=True, slots=True)
class _ShardEnd:
    shard: Shard
    samples: int
    error: str | None


@dataclass(frozen=True, slots=True)
class _Slot:
    """A sample on its way to a row: its pixels are at `index` of the batch's buffer."""

    sample: Sample
    index: int


_Event = Shard | _Slot | Reject | _ShardEnd


@dataclass(slots=True)
class _Batch:
    images: UInt8Array
    """[B, H, W, 3]; slots from `used` on are left over from an earlier batch."""
    events: list[_Event] = field(default_factory=list)
    decoding: list["Future[list[tuple[int, int] | Reject]]"] = field(default_factory=list)
    """In slot order; each gives the source (width, height) or a reject for each of its slots."""
    used: int = 0

    def is_full(self) -> bool:
        return self.used == len(self.images) or len(self.events) >= EVENTS_PER_SLOT * len(self.images)


@dataclass(frozen=True, slots=True)
class _Encoded:
    events: list[_Event]
    outcomes: list[tuple[int, int] | Reject]
    """For each slot."""
    embeddings: Float32Array
    norms: Float32Array


def embed_shards(
    shards: Iterable[Shard],
    encoder: ImageEncoder,
    folder: Path,
    dataset: Dataset,
    *,
    batch_size: int,
    decode_threads: int | None = None,
    precision: str,
    device: str,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Generator[ShardResult, None, None]:
    """Embed shards in order, publishing each when its last sample has come home.

    Args:
        shards: What to embed.
        encoder: The image tower; used by one thread.
        folder: The embedding directory.
        dataset: Its dataset.json.
        batch_size: Images a call of the encoder.
        decode_threads: One for each core by default.
        precision: Recorded with each shard.
        device: Recorded with each shard.
        on_progress: Called after each batch.

    Yields:
        One result a shard. A shard whose stream breaks is not published, and the next one is taken up. Closing the
        generator drops the shard in hand and publishes nothing half.

    Raises:
        StoreError: A shard cannot be written; what was published stays.
    """
    threads = decode_threads or num_cores()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        # In flight at once: those ahead, one being laid, one waiting for the queue, one in the encoder.
        buffers = [encoder.new_batch(batch_size) for _ in range(BATCHES_AHEAD + 3)]
        batches = prefetch(_assemble(shards, encoder.info.preprocess, buffers, pool), BATCHES_AHEAD)
        encoded = prefetch(_encode(batches, encoder), 1)
        try:
            yield from _Home(folder, dataset, precision, device, on_progress).receive(encoded)
        finally:
            encoded.close()
            pool.shutdown(cancel_futures=True)


def _assemble(
    shards: Iterable[Shard], preprocess: Preprocess, buffers: Sequence[UInt8Array], pool: ThreadPoolExecutor
) -> Iterator[_Batch]:
    """Lay samples into batches, which take the buffers by turns, and start their decoding."""
    turns = itertools.cycle(buffers)
    batch = _Batch(next(turns))
    chunk: list[Sample] = []

    def decode_chunk() -> None:
        if chunk:
            first = batch.used - len(chunk)
            batch.decoding.append(pool.submit(_decode, tuple(chunk), preprocess, batch.images[first : batch.used]))
            chunk.clear()

    for event in _events(shards):
        if isinstance(event, Sample):
            batch.events.append(_Slot(event, batch.used))
            batch.used += 1
            chunk.append(event)
            if len(chunk) == DECODE_CHUNK:
                decode_chunk()
        else:
            batch.events.append(event)
        if batch.is_full():
            decode_chunk()
            yield batch
            batch = _Batch(next(turns))
    decode_chunk()
    yield batch


def _events(shards: Iterable[Shard]) -> Iterator[Shard | Sample | Reject | _ShardEnd]:
    for shard in shards:
        yield shard
        samples, error = 0, None
        try:
            for item in read_samples(shard):
                samples += 1
                yield item
            if stat_source(shard.url) != (shard.size, shard.version):
                error = f"{shard.url}: changed while it was read; run again"
        except (ShardError, SourceError) as raised:
            error = str(raised)
        yield _ShardEnd(shard, samples, error)


def _decode(samples: Sequence[Sample], preprocess: Preprocess, out: UInt8Array) -> list[tuple[int, int] | Reject]:
    outcomes: list[tuple[int, int] | Reject] = []
    for sample, pixels in zip(samples, out, strict=True):
        try:
            outcomes.append(decode_image(sample.image, preprocess, pixels))
        except (SampleError, MemoryError) as error:
            outcomes.append(_reject(sample, "decode", str(error) or "no memory to decode it"))
    return outcomes


def _reject(sample: Sample, stage: str, reason: str) -> Reject:
    return Reject(key=sample.key, member=sample.member, stage=stage, reason=reason, tar_offset=sample.tar_offset)


def _encode(batches: Generator[_Batch, None, None], encoder: ImageEncoder) -> Iterator[_Encoded]:
    try:
        for batch in batches:
            outcomes = [outcome for decoding in batch.decoding for outcome in decoding.result()]
            if batch.used:
                embeddings, norms = encoder.encode(batch.images[: batch.used])
            else:
                embeddings, norms = np.empty((0, encoder.info.dim), np.float32), np.empty(0, np.float32)
            yield _Encoded(batch.events, outcomes, embeddings, norms)
    finally:
        batches.close()


class _Home:
    """Brings events back to their shards: one open shard at a time, since they come in tar order."""

    def __init__(
        self,
        folder: Path,
        dataset: Dataset,
        precision: str,
        device: str,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._folder = folder
        self._dataset = dataset
        self._precision = precision
        self._device = device
        self._on_progress = on_progress
        self._writer: ShardWriter | None = None
        self._started = 0.0
        self._stages: Counter[str] = Counter()
        self._rows = self._rejects = self._shards = self._bytes = self._position = 0

    def receive(self, encoded: Iterable[_Encoded]) -> Iterator[ShardResult]:
        try:
            for batch in encoded:
                yield from self._take(batch)
                self._on_progress(
                    Progress(
                        rows=self._rows,
                        rejects=self._rejects,
                        shards=self._shards,
                        bytes=self._bytes + self._position,
                    )
                )
        except OSError as error:
            raise StoreError(
                f"{self._folder}: {error.strerror or error}; published shards are kept: mend that and run again"
            ) from error
        finally:
            if self._writer is not None:
                self._writer.abort()

    def _take(self, batch: _Encoded) -> Iterator[ShardResult]:
        run: list[_Slot] = []
        for event in batch.events:
            if isinstance(event, _Slot):
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

    def _rows_home(self, run: Sequence[_Slot], batch: _Encoded) -> None:
        if not run:
            return
        assert self._writer is not None
        rows: list[_Slot] = []
        for slot in run:
            outcome = batch.outcomes[slot.index]
            if isinstance(outcome, Reject):
                self._reject_home(outcome)
            elif not np.isfinite(batch.norms[slot.index]) or batch.norms[slot.index] == 0:
                self._reject_home(_reject(slot.sample, "encode", f"embedding of norm {batch.norms[slot.index]}"))
            else:
                rows.append(slot)
        if rows:
            at = [slot.index for slot in rows]
            sizes = [size for index in at if not isinstance(size := batch.outcomes[index], Reject)]
            self._writer.append([slot.sample for slot in rows], batch.embeddings[at], batch.norms[at], sizes)
        self._rows += len(rows)
        last = run[-1].sample
        self._position = (last.tar_offset or 0) + len(last.image)

    def _reject_home(self, reject: Reject) -> None:
        assert self._writer is not None
        self._writer.reject(reject)
        self._rejects += 1
        self._stages[reject.stage] += 1

    def _finish(self, end: _ShardEnd) -> ShardResult:
        assert self._writer is not None
        writer, self._writer = self._writer, None
        self._shards += 1
        self._bytes, self._position = self._bytes + end.shard.size, 0
        if end.error is not None:
            writer.abort()
            return ShardResult(shard=end.shard, record=None, error=end.error, reject_stages=self._stages)
        try:
            record = writer.publish(
                samples=end.samples,
                precision=self._precision,
                device=self._device,
                seconds=time.perf_counter() - self._started,
            )
        except BaseException:
            writer.abort()
            raise
        return ShardResult(shard=end.shard, record=record, error=None, reject_stages=self._stages)
