"""Which part of the decoding a CUDA device does: none, or every image that is ordinary enough; decided once a run."""

import io
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from clipindex.decode import MAX_PIXELS, decode_image
from clipindex.decode.baseline import Baseline
from clipindex.decode.on_device import AT_ONCE, DeviceDecoder, is_blank, supports
from clipindex.errors import SampleError, UsageError
from clipindex.types import Preprocess, UInt8Array

DECODE = ("auto", "cpu", "cuda")
CHUNK = 32
"""Images a task, and a call of the device's: several for each of its engines. If one kills the process, all of them are
suspects, to be decoded one by one in processes of their own."""
TRIAL_IMAGES = 8
"""Fewer say little of a rate."""
TRIAL_CALLS = 6
EXACT_DEVIATION = 2
"""Of 255, at any pixel: what is promised of the CPU's ways, and so what 'auto' asks of a device."""
FAST_DEVIATION = 1.0
"""Of 255, on average over the images of the trial: what 'auto' asks where decoding is to be fast."""
MOST_DEVIATION = 12.0
"""Of 255, on average over an image, of a device that was asked for. A decoder that repeats chroma samples instead of
interpolating is 1 away for photographs and 6 for a vivid one of 8 x 8 pixels (libjpeg-turbo, told to do so); pixels of
another image are about 60 away."""
MOST_FAULTS = 3
"""Chunks with one, after which the device is given up."""

log = logging.getLogger(__name__)

Size = tuple[int, int]


class DeviceShare:
    """What of a run is decoded on a device. Its methods may be called by any thread.

    Args:
        decoder: Of the device; None where the CPU does all.
        reason: Why the CPU does all, or that the device was asked for; None to find out by measuring.
        decode_threads: Of the CPU's, whose rate is compared.
        fast: Whether the CPU decodes at a fraction of the size, and pixels may differ as much as that makes them.
    """

    def __init__(
        self, decoder: DeviceDecoder | None, reason: str | None, decode_threads: int, *, fast: bool = False
    ) -> None:
        self._decoder = decoder
        self._fast = fast
        self._is_exact = reason is None and not fast
        self._decode_threads = decode_threads
        self._turns = itertools.count()
        self._lock = threading.Lock()
        self._faults = 0
        self._is_on: bool | None = None if reason is None else decoder is not None
        self.reason = reason or "too few ordinary JPEGs to measure"
        """Why it is as it is, for a person."""
        self.num_decoded = 0
        """Images that the device has decoded."""

    @property
    def way(self) -> str:
        """'cuda' where the device takes part, 'cpu' where not, or not yet."""
        return "cuda" if self._is_on else "cpu"

    @property
    def chunk(self) -> int | None:
        """Images to decode in one task; None where that is all the same to the device."""
        return None if self._is_on is False else CHUNK

    def decode(
        self, images: Sequence[bytes], hold: Callable[[Sequence[int]], Sequence[bool]], out: UInt8Array
    ) -> tuple[list[Size | None], float]:
        """Decode on the device what is for the device.

        Args:
            images: Encoded.
            hold: Called with the numbers of those that the device is about to get; says which are suspects.
            out: Pixels [N, H, W, 3]; written where there is a size.

        Returns:
            For each image its source's width and height, or None where the CPU has to decode it; and the seconds that
            the device took.
        """
        found: list[Size | None] = [None] * len(images)
        if self._decoder is None or self._is_on is False:
            return found, 0.0
        sizes = {at: size for at, data in enumerate(images) if (size := self._decoder.size_of(data)) is not None}
        if not sizes:
            return found, 0.0
        mine = [at for at, is_suspect in zip(sizes, hold(list(sizes)), strict=True) if not is_suspect]
        part = [images[at] for at in mine], [sizes[at] for at in mine]
        if not mine or not self._is_chosen(self._decoder, *part):
            return found, 0.0
        pixels = [out[at] for at in mine]
        decoded, seconds = self._decoder.decode(*part, pixels)
        if self._is_right(self._decoder, part[0], decoded, pixels):
            for at, is_decoded in zip(mine, decoded, strict=True):
                found[at] = tuple(sizes[at]) if is_decoded else None  # type: ignore[assignment]
        return found, seconds

    def _is_chosen(self, decoder: DeviceDecoder, images: Sequence[bytes], sizes: Sequence[Baseline]) -> bool:
        """Whether the device is used; the first chunk that is large enough decides, and others wait for it."""
        if self._is_on is None:
            with self._lock:
                if self._is_on is None and len(images) >= TRIAL_IMAGES:
                    self._is_on, self.reason = _try_out(decoder, images, sizes, self._decode_threads, self._fast)
                    log.info("decoding on %s: %s", decoder.device if self._is_on else "the CPU", self.reason)
        return self._is_on is True

    def _is_right(
        self,
        decoder: DeviceDecoder,
        images: Sequence[bytes],
        decoded: Sequence[bool],
        pixels: Sequence[UInt8Array],
    ) -> bool:
        """Whether a chunk can be kept, by one image of it that the CPU decodes as well."""
        done = [at for at, is_decoded in enumerate(decoded) if is_decoded]
        fault = None
        if done:
            at = done[next(self._turns) % len(done)]
            fault = _difference(images[at], pixels[at], decoder.preprocess, self._is_exact)
        elif len(images) >= TRIAL_IMAGES and not _is_grey(images[0], decoder.preprocess):
            fault = f"none of {len(images)} images could be decoded ({decoder.last_error})"
        with self._lock:
            if fault is None:
                self.num_decoded += len(done)
                return True
            self._faults += 1
            log.warning("on %s %s: the CPU decodes these %d images", decoder.device, fault, len(images))
            if self._faults == MOST_FAULTS:
                self._is_on, self.reason = False, f"given up after {MOST_FAULTS} faults; the last: {fault}"
                log.warning("decoding on the CPU from here on: %s", self.reason)
        return False


