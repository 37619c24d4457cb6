"""The benchmark: one corpus, every stage, every model, one table."""

import itertools
import logging
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch

from clipindex.allocator import keep_freed_memory
from clipindex.batch_size import fastest_batch_size
from clipindex.bench.ceilings import image_flops, product_flops_per_s
from clipindex.bench.corpus import write_corpus
from clipindex.bench.machine import describe_machine
from clipindex.bench.measure import (
    Measurement,
    measure_copy,
    measure_decode,
    measure_device_decode,
    measure_encode,
    measure_end_to_end,
    measure_read,
    measure_write,
)
from clipindex.decode.on_device import supports
from clipindex.devices import choose_device, choose_precision
from clipindex.encode import ImageTower
from clipindex.errors import UsageError
from clipindex.models import LoadedModel, load_model
from clipindex.threads import num_cores
from clipindex.types import ModelSpec, Preprocess

log = logging.getLogger(__name__)

CPU_IMAGES = 512
CUDA_IMAGES = 16_384
SHARD_IMAGES = 1024
LARGE_SIZE = (1600, 1200)
SMALL_SIZE = (500, 375)
JOB_S = 15.0
"""Of the whole job: in a short one the beginning counts, when there is nothing yet to encode."""
LARGE_SHARE = 16
"""One large image for so many small ones: they decode a tenth as fast."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchReport:
    """What was measured, on what."""

    machine: dict[str, Any]
    images: int
    """Different ones, of the corpus that the whole job ran over, as often as its note says."""
    measurements: list[Measurement]
    peak_memory_bytes: int
    """Most that the process held, over all of the benchmark."""
    peak_device_memory_bytes: int
    """Most that was allocated on the CUDA device; 0 without one."""

    def document(self) -> dict[str, Any]:
        """All of it, with each ratio, for JSON."""
        rows = [{**asdict(row), "of_ceiling": round(row.of_ceiling, 4)} for row in self.measurements]
        return {**asdict(self), "measurements": rows}


def bench(
    models: Sequence[str] = ("ViT-B-32",),
    *,
    precisions: Sequence[str] = ("auto",),
    batch_sizes: Sequence[int] = (),
    random_init: int = 0,
    device: str = "auto",
    images: int | None = None,
    seconds: float = JOB_S,
    work: str | Path | None = None,
    on_step: Callable[[str], None] = lambda step: None,
    on_measurement: Callable[[Measurement], None] = lambda measurement: None,
) -> BenchReport:
    """Measure every stage of an embedding job, and all together, each beside its ceiling.

    Args:
        models: open_clip architectures, which get random weights (speed does not depend on them), or anything else that
            `embed_job.embed` takes.
        precisions: 'auto', 'bf16', 'fp16' or 'fp32'; each model runs in each.
        batch_sizes: To measure the encoder at; found by measuring, by default. The whole job runs at the fastest.
        random_init: Seed of random weights.
        device: As in `devices.choose_device`.
        images: Different ones in the corpus that the whole job runs over; 512 on a CPU and 16,384 on CUDA by default.
        seconds: That the whole job should take at least: it goes over the corpus as often as that needs.
        work: A folder for the corpus, which is then kept and used again; a temporary one by default.
        on_step: Called with what is being measured.
        on_measurement: Called with each result.

    Raises:
        ClipindexError: Whatever is the caller's to mend; its kinds are in `errors`.
    """
    chosen = choose_device(device)
    if chosen.type == "cpu":
        keep_freed_memory()  # as the job does
    number = images or (CUDA_IMAGES if chosen.type == "cuda" else CPU_IMAGES)
    names = list(dict.fromkeys(choose_precision(name, chosen) for name in precisions))
    specs = [
        ModelSpec(name=name, random_init=random_init if name in open_clip.list_models() else None) for name in models
    ]
    measurements: list[Measurement] = []

    def note(*found: Measurement) -> None:
        measurements.extend(found)
        for measurement in found:
            on_measurement(measurement)

    folder = Path(work) if work is not None else Path(tempfile.mkdtemp(prefix="clipindex-bench-"))
    try:
        small, large = _corpora(folder, number, on_step)
        on_step("reading tars")
        note(measure_read(small[0], _name(SMALL_SIZE)))
        on_step("matrix products")
        products = {name: product_flops_per_s(chosen, name) for name in names}
        for spec in specs:
            on_step(f"loading {spec.name}")
            loaded = load_model(spec)
            on_step(f"decoding for {spec.name}")
            decoding = _decoders(small[:1], large, loaded.info.preprocess, chosen)
            note(*itertools.chain(*decoding.values()))
            decode_per_s = {where: found[0].images_per_s for where, found in decoding.items()}
            note(measure_write(folder / "write", loaded.info))
            for name in names:
                encoding = _encoders(loaded, chosen, name, batch_sizes, products[name], on_step)
                note(*(row for _, row in encoding))
                size, fastest = max(encoding, key=lambda one: one[1].images_per_s)
                if chosen.type == "cuda":
                    note(measure_copy(ImageTower(loaded, device=chosen, precision=name), size, chosen))
                on_step(f"{spec.name}, {name}: tars to Parquet")
                job = small, folder, spec, name, chosen, size, decode_per_s, fastest.images_per_s
                note(measure_end_to_end(*job, num_images=number, seconds=seconds))
            shutil.rmtree(folder / "write")
    finally:
        if work is None:
            shutil.rmtree(folder)
    return BenchReport(
        machine=describe_machine(chosen),
        images=number,
        measurements=measurements,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
        peak_device_memory_bytes=torch.cuda.max_memory_allocated(chosen) if chosen.type == "cuda" else 0,
    )


def _corpora(folder: Path, number: int, on_step: Callable[[str], None]) -> tuple[list[str], list[str]]:
    on_step(f"drawing {number:,} images")
    small = write_corpus(folder / _name(SMALL_SIZE), number, size=SMALL_SIZE, shard_images=SHARD_IMAGES)
    large = write_corpus(
        folder / _name(LARGE_SIZE), min(max(number // LARGE_SHARE, 8), 256), size=LARGE_SIZE, shard_images=SHARD_IMAGES
    )
    return small, large


def _decoders(
    small: list[str], large: list[str], preprocess: Preprocess, device: torch.device
) -> dict[str, list[Measurement]]:
    """By 'cpu' and, where it can, 'cuda', what was measured on small images and on large ones."""
    sizes = ((small, _name(SMALL_SIZE)), (large, _name(LARGE_SIZE)))
    found = {"cpu": [measure_decode(tars, name, preprocess, num_cores()) for tars, name in sizes]}
    if device.type == "cuda" and supports(preprocess):
        try:
            found["cuda"] = [measure_device_decode(tars, name, preprocess, device) for tars, name in sizes]
        except (UsageError, RuntimeError) as error:  # a job goes on without it, and so does this
            log.warning("decoding on %s cannot be measured: %s", device, error)
    return found


def _encoders(
    loaded: LoadedModel,
    device: torch.device,
    precision: str,
    batch_sizes: Sequence[int],
    product: float,
    on_step: Callable[[str], None],
) -> list[tuple[int, Measurement]]:
    """Batch sizes and what was measured at each."""
    name = loaded.info.spec.name
    on_step(f"encoding with {name}, {precision}")
    tower = ImageTower(loaded, device=device, precision=precision)
    sizes = batch_sizes or [fastest_batch_size(tower)[0]]
    flops = image_flops(loaded)
    return [(size, measure_encode(tower, name, size, flops, product)) for size in sizes]


def _name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
