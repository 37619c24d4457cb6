"""How many images to encode at once, by measuring."""

import time

import numpy as np

from clipindex.types import ImageEncoder, UInt8Array

SMALLEST = 32
"""Smaller ones are faster on no device, and on a busy one a measurement may say otherwise."""
LARGEST = 512
"""Five such batches of 224 x 224 pixels are 400 MB."""
WORTHWHILE_GAIN = 1.05
"""A doubled batch doubles memory and the work lost at a stop; it must bring at least this much speed."""
ENOUGH_S = 1.0
"""A call that takes this long has long drowned what a call costs."""


def fastest_batch_size(encoder: ImageEncoder) -> tuple[int, float]:
    """Double the batch as long as that pays.

    A batch that the device's memory does not hold is no faster, since the encoder halves it.

    Returns:
        The batch size, and the images/s it was measured at.

    Raises:
        ClipindexError: Whatever the encoder raises.
    """
    size, rate, seconds = SMALLEST, *_measure(encoder, SMALLEST)
    while size < LARGEST and seconds < ENOUGH_S:
        doubled_rate, seconds = _measure(encoder, 2 * size)
        if doubled_rate < WORTHWHILE_GAIN * rate:
            break
        size, rate = 2 * size, doubled_rate
    return size, rate


def noise(encoder: ImageEncoder, size: int) -> UInt8Array:
    """A batch to measure with, the same each time: a GPU multiplies zeros faster than what images hold."""
    images = encoder.new_batch(size)
    images[:] = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    return images


def _measure(encoder: ImageEncoder, size: int) -> tuple[float, float]:
    """Images/s of the better of two calls after one that warms up, and the seconds it took."""
    images = noise(encoder, size)
    encoder.encode(images)
    seconds = min(_seconds(encoder, images) for _ in range(2))
    return size / seconds, seconds


def _seconds(encoder: ImageEncoder, images: UInt8Array) -> float:
    started = time.perf_counter()
    encoder.encode(images)
    return time.perf_counter() - started