def obstacle(devices: Sequence[torch.device]) -> str | None:
    """Why nothing can be decoded on these devices, whatever the model; None if nothing is known against it."""
    if devices[0].type != "cuda":
        return "no CUDA device"
    if len(devices) > 1:
        return "torchvision has one decoder for all devices of a process; give one --device"
    return None


def share_decoding(
    decode: str,
    devices: Sequence[torch.device],
    preprocess: Preprocess,
    *,
    fast: bool,
    max_pixels: int = MAX_PIXELS,
    decode_threads: int,
) -> DeviceShare:
    """What a run's device decodes.

    Args:
        decode: 'cpu': nothing. 'cuda': what it can. 'auto': that, if it is faster and its pixels are within 2/255 of
            the CPU's on the first images of the run; with `fast`, within 1/255 of them on average.
        devices: That encode.
        preprocess: The model's.
        fast: Whether the CPU decodes at a fraction of the size.
        max_pixels: As in `decode.decode_image`.
        decode_threads: Of the CPU's.

    Raises:
        UsageError: 'cuda', and that cannot be.
    """
    if decode == "cpu":
        return DeviceShare(None, "asked for", decode_threads)
    why = obstacle(devices)
    decoder: DeviceDecoder | None = None
    if why is None and not supports(preprocess):
        why = "this model's transform is more than a resize and a crop"
    if why is None:
        decoder = DeviceDecoder(preprocess, devices[0], max_pixels=max_pixels)
        why = _silence(decoder)
    if why is not None:
        if decode == "cuda":
            raise UsageError(f"--decode cuda: {why}; give --decode auto or cpu")
        return DeviceShare(None, why, decode_threads)
    return DeviceShare(decoder, "asked for" if decode == "cuda" else None, decode_threads, fast=fast)


