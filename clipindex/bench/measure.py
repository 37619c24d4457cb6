"""Each stage by itself, and all together, each beside its ceiling."""

import itertools
import math
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from clipindex.batch_size import noise
from clipindex.bench import ceilings
from clipindex.bench.ceilings import best_rate, spread, synchronizer
from clipindex.bench.corpus import repeated
from clipindex.bench.utilisation import describe_utilisation, sampling_utilisation
from clipindex.decode import MAX_PIXELS, decode_image
from clipindex.decode.on_device import AT_ONCE, DeviceDecoder, decode_jpegs
from clipindex.embed_job import EmbedSummary, embed
from clipindex.encode import ImageTower
from clipindex.errors import UsageError, first_line
from clipindex.pipeline.device_share import CHUNK
from clipindex.shards import list_shards, read_samples
from clipindex.store import ShardWriter, open_dataset
from clipindex.types import ModelInfo, ModelSpec, Preprocess, Sample, Shard, Vectors
from clipindex.version import CREATED_BY

WRITE_ROWS = 32_768
WRITE_BATCH = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One row of the table."""

    stage: str
    setting: str
    """What was measured: model, precision, sizes, threads."""
    images_per_s: float
    ceiling_per_s: float
    """Images/s that cannot be exceeded."""
    ceiling: str
    """What that ceiling is."""
    note: str = ""

    @property
    def of_ceiling(self) -> float:
        """Measured over ceiling; 1 is as good as can be."""
        return self.images_per_s / self.ceiling_per_s


def measure_read(tar: str, setting: str) -> Measurement:
    """Samples/s of one thread."""
    (shard,) = list_shards([tar])
    images = sum(1 for _ in read_samples(shard))
    return Measurement(
        stage="read",
        setting=f"tar of {setting}, 1 thread",
        images_per_s=best_rate(lambda: sum(1 for _ in read_samples(shard))),
        ceiling_per_s=ceilings.read_bytes_per_s(tar) * images / shard.size,
        ceiling="reading the bytes, no more",
    )


def measure_decode(tars: Sequence[str], setting: str, preprocess: Preprocess, num_threads: int) -> Measurement:
    """Images/s from encoded bytes in memory to pixels."""
    samples = [s for shard in list_shards(tars) for s in read_samples(shard) if isinstance(s, Sample)]
    images = [sample.image for sample in samples]
    pixels = np.empty((len(images), *preprocess.size, 3), np.uint8)

    def decode(at: int) -> None:
        decode_image(images[at], preprocess, pixels[at])

    threads = f"{num_threads} thread{'s' if num_threads > 1 else ''}"
    return Measurement(
        stage="decode",
        setting=f"{setting} to {preprocess.size[1]}x{preprocess.size[0]}, {threads}",
        images_per_s=best_rate(lambda: spread(decode, len(images), num_threads)),
        ceiling_per_s=ceilings.jpegs_per_s(images, num_threads),
        ceiling="libjpeg-turbo without the resize",
    )


def measure_device_decode(
    tars: Sequence[str], setting: str, preprocess: Preprocess, device: torch.device, chunk: int = CHUNK
) -> Measurement:
    """Images/s of a device, from encoded bytes in memory to pixels back on the host; of those that are for it.

    Raises:
        UsageError: None are.
        RuntimeError: The device cannot decode.
    """
    decoder = DeviceDecoder(preprocess, device, max_pixels=MAX_PIXELS)
    samples = [s for shard in list_shards(tars) for s in read_samples(shard) if isinstance(s, Sample)]
    mine = [(s.image, size) for s in samples if (size := decoder.size_of(s.image)) is not None]
    if not mine:
        raise UsageError(f"none of {len(samples)} images of {setting} are for {device}")
    _check_decodes(device, mine[0][0])
    chunks = [mine[at : at + chunk] for at in range(0, len(mine), chunk)]
    pixels = np.empty((len(mine), *preprocess.size, 3), np.uint8)
    fewest = [len(part) for part in chunks]

    def decode_chunk(at: int) -> int:
        images, sizes = zip(*chunks[at], strict=True)
        decoded = sum(decoder.decode(images, sizes, list(pixels[at * chunk :][: len(images)]))[0])
        fewest[at] = min(fewest[at], decoded)
        return decoded

    def decode() -> int:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return sum(pool.map(decode_chunk, range(len(chunks))))

    rate = best_rate(decode)
    # Without those of which an image failed, at which the bare decoder raises.
    whole = [[image for image, _ in part] for part, decoded in zip(chunks, fewest, strict=True) if decoded == len(part)]
    if not whole:
        raise RuntimeError(f"{device} decoded no {chunk} images without leaving one out: {decoder.last_error}")
    failed = f", which decoded {sum(fewest)} of them: {decoder.last_error}" if sum(fewest) < len(mine) else ""
    return Measurement(
        stage="decode",
        setting=f"{setting} to {preprocess.size[1]}x{preprocess.size[0]}, {device}, {chunk} a call",
        images_per_s=rate,
        ceiling_per_s=ceilings.device_jpegs_per_s(whole, device),
        ceiling=f"torchvision's decoder on the device, {AT_ONCE} calls at once, without the resize",
        note=f"{len(mine)} of {len(samples)} images are for the device{failed}",
    )


def _check_decodes(device: torch.device, image: bytes) -> None:
    """Where nothing can be decoded, this is one call that fails, and the measurement thousands.

    Raises:
        RuntimeError: The device cannot.
    """
    try:
        decode_jpegs([image], device)
        synchronizer(device)()
    except Exception as error:  # nvJPEG's, the driver's, or of torchvision that was built without
        raise RuntimeError(f"{device} cannot decode JPEGs: {first_line(error)}") from error


def measure_copy(tower: ImageTower, batch_size: int, device: torch.device) -> Measurement:
    """Images/s from pinned memory to a CUDA device, a batch at a time."""
    batch = torch.from_numpy(tower.new_batch(batch_size))

    def copy() -> int:
        batch.to(device, non_blocking=True)
        return batch_size

    return Measurement(
        stage="copy",
        setting=f"batch of {batch_size} to {device}",
        images_per_s=best_rate(copy, synchronizer(device)),
        ceiling_per_s=ceilings.copied_bytes_per_s(device) * batch_size / batch.nbytes,
        ceiling="the bus, in pieces of 256 MiB",
    )


def measure_encode(
    tower: ImageTower, name: str, batch_size: int, flops: float, product_flops_per_s: float
) -> Measurement:
    """Images/s of the image tower; its ratio to the ceiling is the model's FLOP utilisation (MFU)."""
    batch = noise(tower, batch_size)
    begun = [tower.begin(batch)]

    def encode() -> int:
        begun.append(tower.begin(batch))  # as the job does: the device has its next batch before this one is home
        begun.pop(0)()
        return batch_size

    return Measurement(
        stage="encode",
        setting=f"{name}, {tower.precision} on {tower.device}, batch of {batch_size}",
        images_per_s=best_rate(encode),
        ceiling_per_s=product_flops_per_s / flops,
        ceiling=f"{product_flops_per_s / 1e12:,.2f} TFLOP/s product, {flops / 1e9:,.3g} GFLOP an image",
    )


