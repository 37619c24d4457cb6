"""Embedding shards: one pipeline a device, each of threads.

    reader thread     tars ─▶ samples ─▶ slots of a fixed-size batch     (one thread; tar order)
    decode threads    encoded bytes ─▶ uint8 pixels, straight into slots (N threads; libjpeg and PyTorch drop the GIL;
                      where a CUDA device decodes, each hands it the ordinary JPEGs of its chunk before the others)
    encode thread     batch ─▶ embeddings                                (one thread, a batch ahead of a CUDA device)
    caller's thread   rows go home to their shards, in order ─▶ Parquet  (a thread too where there are several devices)

What is in memory: the pixel buffers, which are reused, and the encoded bytes of the samples in them. Several devices
share the work by the shard: each takes the next one when it is free.
"""

import contextlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from clipindex.decode import MAX_PIXELS, decode_image
from clipindex.pipeline.alone import LoneDecoder
from clipindex.pipeline.batch import Batch, EncodedBatch, Outcome
from clipindex.pipeline.device_share import DeviceShare
from clipindex.pipeline.feed import Decode, decoded, lay_batches
from clipindex.pipeline.home import Counts, Home, ShardResult
from clipindex.pipeline.in_hand import InHand
from clipindex.shards import MAX_BYTES
from clipindex.stages import StageClock, StageTimes, stage_times
from clipindex.store import Dataset, published_record
from clipindex.threads import merge, num_cores, prefetch
from clipindex.types import Encoding, ImageEncoder, Reject, Shard, UInt8Array

Item = TypeVar("Item")
Begin = Callable[[UInt8Array], Callable[[], Encoding]]
"""As `ImageEncoder.begin`."""

BATCHES_AHEAD = 2
"""Assembled batches that wait for the device: one to start on at once, one in case the next decodes slowly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run is, over all of its devices."""

    counts: Counts
    stages: StageTimes
    """How busy each stage was so far."""


