"""The embedding job: which shards to run, running them, and what to say afterwards."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from clipindex.allocator import keep_freed_memory
from clipindex.atomic import write_json
from clipindex.batch_size import fastest_batch_size
from clipindex.decode import MAX_PIXELS
from clipindex.devices import choose_devices, choose_precision
from clipindex.encode import ImageTower
from clipindex.errors import StoreError, UsageError
from clipindex.models import load_model
from clipindex.pipeline import Progress, ShardResult, embed_shards
from clipindex.pipeline.device_share import DECODE, DeviceShare, obstacle, share_decoding
from clipindex.shards import MAX_BYTES, list_shards
from clipindex.stages import StageTimes, stage_times
from clipindex.store import DTYPES, Dataset, Plan, ShardRecord, open_dataset, plan_shards, published_shards
from clipindex.threads import drop_openmp_threads, num_cores
from clipindex.types import ImageEncoder, ModelInfo, ModelSpec, Shard
from clipindex.version import CREATED_BY

FEATURES = ("projected", "pre-projection", "both")
PREPROCESS = ("exact", "fast")
ON_BROKEN_SHARD = ("fail", "salvage")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedSummary:
    """What a run did; DIR/summary.json holds the same."""

    out: str
    model: str
    fingerprint: str
    device: str
    """Several with commas between."""
    precision: str
    batch_size: int
    """Images at once; 0 where there was nothing to do and none was given."""
    decode: str
    """'cuda' where the device decoded ordinary JPEGs, 'cpu' where the CPU did all."""
    decode_reason: str
    """Why."""
    decoded_on_device: int
    """Images."""
    shards: int
    """Named by the sources."""
    shards_done_before: int
    shards_embedded: int
    shards_changed: list[str]
    """URLs of tars that differ from what their published rows were made of, and were left so."""
    shards_done_elsewhere: int
    """By another run on the same directory, since this one began."""
    shards_failed: dict[str, str]
    """URL and why; these are not published."""
    shards_salvaged: dict[str, str]
    """URL and where it breaks; what came before that is published, and in the counts below."""
    samples: int
    """Of this run, as all counts below."""
    rows: int
    rejects: int
    rejects_by_stage: dict[str, int]
    seconds: float
    """From the first shard on; loading the model apart."""
    images_per_s: float
    stages: StageTimes
    """Which stage bound the run."""

    @property
    def reject_rate(self) -> float:
        """Rejects of all samples, 0 to 1."""
        return self.rejects / self.samples if self.samples else 0.0


def embed(
    sources: str | Iterable[str],
    out: str | Path,
    *,
    model: str,
    pretrained: str | None = None,
    random_init: int | None = None,
    quick_gelu: bool | None = None,
    features: str = "projected",
    dtype: str = "float16",
    batch_size: int | None = None,
    decode_threads: int | None = None,
    preprocess: str = "exact",
    decode: str = "auto",
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    on_broken_shard: str = "fail",
    device: str = "auto",
    precision: str = "auto",
    refresh: bool = False,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> EmbedSummary:
    """Embed every image of the sources' tars into Parquet shards below `out`.

    Shards that are published there already are passed over, so that a run which was stopped, at whatever moment, is
    finished by calling this again. On a CPU the process's memory allocator is tuned; see `allocator`.

    Args:
        sources: Tars: paths, folders, globs, brace ranges, URLs, ``@FILE`` lists; see `shards.list_shards`.
        out: The embedding directory, made where there is none.
        model: open_clip architecture, ``hf-hub:…``, ``local-dir:…``, a directory, ``timm:BACKBONE``, or ``demo``; see
            `models.load_model`.
        pretrained: Tag of open_clip's or timm's, or local weights file.
        random_init: Seed of random weights in place of trained ones.
        quick_gelu: Activation of a weights file that does not say.
        features: What of a CLIP tower is kept: 'projected' into the space shared with texts, 'pre-projection' (what the
            CLIP paper's linear probes are fitted to), or 'both', which takes no more time and a column of its own.
        dtype: Of the embedding column: 'float16', or 'float32' for readers that know no half floats.
        batch_size: Images at once; found by measuring, by default.
        decode_threads: One for each core by default.
        preprocess: 'exact', or 'fast': large JPEGs are decoded at a fraction of their size; see `decode.decode_image`.
        decode: 'cpu'; 'cuda': ordinary JPEGs on the CUDA device that encodes, by nvJPEG, and the rest on the CPU; or
            'auto': 'cuda' if it is faster and its pixels are within 2/255 of the CPU's, on the first images of the run
            (with `preprocess` 'fast': within 1/255 on average).
        max_pixels: Larger images are rejects, by their header.
        max_bytes: Images of more encoded bytes are rejects, by the tar's header.
        on_broken_shard: 'fail': a tar whose stream breaks is not published; 'salvage': what came before the break is,
            with the break recorded.
        device: 'cpu', 'cuda', 'cuda:N', several with commas between, or 'auto': all CUDA devices, else the CPU.
        precision: 'auto', 'bf16', 'fp16' or 'fp32'.
        refresh: Embed changed tars again.
        on_plan: Called once, before the first shard.
        on_progress: Called after every batch.

    Raises:
        ClipindexError: Whatever is the caller's to mend; its kinds are in `errors`. A shard that breaks is no error:
            the others go on, and the summary names it.
    """
    _check_choices(features, dtype, preprocess, decode, on_broken_shard)
    _check_numbers(batch_size, max_pixels, max_bytes)
    devices = _choose_devices(device, decode)
    shards = list_shards([sources] if isinstance(sources, str) else sources)
    spec = ModelSpec(name=model, pretrained=pretrained, random_init=random_init, quick_gelu=quick_gelu)
    encoders, before_projection = _load_towers(spec, features, devices, precision)
    folder = Path(out)
    plan, dataset = _plan(shards, folder, encoders[0].info, before_projection, dtype, refresh)
    on_plan(plan)
    size = batch_size or (_measured_batch_size(encoders[0]) if plan.todo else 0)
    threads = decode_threads or num_cores()
    share = DeviceShare(None, "nothing to decode", threads)
    fast = preprocess == "fast"
    if plan.todo:
        wanted = encoders[0].info.preprocess
        share = share_decoding(decode, devices, wanted, fast=fast, max_pixels=max_pixels, decode_threads=threads)
    tally = _Tally(on_progress)
    drop_openmp_threads()  # which loading and measuring called for here: the thread that encodes has its own
    for result in embed_shards(
        plan.todo,
        encoders,
        folder,
        dataset,
        batch_size=size,
        decode_threads=threads,
        share=share,
        fast_decode=fast,
        max_pixels=max_pixels,
        max_bytes=max_bytes,
        salvage=on_broken_shard == "salvage",
        on_progress=tally.note_progress,
    ):
        tally.add(result)
    summary = _summarise(folder, plan, encoders, size, share, tally)
    write_json(folder / "summary.json", asdict(summary))
    return summary


class _Tally:
    """What has become of the shards of a run, from now on."""

    def __init__(self, on_progress: Callable[[Progress], None]) -> None:
        self.records: list[ShardRecord] = []
        """Of what this run has published."""
        self.done_elsewhere = 0
        self.failed: dict[str, str] = {}
        self.reject_stages: Counter[str] = Counter()
        self.stages = stage_times([])
        self.started = time.perf_counter()
        self._on_progress = on_progress

    def note_progress(self, progress: Progress) -> None:
        """Keep how busy the stages were, and pass it on."""
        self.stages = progress.stages
        self._on_progress(progress)

    def add(self, result: ShardResult) -> None:
        """Count a shard that is done."""
        if result.record is None:
            self.failed[result.shard.url] = str(result.error)
        elif not result.is_ours:
            self.done_elsewhere += 1
        else:
            self.records.append(result.record)
            self.reject_stages += result.reject_stages


def _choose_devices(device: str, decode: str) -> list[torch.device]:
    devices = choose_devices(device)
    if decode == "cuda" and (why := obstacle(devices)):
        raise UsageError(f"--decode cuda: {why}")
    if devices[0].type == "cpu":
        keep_freed_memory()
    return devices


def _load_towers(
    spec: ModelSpec, features: str, devices: Sequence[torch.device], precision: str
) -> tuple[list[ImageTower], ModelInfo | None]:
    """The image tower on each device, and the description of its features before the projection if both are kept."""
    chosen_precision = choose_precision(precision, devices[0])
    both = features == "both"
    loaded = load_model(spec, pre_projection=features == "pre-projection")
    before_projection = loaded.before_projection() if both else None
    towers = [ImageTower(loaded, device=one, precision=chosen_precision, with_pre_projection=both) for one in devices]
    return towers, before_projection


def _plan(
    shards: Sequence[Shard],
    folder: Path,
    info: ModelInfo,
    before_projection: ModelInfo | None,
    dtype: str,
    refresh: bool,
) -> tuple[Plan, Dataset]:
    """What is left to do in a folder, which is made an embedding directory where it is none."""
    if folder.is_file():
        raise StoreError(f"{folder} is a file; embeddings go into a folder")
    dataset = open_dataset(folder, info, dtype, CREATED_BY, before_projection)
    return plan_shards(shards, published_shards(folder), dataset, refresh=refresh), dataset


def _summarise(
    folder: Path, plan: Plan, encoders: Sequence[ImageTower], batch_size: int, share: DeviceShare, tally: _Tally
) -> EmbedSummary:
    seconds = time.perf_counter() - tally.started
    samples = sum(record.samples for record in tally.records)
    return EmbedSummary(
        out=str(folder),
        model=encoders[0].info.spec.name,
        fingerprint=encoders[0].info.fingerprint,
        device=",".join(encoder.device for encoder in encoders),
        precision=encoders[0].precision,
        batch_size=batch_size,
        decode=share.way,
        decode_reason=share.reason,
        decoded_on_device=share.num_decoded,
        shards=len(plan.todo) + len(plan.done) + len(plan.changed),
        shards_done_before=len(plan.done),
        shards_embedded=len(tally.records),
        shards_changed=[shard.url for shard in plan.changed],
        shards_done_elsewhere=tally.done_elsewhere,
        shards_failed=tally.failed,
        shards_salvaged={
            record.url: f"{record.rows} rows and {record.rejects} rejects up to the break; {record.broken}"
            for record in tally.records
            if record.broken is not None
        },
        samples=samples,
        rows=sum(record.rows for record in tally.records),
        rejects=sum(record.rejects for record in tally.records),
        rejects_by_stage=dict(sorted(tally.reject_stages.items())),
        seconds=round(seconds, 3),
        images_per_s=round(samples / seconds, 1) if samples else 0.0,
        stages=tally.stages,
    )


def _check_choices(features: str, dtype: str, preprocess: str, decode: str, on_broken_shard: str) -> None:
    _check_choice("features", features, FEATURES)
    _check_choice("dtype", dtype, DTYPES)
    _check_choice("preprocess", preprocess, PREPROCESS)
    _check_choice("decode", decode, DECODE)
    _check_choice("on_broken_shard", on_broken_shard, ON_BROKEN_SHARD)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(f"{name} {value!r}: choose one of {', '.join(choices)}")


def _check_numbers(batch_size: int | None, max_pixels: int, max_bytes: int) -> None:
    _check_range("batch_size", 1 if batch_size is None else batch_size, None)
    _check_range("max_pixels", max_pixels, MAX_PIXELS)
    _check_range("max_bytes", max_bytes, MAX_BYTES)


def _check_range(name: str, value: int, most: int | None) -> None:
    if value < 1 or (most is not None and value > most):
        raise UsageError(f"{name} {value}: give at least 1" + (f" and at most {most}" if most is not None else ""))


def _measured_batch_size(encoder: ImageEncoder) -> int:
    size, rate = fastest_batch_size(encoder)
    log.info("batch size %d, at which %s encodes %.0f images/s", size, encoder.device, rate)
    return size
