"""Tars to batches of pixels: one thread reads and lays samples into slots, many decode into them."""

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from clipindex.errors import SampleError, ShardError, SourceError
from clipindex.fileio import stat_source
from clipindex.pipeline.batch import Batch, Outcome, ShardEnd, Slot, sample_reject
from clipindex.shards import read_samples
from clipindex.stages import StageClock
from clipindex.types import Reject, Sample, Shard, UInt8Array

Decode = Callable[[bytes, UInt8Array], tuple[int, int]]
"""Writes an encoded image's pixels [H, W, 3] and returns its own width and height; raises SampleError."""

DECODE_CHUNK = 8
"""Images a decode task: about 10 ms of work, against 50 microseconds that a task costs under the GIL."""


def lay_batches(
    shards: Iterable[Shard], decode: Decode, buffers: Sequence[UInt8Array], pool: ThreadPoolExecutor
) -> Iterator[Batch]:
    """Lay samples into batches, which take the buffers by turns, and start their decoding.

    A buffer must have come home before its next turn: the caller bounds how many batches are in flight.
    """
    turns = itertools.cycle(buffers)
    batch = Batch(next(turns))
    chunk: list[Sample] = []

    def decode_chunk() -> None:
        if chunk:
            first = batch.used - len(chunk)
            batch.decoding.append(pool.submit(_decode, tuple(chunk), decode, batch.images[first : batch.used]))
            chunk.clear()

    for event in _events(shards):
        if isinstance(event, Sample):
            batch.events.append(Slot(event, batch.used))
            batch.used += 1
            chunk.append(event)
            if len(chunk) == DECODE_CHUNK:
                decode_chunk()
        else:
            batch.events.append(event)
        if batch.is_full():
            decode_chunk()
            yield batch
            batch = Batch(next(turns))
    decode_chunk()
    yield batch


def decoded(batches: Generator[Batch, None, None], clock: StageClock) -> Iterator[tuple[Batch, list[Outcome]]]:
    """Hand on each batch when all of its slots are decoded, with their outcomes."""
    with contextlib.closing(batches):
        for batch in batches:
            outcomes: list[Outcome] = []
            for decoding in batch.decoding:
                found, seconds = decoding.result()
                outcomes += found
                clock.seconds["decode"] += seconds
            yield batch, outcomes


def _events(shards: Iterable[Shard]) -> Iterator[Shard | Sample | Reject | ShardEnd]:
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
        yield ShardEnd(shard, samples, error)


def _decode(samples: Sequence[Sample], decode: Decode, out: UInt8Array) -> tuple[list[Outcome], float]:
    started = time.thread_time()
    outcomes: list[Outcome] = []
    for sample, pixels in zip(samples, out, strict=True):
        try:
            outcomes.append(decode(sample.image, pixels))
        except (SampleError, MemoryError) as error:
            outcomes.append(sample_reject(sample, "decode", str(error) or "no memory to decode it"))
    return outcomes, time.thread_time() - started
