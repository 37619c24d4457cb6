"""Whole batches of ordinary JPEGs to pixels on a CUDA device, by nvJPEG as torchvision offers it.

What is known of that decoder, and how it is met (torchvision 0.21 to 0.29):

- It takes a list of files and gives a list of images or an error for all of them; so what raises is tried one by one.
- A process has one, behind a lock, for the device that asked last; making it anew leaks the old one. So one device.
- Baseline JPEGs are for the hardware engine where there is one. It does not wait for what the stream was given before
  (pytorch/vision#9606, meta-pytorch/torchcodec#1634, on an H100), and would write over memory that kernels still read.
  So a call has a stream of its own, whose memory is nobody else's, and that stream is idle before each decoding.
- Of 4:2:0 and 4:2:2 it repeats chroma samples, where libjpeg interpolates (sgl-project/sglang#34163): sharp edges of
  colour differ by tens of levels, a photograph by half a level on average.
- It may say nothing of damage: `baseline` refuses what can be seen of that, `pipeline.device_share` compares samples.

The result goes back to the host, into the batch that the CPU fills as well: 150 KB an image each way, beside 50 KB of
JPEG and half a megabyte of pixels that do not cross the bus.
"""

import contextlib
import logging
import queue
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from clipindex.decode.baseline import Baseline, read_baseline
from clipindex.decode.geometry import LARGE_PIXELS, check_pixels, crop_origin, is_plain, resized_size
from clipindex.errors import SampleError
from clipindex.types import Preprocess, UInt8Array

BATCH_PIXELS = 2 * LARGE_PIXELS
"""Of a call, before the resize: 200 MB on the device. A larger image than `LARGE_PIXELS` is for the CPU."""
AT_ONCE = 2
"""Calls: one decodes while the other resizes."""

log = logging.getLogger(__name__)


class _Place(NamedTuple):
    """What a call works with, and no other at the same time."""

    stream: torch.cuda.Stream | None
    """None on the CPU."""
    pixels: torch.Tensor
    """[1, H, W, 3] on the host, pinned where the device is CUDA; grows with the batches."""


class DeviceDecoder:
    """Decodes and resizes on a device; any number of threads may ask, and `AT_ONCE` are served.

    Args:
        preprocess: As in `jpeg.decode_image`; must be a plain resize and crop, see `supports`.
        device: A CUDA device; on 'cpu' the same steps run on the CPU, by torchvision's libjpeg-turbo.
        max_pixels: As in `jpeg.decode_image`.
    """

    def __init__(self, preprocess: Preprocess, device: torch.device, *, max_pixels: int) -> None:
        self.preprocess = preprocess
        # torchvision makes its decoder anew where a device is called by another name.
        self.device = torch.device("cuda", device.index or 0) if device.type == "cuda" else device
        self.last_error = "no error"
        """What the device said when it last failed."""
        self._max_pixels = max_pixels
        self._places: queue.SimpleQueue[_Place] = queue.SimpleQueue()
        for _ in range(AT_ONCE):
            stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
            self._places.put(_Place(stream, self._host_memory(1)))

    def size_of(self, data: bytes) -> Baseline | None:
        """The size of an image that is for `decode`, as far as its structure tells; None of one for the CPU."""
        size = read_baseline(data)
        if size is None or size.width * size.height > LARGE_PIXELS:
            return None
        try:
            check_pixels(size.width, size.height, self.preprocess, min(self._max_pixels, LARGE_PIXELS))
        except SampleError:  # for the CPU to say so
            return None
        return size

    def decode(
        self, images: Sequence[bytes], sizes: Sequence[Baseline], out: Sequence[UInt8Array]
    ) -> tuple[list[bool], float]:
        """Decode images into place.

        Args:
            images: Encoded.
            sizes: Of each, by `size_of`.
            out: Written, one for each: uint8 RGB [H, W, 3]; not touched where it failed.

        Returns:
            Whether each was decoded (why not is for the CPU to find out), and how long the device was at it: seconds,
            divided by as many as may be at it at once.
        """
        found = [False] * len(images)
        place = self._places.get()
        started = time.perf_counter()
        try:
            for batch in _within_bounds(sizes):
                place = self._decode_batch(batch, images, sizes, place, out, found)
        finally:
            self._places.put(place)
        return found, (time.perf_counter() - started) / AT_ONCE

    def _decode_batch(
        self,
        batch: Sequence[int],
        images: Sequence[bytes],
        sizes: Sequence[Baseline],
        place: _Place,
        out: Sequence[UInt8Array],
        found: list[bool],
    ) -> _Place:
        try:
            if len(batch) > len(place.pixels):
                place = place._replace(pixels=self._host_memory(len(batch)))
            pixels = self._pixels([images[at] for at in batch], [sizes[at] for at in batch], place)
        except Exception as error:  # nvJPEG's, CUDA's out of memory: whatever it is, one image may be the cause
            self.last_error = str(error).partition("\n")[0] or type(error).__name__
            log.debug("%d images on %s: %s", len(batch), self.device, self.last_error)
            if len(batch) > 1:
                for at in batch:
                    place = self._decode_batch([at], images, sizes, place, out, found)
            return place
        for at, decoded in zip(batch, pixels, strict=True):
            out[at][:] = decoded
            found[at] = True
        return place

    def _pixels(self, images: Sequence[bytes], sizes: Sequence[Baseline], place: _Place) -> UInt8Array:
        """Pixels [N, H, W, 3] in the place's memory.

        Raises:
            RuntimeError: One of the images, or the device, gave cause.
        """
        stream = contextlib.nullcontext() if place.stream is None else torch.cuda.stream(place.stream)
        with torch.inference_mode(), stream:
            _blank(sizes, self.device)
            if place.stream is not None:
                place.stream.synchronize()
            decoded = decode_jpegs(images, self.device)
            for pixels, size in zip(decoded, sizes, strict=True):
                if pixels.shape != (3, size.height, size.width):
                    raise RuntimeError(f"{list(pixels.shape)} pixels of an image of {size.width} x {size.height}")
            resized = torch.stack([resize_on_device(pixels, self.preprocess) for pixels in decoded])
            host = place.pixels[: len(images)]
            host.copy_(resized.permute(0, 2, 3, 1))  # which waits until all of the above is done
        return np.asarray(host.numpy())

    def _host_memory(self, number: int) -> torch.Tensor:
        shape = (number, *self.preprocess.size, 3)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")