def _silence(decoder: DeviceDecoder) -> str | None:
    """Why a device does not decode what any decoder can: no nvJPEG, no driver for it; None if it does."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(buffer, "JPEG", quality=90)
    data = buffer.getvalue()
    size = decoder.size_of(data)
    pixels = np.zeros((*decoder.preprocess.size, 3), np.uint8)
    if size is None:
        return "--max-pixels is below 256 x 256"
    if not decoder.decode([data], [size], [pixels])[0][0]:
        return f"torchvision cannot decode JPEGs on {decoder.device} ({decoder.last_error})"
    return _difference(data, pixels, decoder.preprocess, False)


def _difference(data: bytes, pixels: UInt8Array, preprocess: Preprocess, is_exact: bool) -> str | None:
    """How a device's pixels of an image differ from the CPU's by more than they may; None if they do not."""
    expected = np.empty_like(pixels)
    try:
        decode_image(data, preprocess, expected)
    except SampleError as error:
        return f"an image was decoded of which the CPU says: {error}"
    return _deviation(expected, pixels, None if is_exact else MOST_DEVIATION)


def _deviation(expected: UInt8Array, pixels: UInt8Array, most: float | None) -> str | None:
    """What to say where the mean deviation is above `most`, or, with None, a pixel not as exact as is promised."""
    deviation = np.abs(pixels.astype(np.int16) - expected)
    worst, mean = int(deviation.max()), float(deviation.mean())
    if worst > EXACT_DEVIATION if most is None else mean > most:
        return f"pixels are up to {worst}/255 from the CPU's, {mean:.2f} on average"
    return None


def _try_out(
    decoder: DeviceDecoder, images: Sequence[bytes], sizes: Sequence[Baseline], decode_threads: int, fast: bool
) -> tuple[bool, str]:
    """Whether a device is right and faster, and the rates, by decoding some images both ways.

    The CPU's rate is that of this thread's computing times the threads: as if they did not hinder each other.
    """
    preprocess = decoder.preprocess
    pixels = np.zeros((len(images), *preprocess.size, 3), np.uint8)
    decoded, _ = decoder.decode(images, sizes, list(pixels))  # which warms up as well
    try:
        started = time.thread_time()
        expected = _decode_here(images, preprocess, fast=fast)
        cpu = decode_threads * len(images) / max(time.thread_time() - started, 1e-9)
        if fast:
            expected = _decode_here(images, preprocess, fast=False)
    except SampleError as error:
        return False, f"of the first images there is one of which the CPU says: {error}"
    missing = sum(not is_decoded and not is_blank(one) for is_decoded, one in zip(decoded, expected, strict=True))
    if missing:
        failed = f"{missing} of {len(images)} ordinary JPEGs"
        return False, f"{decoder.device} could not decode {failed} ({decoder.last_error})"
    if not any(decoded):
        return False, f"the first {len(images)} images are all grey, as {decoder.device} leaves what it skips"
    fault = _deviation(expected[decoded], pixels[decoded], FAST_DEVIATION if fast else None)
    if fault is not None:
        return False, f"on {decoder.device} {fault}; --decode cuda takes them as they are"
    started = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for call in [pool.submit(decoder.decode, images, sizes, list(pixels)) for _ in range(TRIAL_CALLS)]:
            call.result()
    device = TRIAL_CALLS * len(images) / max(time.perf_counter() - started, 1e-9)
    rates = f"{device:,.0f} images/s on {decoder.device}, {cpu:,.0f} on {decode_threads} CPU threads"
    return device > cpu, f"{rates}, measured on the first {len(images)}"


def _is_grey(image: bytes, preprocess: Preprocess) -> bool:
    """Whether an image is what a decoder that skipped it would have left."""
    try:
        return is_blank(_decode_here([image], preprocess, fast=False)[0])
    except SampleError:
        return False


def _decode_here(images: Sequence[bytes], preprocess: Preprocess, *, fast: bool) -> UInt8Array:
    pixels = np.empty((len(images), *preprocess.size, 3), np.uint8)
    for data, one in zip(images, pixels, strict=True):
        decode_image(data, preprocess, one, fast=fast)
    return pixels