def measure_write(folder: Path, info: ModelInfo) -> Measurement:
    """Rows/s of one thread, from float32 embeddings to a synced Parquet file."""
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(WRITE_BATCH, info.dim)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    samples = [
        Sample(key=f"{at:08}", member=f"{at:08}.jpg", image=b"", tar_offset=0, label=at) for at in range(WRITE_BATCH)
    ]
    dataset = open_dataset(folder, info, "float16", CREATED_BY)
    versions = itertools.count()

    def write() -> int:
        # Of a tar that is new each time; what is published already is not written again.
        shard = Shard(url=str(folder / "0.tar"), name="0", size=0, version=str(next(versions)))
        writer = ShardWriter(folder, shard, dataset)
        for _ in range(WRITE_ROWS // WRITE_BATCH):
            writer.append(samples, Vectors(embeddings, np.ones(WRITE_BATCH, np.float32)), [(1, 1)] * WRITE_BATCH)
        writer.publish(samples=WRITE_ROWS, precision="fp32", decoder="exact", device="cpu", seconds=0.0)
        return WRITE_ROWS

    rate = best_rate(write)
    size = (folder / "embeddings" / "0.parquet").stat().st_size
    return Measurement(
        stage="write",
        setting=f"Parquet, {info.dim}-d float16, 1 thread",
        images_per_s=rate,
        ceiling_per_s=ceilings.written_bytes_per_s(folder / "bare", size) * WRITE_ROWS / size,
        ceiling="writing and syncing the bytes",
    )


def measure_end_to_end(
    tars: Sequence[str],
    folder: Path,
    spec: ModelSpec,
    precision: str,
    device: torch.device,
    batch_size: int,
    decode_per_s: dict[str, float],
    encode_per_s: float,
    *,
    num_images: int,
    seconds: float,
    decode: str = "auto",
) -> Measurement:
    """Images/s of the whole job, loading the model apart: the better of two runs, as a stage is the best of some.

    `decode_per_s` has the rates of 'cpu' and, where there is one, 'cuda'. The job goes over the `num_images` of `tars`
    as often as `seconds` need at these rates, and decodes where `decode` says; see `embed_job.embed`. What "again" and
    "out" in `folder` hold is removed, before and after.
    """
    passes = max(1, math.ceil(seconds * min(max(decode_per_s.values()), encode_per_s) / num_images))
    again, out = folder / "again", folder / "out"
    for left in (again, out):  # of a benchmark that was stopped in a folder that is kept
        shutil.rmtree(left, ignore_errors=True)
    sources = repeated(tars, again, passes)
    runs: list[tuple[EmbedSummary, list[int]]] = []
    for at in range(2):
        with sampling_utilisation(device) as samples:
            summary = embed(
                sources,
                out / str(at),
                model=spec.name,
                random_init=spec.random_init,
                precision=precision,
                device=str(device),
                batch_size=batch_size,
                decode=decode,
                on_plan=lambda plan, samples=samples: samples.clear(),  # type: ignore[misc]
            )
        runs.append((summary, samples))
    shutil.rmtree(again)
    shutil.rmtree(out)
    summary, samples = max(runs, key=lambda one: one[0].images_per_s)
    busy = ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in summary.stages.busy.items())
    gpu = f"; {describe_utilisation(samples)}" if device.type == "cuda" else ""
    return Measurement(
        stage="end to end",
        setting=f"{spec.name}, {precision} on {summary.device}, batch of {batch_size}",
        images_per_s=summary.images_per_s,
        ceiling_per_s=min(decode_per_s.get(summary.decode, encode_per_s), encode_per_s),
        ceiling="the slower of decode and encode",
        note=f"{summary.rows:,} rows, each image {passes} times; bound by {summary.stages.bound_by}; at work: {busy}"
        f"{gpu}; decoded on {summary.decode} ({summary.decode_reason})",
    )
