"""What bounds a stage, measured then and there: matrix products, memory copies, bare libraries."""

import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import simplejpeg
import torch
from torch.utils.flop_counter import FlopCounterMode

from clipindex.decode.on_device import AT_ONCE, decode_jpegs
from clipindex.devices import PRECISIONS
from clipindex.models import LoadedModel
from clipindex.pipeline.feed import DECODE_CHUNK
from clipindex.towers import PackedLinear, can_pack, placed, plain_linear, replace_blocks

REPEATS = 5
LEAST_S = 0.5
"""Of a measurement: shorter ones catch a moment's clock that no job keeps up."""
_PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}  # large enough that the product, and not its call, is measured
_COPY_BYTES = 256 << 20
_READ_BYTES = 1 << 20


def best_rate(run: Callable[[], int], synchronize: Callable[[], None] = lambda: None) -> float:
    """Items/s of the best of some measurements after one that warms up; `run` says how many items it did."""

    def measure(times: int) -> tuple[int, float]:
        synchronize()
        started = time.perf_counter()
        items = sum(run() for _ in range(times))
        synchronize()
        return items, time.perf_counter() - started

    measure(1)
    times = math.ceil(LEAST_S / measure(1)[1])
    return max(items / seconds for items, seconds in (measure(times) for _ in range(REPEATS)))


def spread(function: Callable[[int], object], number: int, num_threads: int) -> int:
    """Call a function with 0, 1, … in threads, as many in a task as decoding has; says how many."""

    def some(first: int) -> None:
        for at in range(first, min(first + DECODE_CHUNK, number)):
            function(at)

    with ThreadPoolExecutor(num_threads) as pool:
        for _ in pool.map(some, range(0, number, DECODE_CHUNK)):
            pass
    return number


def synchronizer(device: torch.device) -> Callable[[], None]:
    """Waits until a device has done what it was given."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def product_flops_per_s(device: torch.device, precision: str) -> float:
    """Floating-point operations/s of a square matrix product in a precision, by the fastest library that is here."""
    size, dtype = _PRODUCT_SIZE[device.type], PRECISIONS[precision]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    products: list[Callable[[], torch.Tensor]] = [lambda: torch.mm(left, right, out=out)]
    if device.type == "cpu" and can_pack(dtype):
        products.append(partial(PackedLinear(right, None), left))

    def multiply(product: Callable[[], torch.Tensor]) -> int:
        product()
        return 2 * size**3

    return max(best_rate(partial(multiply, product), synchronizer(device)) for product in products)


def image_flops(loaded: LoadedModel) -> float:
    """Floating-point operations of the image tower for one image, a multiply-add counted as two.

    Of those that are done: tokens that no embedding needs are not computed in the last block.
    """
    tower = placed(loaded.model.get_submodule("visual"), torch.device("cpu"), torch.float32)
    replace_blocks(tower, plain_linear)  # the counter does not know packed layers
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not know the fused operator
    try:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            tower(torch.zeros(1, 3, *loaded.info.preprocess.size))
        return float(counter.get_total_flops())
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def copied_bytes_per_s(device: torch.device) -> float:
    """From pinned memory to a device, in pieces so large that only the bus counts."""
    pinned = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)

    def copy() -> int:
        there.copy_(pinned, non_blocking=True)
        return _COPY_BYTES

    return best_rate(copy, synchronizer(device))


def read_bytes_per_s(path: str) -> float:
    """Of a file that is in the page cache, by one thread."""
    memory = bytearray(_READ_BYTES)

    def read() -> int:
        total = 0
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(memory):
                total += count
        return total

    return best_rate(read)


def written_bytes_per_s(path: Path, num_bytes: int) -> float:
    """Of a file written and synced to disk, by one thread."""
    block = os.urandom(_READ_BYTES)

    def write() -> int:
        with open(path, "wb", buffering=0) as file:
            for _ in range(-(-num_bytes // _READ_BYTES)):
                file.write(block)
            os.fsync(file.fileno())
        return -(-num_bytes // _READ_BYTES) * _READ_BYTES

    return best_rate(write)


def jpegs_per_s(images: Sequence[bytes], num_threads: int) -> float:
    """Of libjpeg-turbo alone, without the resize."""

    def decode(at: int) -> None:
        simplejpeg.decode_jpeg(images[at], colorspace="RGB")

    return best_rate(lambda: spread(decode, len(images), num_threads))


def device_jpegs_per_s(chunks: Sequence[Sequence[bytes]], device: torch.device) -> float:
    """Of torchvision's decoder on a device alone, a chunk a call and as many calls at once as a job has; no resize.

    Raises:
        RuntimeError: PyTorch's, of a device that cannot decode one of them.
    """

    def decode_chunk(chunk: Sequence[bytes]) -> int:
        return len(decode_jpegs(chunk, device))

    def decode() -> int:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return sum(pool.map(decode_chunk, chunks))

    return best_rate(decode, synchronizer(device))