def supports(preprocess: Preprocess) -> bool:
    """Whether a model's transform is one that `DeviceDecoder` knows."""
    return is_plain(preprocess)


def resize_on_device(pixels: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """Resize and centre-crop uint8 [3, h, w] to uint8 [3, H, W] as Pillow does: across, then down, each rounded.

    The kernel for bytes is the CPU's alone. In floats both directions at once would be one step, but what a bicubic
    filter overshoots beyond black and white has to be cut off between them, or edges differ by several levels.
    """
    height, width = resized_size((pixels.shape[1], pixels.shape[2]), preprocess)
    image = pixels[None].to(torch.float32)
    for size in ((pixels.shape[1], width), (height, width)):
        if image.shape[2:] != size:
            image = torch.nn.functional.interpolate(image, size=size, mode=preprocess.interpolation, antialias=True)
            image = image.add_(0.5).clamp_(0, 255.5).floor_()
    top, left = crop_origin((height, width), preprocess)
    return image[0, :, top : top + preprocess.size[0], left : left + preprocess.size[1]].to(torch.uint8)


def decode_jpegs(images: Sequence[bytes], device: torch.device) -> list[torch.Tensor]:
    """Images [3, h, w] on a device.

    The operators themselves, which let go of the GIL: `torchvision.io.decode_jpeg` around them warns at every call of
    torchvision 0.29 that it will go one day, and catching warnings is not for threads.
    """
    import torchvision.io  # here, since it takes seconds, and few runs have such a device

    mode = torchvision.io.ImageReadMode.RGB.value
    encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in images]  # bytes cannot be written to
    if device.type == "cuda":
        return list(torch.ops.image.decode_jpegs_cuda(encoded, mode, device))
    return [torch.ops.image.decode_jpeg(one, mode, False) for one in encoded]


def _blank(sizes: Sequence[Baseline], device: torch.device) -> None:
    """Grey out the memory that the decoder is about to get.

    What it leaves unwritten of a damaged image would otherwise show another one. The allocator has the blocks of one
    stream for that stream, and gives those that fit best.
    """
    blanks = [torch.full((3, size.height, size.width), 128, dtype=torch.uint8, device=device) for size in sizes]
    del blanks


def _within_bounds(sizes: Sequence[Baseline]) -> list[list[int]]:
    """Images in batches of at most `BATCH_PIXELS`."""
    batches: list[list[int]] = []
    room = 0
    for at, size in enumerate(sizes):
        pixels = size.width * size.height
        if pixels > room:
            batches.append([])
            room = BATCH_PIXELS
        batches[-1].append(at)
        room -= pixels
    return batches