def embed_shards(
    shards: Iterable[Shard],
    encoders: Sequence[ImageEncoder],
    folder: Path,
    dataset: Dataset,
    *,
    batch_size: int,
    decode_threads: int | None = None,
    share: DeviceShare | None = None,
    fast_decode: bool = False,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    salvage: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Generator[ShardResult, None, None]:
    """Embed shards, publishing each when its last sample has come home.

    Args:
        shards: What to embed, begun in this order.
        encoders: The image tower, once for each device.
        folder: The embedding directory.
        dataset: Its dataset.json.
        batch_size: Images a call of an encoder.
        decode_threads: Of all devices together; one for each core by default.
        share: What of the decoding the device does, where there is one pipeline; nothing by default.
        fast_decode: As in `decode.decode_image`.
        max_pixels: As in `decode.decode_image`.
        max_bytes: As in `shards.read_samples`.
        salvage: Publish what came before the break of a broken tar, with the break recorded.
        on_progress: Called after each batch, by one thread at a time.

    Yields:
        One result a shard, as they are done. A shard whose stream breaks is not published, and the next one is taken
        up. What another run has in hand is put off to the end, and what it has published by then is left to it.
        Closing the generator drops the shards in hand and publishes nothing half.

    Raises:
        StoreError: A shard cannot be written; what was published stays.
    """
    threads = max(1, (decode_threads or num_cores()) // len(encoders))
    waiting = deque(shards)
    num_shards = len(waiting)
    clocks = [StageClock(threads) for _ in encoders]
    counts = [Counts()] * len(encoders)
    lock = threading.Lock()
    share = share or DeviceShare(None, "asked for", threads)
    in_hand = InHand(folder, len(encoders), threads * len(encoders), share.chunk or 1)
    elsewhere: deque[ShardResult] = deque()
    put_off: set[str] = set()

    def pipeline(at: int, encoder: ImageEncoder) -> Generator[ShardResult, None, None]:
        preprocess = encoder.info.preprocess
        alone = LoneDecoder(preprocess, fast=fast_decode, max_pixels=max_pixels)

        def decode(data: bytes, out: UInt8Array, is_suspect: bool) -> tuple[int, int]:
            if is_suspect:
                return alone.decode(data, out)
            return decode_image(data, preprocess, out, fast=fast_decode, max_pixels=max_pixels)

        def laid(stage: Decode, buffers: Sequence[UInt8Array], pool: ThreadPoolExecutor) -> Iterator[Batch]:
            mine = _taken(waiting, put_off, folder, in_hand, elsewhere)
            return lay_batches(mine, stage, share, buffers, pool, in_hand, max_bytes=max_bytes, salvage=salvage)

        def decoder() -> str:
            return "cuda" if share.num_decoded else "fast" if fast_decode else "exact"

        home = Home(folder, dataset, encoder, decoder)
        with (
            contextlib.closing(_embed_on(encoder, laid, decode, home, batch_size, clocks[at])) as batches,
            contextlib.closing(alone),  # first, or the others would wait for it
        ):
            for finished in batches:
                for result in (*finished, *_drained(elsewhere)):
                    in_hand.let_go(result.shard)
                    yield result
                with lock:
                    counts[at] = home.counts()
                    total = Counts(*map(sum, zip(*counts, strict=True)))
                    on_progress(Progress(counts=total, stages=stage_times(clocks)))

    pipelines = [pipeline(at, encoder) for at, encoder in enumerate(encoders)]
    num_published = 0
    try:
        with contextlib.closing(pipelines[0] if len(pipelines) == 1 else merge(pipelines, 1)) as results:
            for result in results:
                num_published += result.record is not None and result.is_ours
                yield result
    finally:
        in_hand.close(finished=num_published == num_shards)


def _taken(
    waiting: deque[Shard], put_off: set[str], folder: Path, in_hand: InHand, elsewhere: deque[ShardResult]
) -> Iterator[Shard]:
    """Whatever is next when a pipeline asks.

    A shard in another run's hands is put off once. If it is still not published by then, it is done here too: nothing
    waits for a run that hangs.
    """
    for shard in _drained(waiting):
        record = published_record(folder, shard)
        if record is not None:
            elsewhere.append(
                ShardResult(shard=shard, record=record, error=None, reject_stages=Counter(), is_ours=False)
            )
        elif in_hand.is_in_other_hands(shard) and shard.name not in put_off:
            put_off.add(shard.name)
            waiting.append(shard)
        else:
            in_hand.take_shard(shard)
            yield shard


def _drained(items: deque[Item]) -> Iterator[Item]:
    """What is there, and what comes meanwhile; other threads may do the same, since taking from a deque is atomic."""
    while True:
        try:
            item = items.popleft()
        except IndexError:
            return
        yield item


def _embed_on(
    encoder: ImageEncoder,
    laid: Callable[[Decode, Sequence[UInt8Array], ThreadPoolExecutor], Iterator[Batch]],
    decode: Decode,
    home: Home,
    batch_size: int,
    clock: StageClock,
) -> Generator[list[ShardResult], None, None]:
    stages = _taking_turns(decode, encoder.begin) if encoder.device == "cpu" else (decode, encoder.begin)
    with ThreadPoolExecutor(clock.decode_threads, thread_name_prefix="decode") as pool:
        # In flight at once: those ahead, one being laid or waiting for the queue, two in the encoder.
        buffers = [encoder.new_batch(batch_size) for _ in range(BATCHES_AHEAD + 3)]
        batches = clock.timed("read", laid(stages[0], buffers, pool))
        begun = _encode(prefetch(batches, BATCHES_AHEAD), stages[1], clock, has_own_device=encoder.device != "cpu")
        encoded = prefetch(begun, 1)
        try:
            yield from home.receive(encoded, clock)
        finally:
            encoded.close()
            pool.shutdown(cancel_futures=True)


def _taking_turns(decode: Decode, begin: Begin) -> tuple[Decode, Begin]:
    """Decoding and encoding that leave each other the cores.

    On a CPU both want all of them. Side by side, every thread of a matrix product waits for the one whose core a
    decoder has taken: a millisecond of decoding then costs one of all cores.
    """
    free = threading.Event()
    free.set()

    def decode_in_turn(data: bytes, out: UInt8Array, is_suspect: bool) -> tuple[int, int]:
        free.wait()
        return decode(data, out, is_suspect)

    def begin_in_turn(images: UInt8Array) -> Callable[[], Encoding]:
        free.clear()
        try:
            return begin(images)
        finally:
            free.set()

    return decode_in_turn, begin_in_turn


def _encode(
    batches: Generator[Batch, None, None], begin: Begin, clock: StageClock, *, has_own_device: bool
) -> Iterator[EncodedBatch]:
    """Send each batch home; a device of its own has the next one by then, and never waits for this thread.

    Such a device prepares for each shape, so batches have few: all of the buffer, a half, a quarter. Nobody reads what
    comes of slots without images.
    """
    ahead = 1 if has_own_device else 0
    begun: deque[Callable[[], EncodedBatch]] = deque()
    with contextlib.closing(decoded(batches, clock)) as ready:
        for batch, outcomes in ready:
            images = batch.images[: _shape(batch) if has_own_device else batch.used]
            begun.append(_begun(batch, images, outcomes, begin, clock))
            if len(begun) > ahead:
                yield begun.popleft()()
    while begun:
        yield begun.popleft()()


def _shape(batch: Batch) -> int:
    """The buffer's size, halved as long as it holds what there is: large images and many rejects end a batch early."""
    size = len(batch.images)
    while size // 2 >= max(batch.used, 1):
        size //= 2
    return size


def _begun(
    batch: Batch, images: UInt8Array, outcomes: list[Outcome], begin: Begin, clock: StageClock
) -> Callable[[], EncodedBatch]:
    has_pixels = any(not isinstance(outcome, Reject) for outcome in outcomes)
    finish = begin(images) if has_pixels else None

    def home() -> EncodedBatch:
        if finish is None:
            return EncodedBatch(batch.events, outcomes, None)
        vectors, seconds = finish()
        clock.seconds["encode"] += seconds
        return EncodedBatch(batch.events, outcomes, vectors)

    return home
