"""Tars to batches of pixels: one thread reads and lays samples into slots, many decode into them."""

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from clipindex.errors import SampleError, ShardError, SourceError
from clipindex.pipeline.batch import Batch, Decoded, Outcome, ShardEnd, sample_reject
from clipindex.pipeline.device_share import DeviceShare
from clipindex.pipeline.in_hand import InHand
from clipindex.shards import read_samples
from clipindex.stages import DEVICE_DECODE, StageClock
from clipindex.types import Reject, Sample, Shard, UInt8Array
from clipindex.urls import stat_source

Decode = Callable[[bytes, UInt8Array, bool], tuple[int, int]]
"""Writes an encoded image's pixels [H, W, 3] and returns its own width and height; raises SampleError. The last
argument says that the image is a suspect, to be decoded in a process of its own."""

DECODE_CHUNK = 8
"""Images a decode task of the CPU's: about 10 ms of work, against 50 microseconds that a task costs under the GIL."""


def lay_batches(
    shards: Iterable[Shard],
    decode: Decode,
    share: DeviceShare,
    buffers: Sequence[UInt8Array],
    pool: ThreadPoolExecutor,
    in_hand: InHand,
    *,
    max_bytes: int,
    salvage: bool,
) -> Iterator[Batch]:
    """Lay samples into batches, which take the buffers by turns, and start their decoding.

    A buffer must have come home before its next turn: the caller bounds how many batches are in flight.
    """
    turns = itertools.cycle(buffers)
    batch = Batch(next(turns))
    chunk: list[tuple[str, Sample]] = []
    shard_name = ""

    def decode_chunk() -> None:
        if chunk:
            pixels = batch.images[batch.used - len(chunk) : batch.used]
            batch.decoding.append(pool.submit(_decode, tuple(chunk), decode, share, in_hand, pixels))
            chunk.clear()

    for event in _events(shards, max_bytes, salvage):
        if isinstance(event, Sample):
            batch.lay(event)
            chunk.append((shard_name, event))
            if len(chunk) >= (share.chunk or DECODE_CHUNK):
                decode_chunk()
        else:
            batch.events.append(event)
            if isinstance(event, Shard):
                shard_name = event.name
        if batch.is_full():
            decode_chunk()
            yield batch
            batch = Batch(next(turns))
    decode_chunk()
    yield batch


def decoded(
    batches: Generator[Batch, None, None], clock: StageClock
) -> Generator[tuple[Batch, list[Outcome]], None, None]:
    """Hand on each batch when all of its slots are decoded, with their outcomes."""
    with contextlib.closing(batches):
        for batch in batches:
            outcomes: list[Outcome] = []
            for decoding in batch.decoding:
                done = decoding.result()
                outcomes += done.outcomes
                clock.seconds["decode"] += done.seconds
                clock.seconds[DEVICE_DECODE] += done.device_seconds
            yield batch, outcomes


def _events(shards: Iterable[Shard], max_bytes: int, salvage: bool) -> Iterator[Shard | Sample | Reject | ShardEnd]:
    for shard in shards:
        yield shard
        samples, error, broken = 0, None, None
        try:
            for item in read_samples(shard, max_bytes=max_bytes):
                samples += 1
                yield item
        except ShardError as raised:
            broken = str(raised)
        except SourceError as raised:
            error = str(raised)
        is_salvaged = salvage and samples > 0
        yield ShardEnd(shard, samples, error or _changed(shard) or (None if is_salvaged else broken), broken)


def _changed(shard: Shard) -> str | None:
    try:
        if stat_source(shard.url) == (shard.size, shard.version):
            return None
    except SourceError as error:
        return str(error)
    return f"{shard.url}: changed while it was read; run again"


def _decode(
    samples: Sequence[tuple[str, Sample]], decode: Decode, share: DeviceShare, in_hand: InHand, out: UInt8Array
) -> Decoded:
    """Decode samples, each beside its shard's name: first what is for the device, then the rest."""
    started = time.thread_time()
    outcomes: list[Outcome] = []
    names = [(shard_name, sample.key) for shard_name, sample in samples]
    with in_hand.decoding() as hold:
        images = [sample.image for _, sample in samples]
        sizes, device_seconds = share.decode(images, lambda mine: hold([names[at] for at in mine]), out)
        for name, (_, sample), size, pixels in zip(names, samples, sizes, out, strict=True):
            try:
                outcomes.append(size or decode(sample.image, pixels, hold([name])[0]))
            except SampleError as error:
                outcomes.append(sample_reject(sample, "decode", str(error)))
    return Decoded(outcomes, time.thread_time() - started, device_seconds)
