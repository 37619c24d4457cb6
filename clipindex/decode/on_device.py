"""Whole batches of ordinary JPEGs to pixels on a CUDA device, by nvJPEG as torchvision offers it.

What is known of that decoder, and how it is met (torchvision 0.21 to 0.29):

- It takes a list of files and gives a list of images or an error for all of them; so what raises is tried one by one.
- A process has one, behind a lock, for the device that asked last; making it anew leaks the old one. So one device.
- It polls for its engine, a core's work while it decodes. What is waited for here is waited for asleep.
- Baseline JPEGs are for the hardware engine where there is one. It does not wait for what the stream was given before
  (pytorch/vision#9606, meta-pytorch/torchcodec#1634, on an H100), and would write over memory that kernels still read.
  So a call has a stream of its own, whose memory is nobody else's, and that stream is idle before each decoding.
- Of 4:2:0 and 4:2:2 it repeats chroma samples, where libjpeg interpolates (sgl-project/sglang#34163): sharp edges of
  colour differ by tens of levels, a photograph by half a level on average.
- It may say nothing of damage: `baseline` refuses what can be seen of that, `pipeline.device_share` compares samples.
  Memory is grey before an image is written to it, and what comes back all grey was not decoded.
- A call of PyTorch's takes microseconds under Python's lock; so images of one size are resized together.

The result goes back to the host, into the batch that the CPU fills as well: 150 KB an image each way, beside 50 KB of
JPEG and half a megabyte of pixels that do not cross the bus.
"""

import contextlib
import logging
import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from clipindex.decode.baseline import Baseline, read_baseline
from clipindex.decode.geometry import LARGE_PIXELS, check_pixels, crop_origin, is_plain, resized_size
from clipindex.errors import SampleError, first_line
from clipindex.types import Preprocess, UInt8Array

BATCH_PIXELS = 2 * LARGE_PIXELS
"""Of a call, before the resize: 200 MB on the device. A larger image than `LARGE_PIXELS` is for the CPU."""
AT_ONCE = 2
"""Calls: one decodes while the other resizes."""
GROUP_PIXELS = 8 << 20
"""Of images of one size that are resized together: 100 MB as float32. A larger one is resized alone."""
ALIKE = 2
"""The first images of a batch that failed, if alone they fail just as it did: then it is the device's fault, and the
rest is left to the CPU. A batch fails of one image, hardly of two; a decoder that cannot be opened leaks each time."""
BLANK = 128
"""What memory is filled with before the decoder gets it."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Place:
    """What a call works with, and no other at the same time."""

    stream: torch.cuda.Stream | None
    """None on the CPU."""
    pixels: torch.Tensor
    """[N, H, W, 3] on the host, pinned where the device is CUDA; grows with the batches."""


class DeviceDecoder:
    """Decodes and resizes on a device; any number of threads may ask, and `AT_ONCE` are served.

    Args:
        preprocess: As in `jpeg.decode_image`; must be a plain resize and crop, see `supports`.
        device: A CUDA device; on 'cpu' the same steps run on the CPU, by torchvision's libjpeg-turbo.
        max_pixels: As in `jpeg.decode_image`.
    """

    def __init__(self, preprocess: Preprocess, device: torch.device, *, max_pixels: int) -> None:
        self.preprocess = preprocess
        self.device = device
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
                parts = [images[at] for at in batch], [sizes[at] for at in batch], [out[at] for at in batch]
                for at, is_decoded in zip(batch, self._decode_batch(*parts, place), strict=True):
                    found[at] = is_decoded
        finally:
            self._places.put(place)
        return found, (time.perf_counter() - started) / AT_ONCE

    def _decode_batch(
        self, images: Sequence[bytes], sizes: Sequence[Baseline], out: Sequence[UInt8Array], place: _Place
    ) -> list[bool]:
        """Whether each was decoded: together, or one by one where that fails, since one image may be the cause."""
        found, fault = self._attempt(images, sizes, out, place)
        alone: list[str | None] = []
        while fault is not None and len(alone) < len(images) > 1 and alone != [fault] * ALIKE:
            one = slice(len(alone), len(alone) + 1)
            found[one], why = self._attempt(images[one], sizes[one], out[one], place)
            alone.append(why)
        return found

    def _attempt(
        self, images: Sequence[bytes], sizes: Sequence[Baseline], out: Sequence[UInt8Array], place: _Place
    ) -> tuple[list[bool], str | None]:
        """Whether each was decoded, and why none was."""
        try:
            if len(images) > len(place.pixels):
                place.pixels = self._host_memory(len(images))
            pixels = self._pixels(images, sizes, place)
        except Exception as error:  # nvJPEG's, CUDA's out of memory: whatever it is, one image may be the cause
            self.last_error = first_line(error)
            log.debug("%d images on %s: %s", len(images), self.device, self.last_error)
            return [False] * len(images), self.last_error
        found = [not is_blank(decoded) for decoded in pixels]
        for is_decoded, decoded, target in zip(found, pixels, out, strict=True):
            if is_decoded:
                target[:] = decoded
            else:
                self.last_error = "an image was left blank"
        return found, None

    def _pixels(self, images: Sequence[bytes], sizes: Sequence[Baseline], place: _Place) -> UInt8Array:
        """Pixels [N, H, W, 3] in the place's memory.

        Raises:
            RuntimeError: One of the images, or the device, gave cause.
        """
        stream = contextlib.nullcontext() if place.stream is None else torch.cuda.stream(place.stream)
        with torch.inference_mode(), stream:
            _blank(sizes, self.device)
            _wait(place.stream)
            decoded = decode_jpegs(images, self.device)
            for pixels, size in zip(decoded, sizes, strict=True):
                if pixels.shape != (3, size.height, size.width):
                    raise RuntimeError(f"{list(pixels.shape)} pixels of an image of {size.width} x {size.height}")
            groups = [[decoded[at] for at in group] for group in _groups(sizes)]
            resized = torch.cat([resize_on_device(group, self.preprocess) for group in groups])
            host = place.pixels[: len(images)]
            host.copy_(resized.permute(0, 2, 3, 1), non_blocking=True)
            _wait(place.stream)
        return np.asarray(host.numpy())

    def _host_memory(self, number: int) -> torch.Tensor:
        shape = (number, *self.preprocess.size, 3)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")


def supports(preprocess: Preprocess) -> bool:
    """Whether a model's transform is one that `DeviceDecoder` knows."""
    return is_plain(preprocess)


def is_blank(pixels: UInt8Array) -> bool:
    """Whether an image is what `_blank` left; a picture of that grey is for the CPU as well."""
    return bool(pixels[0, 0, 0] == BLANK and (pixels == BLANK).all())


def resize_on_device(images: Sequence[torch.Tensor], preprocess: Preprocess) -> torch.Tensor:
    """Resize and centre-crop uint8 [3, h, w] to uint8 [N, 3, H, W] as Pillow does: across, then down, each rounded.

    The kernel for bytes is the CPU's alone. In floats both directions at once would be one step, but what a bicubic
    filter overshoots beyond black and white has to be cut off between them, or edges differ by several levels.
    """
    pixels = (torch.stack(list(images)) if len(images) > 1 else images[0][None]).to(torch.float32)
    height, width = resized_size((pixels.shape[2], pixels.shape[3]), preprocess)
    for size in ((pixels.shape[2], width), (height, width)):
        if pixels.shape[2:] != size:
            pixels = torch.nn.functional.interpolate(pixels, size=size, mode=preprocess.interpolation, antialias=True)
            pixels = pixels.add_(0.5).clamp_(0, 255.5).floor_()
    top, left = crop_origin((height, width), preprocess)
    return pixels[:, :, top : top + preprocess.size[0], left : left + preprocess.size[1]].to(torch.uint8)


def decode_jpegs(images: Sequence[bytes], device: torch.device) -> list[torch.Tensor]:
    """Images [3, h, w] on a device.

    The operators themselves, which let go of the GIL: `torchvision.io.decode_jpeg` around them warns at every call of
    torchvision 0.29 that it will go one day, and catching warnings is not for threads.
    """
    import torchvision.io  # here, since it takes seconds, and few runs have such a device

    mode = torchvision.io.ImageReadMode.RGB.value
    together = torch.frombuffer(bytearray().join(images), dtype=torch.uint8)  # frombuffer warns of read-only memory
    encoded = list(together.split_with_sizes([len(data) for data in images]))
    if device.type == "cuda":
        # torchvision makes its decoder anew where a device is called by another name.
        named = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        return list(torch.ops.image.decode_jpegs_cuda(encoded, mode, named))
    return [torch.ops.image.decode_jpeg(one, mode, False) for one in encoded]


def _blank(sizes: Sequence[Baseline], device: torch.device) -> None:
    """Grey out the memory that the decoder is about to get.

    What it leaves unwritten of a damaged image would otherwise show another one. The allocator has the blocks of one
    stream for that stream, and gives those that fit best: the same ones for the same sizes in the same order, unless
    it had to get more. One tensor for several images would be elsewhere: above 1 MiB, blocks are of another kind.
    """
    blanks = [torch.full((3, size.height, size.width), BLANK, dtype=torch.uint8, device=device) for size in sizes]
    del blanks


def _wait(stream: torch.cuda.Stream | None) -> None:
    """Until a stream has done what it was given, asleep: `Stream.synchronize` and a copy that blocks take a core."""
    if stream is not None:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        event.synchronize()


def _groups(sizes: Sequence[Baseline]) -> list[list[int]]:
    """Neighbours of one size, at most `GROUP_PIXELS` of them."""
    groups: list[list[int]] = []
    for at, size in enumerate(sizes):
        last = groups[-1] if groups else []
        if not last or sizes[last[0]] != size or (len(last) + 1) * size.width * size.height > GROUP_PIXELS:
            groups.append([])
        groups[-1].append(at)
    return groups


def _within_bounds(sizes: Sequence[Baseline]) -> list[list[int]]:
    """Images in batches of at most `BATCH_PIXELS`, those of one size beside each other."""
    batches: list[list[int]] = []
    room = 0
    for at in sorted(range(len(sizes)), key=sizes.__getitem__):
        pixels = sizes[at].width * sizes[at].height
        if pixels > room:
            batches.append([])
            room = BATCH_PIXELS
        batches[-1].append(at)
        room -= pixels
    return batches
