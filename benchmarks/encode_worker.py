"""Measures ways of running an image tower, each beside the shipped one; `encode_paths.py` runs it in a process."""

import contextlib
import copy
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from encode_ways import SHIPPED, WAYS, Way, frozen, without_cudnn_attention
from low_precision import PRODUCT_TRIES, Int8Linear, bare_8_bit, eight_bit_linear, with_outliers
from reporting import Row, said
from torch import nn

from clipindex.allocator import keep_freed_memory
from clipindex.batch_size import fastest_batch_size
from clipindex.bench.ceilings import best_rate, image_flops, product_flops_per_s, synchronizer
from clipindex.bench.corpus import write_corpus
from clipindex.decode import decode_image
from clipindex.devices import PRECISIONS, choose_precision
from clipindex.encode import ImageTower
from clipindex.models import LoadedModel, load_model
from clipindex.shards import list_shards, read_samples
from clipindex.towers import placed, plain_linear, replace_blocks
from clipindex.types import Float32Array, ModelSpec, Sample, UInt8Array

COSTLY_S = 150.0
"""What must be left for a way that tries out kernels."""
NUM_IMAGES = 32
LEAST_GAIN = 1.02
"""Two measurements of one way are as far apart."""
PAIRS = 7
RUN_S = {"cpu": 0.4, "cuda": 0.15}
"""Of a measured run, about."""
WEIGHTS = ("random", "outliers", "outliers, unread")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What all ways of a model have in common."""

    loaded: LoadedModel
    device: torch.device
    images: UInt8Array
    """[NUM_IMAGES, H, W, 3]"""
    batch_size: int
    shipped: ImageTower
    variants: dict[str, tuple[LoadedModel, Float32Array]]
    """Weights by what they are called, with the embeddings that fp32 gives."""
    flops: float
    """Of an image."""
    product: float
    """FLOP/s of the bare bf16 product."""
    shipped_start_s: float
    """As of a way: from the loaded model to the first embeddings."""


def measure_ways(model: str, names: Sequence[str], device: torch.device, folder: Path, left_s: float) -> None:
    """Print, in JSON, each way's name as it begins and its row as soon as it is there, and in the end that it is."""
    until = time.perf_counter() + left_s
    if device.type == "cpu":
        keep_freed_memory()  # as the job does
    setting = _setting(model, device, folder)
    for way in (way for way in WAYS if way.name in names):
        print(json.dumps({"begins": way.name}), flush=True)
        try:
            if way.is_costly and until - time.perf_counter() < COSTLY_S:
                raise RuntimeError(f"left out: it may take {COSTLY_S:.0f} s, and there is less")
            row = _measured(way, setting)
        except Exception as error:  # whatever a machine may say of a way it does not know
            row = row_of(model, way.name, note=said(error))
        print(json.dumps(row), flush=True)
        _clean_up(device)
    print(json.dumps({"done": True}), flush=True)


def _clean_up(device: torch.device) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()  # raises where an error of the device outlives its cause: a new process is needed
        torch.cuda.empty_cache()


def _setting(model: str, device: torch.device, folder: Path) -> Setting:
    loaded = load_model(ModelSpec(name=model, random_init=0))
    shipped = ImageTower(loaded, device=device, precision="bf16")
    images = _images(loaded, folder)
    batch_size = fastest_batch_size(shipped)[0]
    started = time.perf_counter()
    ImageTower(loaded, device=device, precision="bf16").encode(np.resize(images, (batch_size, *images.shape[1:])))
    return Setting(
        loaded=loaded,
        device=device,
        images=images,
        batch_size=batch_size,
        shipped_start_s=time.perf_counter() - started,
        shipped=shipped,
        variants=_variants(loaded, images, device, folder),
        flops=image_flops(loaded),
        product=max(product_flops_per_s(device, "bf16") for _ in range(PRODUCT_TRIES[device.type])),
    )


def _images(loaded: LoadedModel, folder: Path) -> UInt8Array:
    tars = write_corpus(folder / "photographs", NUM_IMAGES)
    samples = [s for shard in list_shards(tars) for s in read_samples(shard) if isinstance(s, Sample)]
    images = np.zeros((NUM_IMAGES, *loaded.info.preprocess.size, 3), np.uint8)
    for sample, pixels in zip(samples, images, strict=True):
        decode_image(sample.image, loaded.info.preprocess, pixels)
    return images


def _variants(
    loaded: LoadedModel, images: UInt8Array, device: torch.device, folder: Path
) -> dict[str, tuple[LoadedModel, Float32Array]]:
    """Those with outliers are compared with fp32 on the device: for large models the CPU would take too long."""
    tower = loaded.model.get_submodule("visual")
    plain = folder / f"{loaded.info.fingerprint}.npy"  # an earlier process may have done it
    if not plain.exists():
        np.save(plain, ImageTower(loaded, device=torch.device("cpu"), precision="fp32").encode(images).unit)
    found: dict[str, tuple[LoadedModel, Float32Array]] = {"random": (loaded, np.load(plain))}
    for name, are_read in (("outliers", True), ("outliers, unread", False)):
        changed = nn.ModuleDict({"visual": with_outliers(tower, are_read=are_read)})
        other = replace(loaded, model=changed)
        found[name] = other, ImageTower(other, device=device, precision="fp32").encode(images).unit
    return found


def _measured(way: Way, setting: Setting) -> Row:
    if way.device not in (None, setting.device.type):
        raise RuntimeError(f"is for {way.device} alone")
    choose_precision(way.precision, setting.device)  # says where a precision is not for a device
    with _own_cache() if way.compiles else contextlib.nullcontext():
        start_s, tower, module = _started(way, setting)
        rate, ratio = _rates(way, tower, setting)
        cosines = {name: _cosines(way, tower, module, name, setting) for name in setting.variants}
        again_s = _started(way, setting)[0] if way.compiles else start_s
    return row_of(
        setting.loaded.info.spec.name,
        way.name,
        device=f"{setting.device}, {torch.get_num_threads()} threads"
        if setting.device.type == "cpu"
        else str(setting.device),
        batch=setting.batch_size,
        images_per_s=round(rate, 1),
        of_shipped=round(ratio, 3),
        start_s=round(start_s, 1),
        again_s=round(again_s, 1),
        pays_after=_pays_after(rate, ratio, start_s - setting.shipped_start_s),
        of_product=round(rate * setting.flops / setting.product, 3),
        note=_note(way, tower, setting),
        **{f"{name}, {what}": value for name, pair in cosines.items() for what, value in pair.items()},
    )


@contextlib.contextmanager
def _own_cache() -> Iterator[None]:
    """Nothing is found that an earlier way, or run, has compiled."""
    import torch._inductor.utils as inductor

    fresh = getattr(inductor, "fresh_cache", None) or inductor.fresh_inductor_cache  # the name before torch 2.8
    with fresh():
        yield


@cache
def _compiler_s(device: torch.device) -> float:
    """Of a process's first compilation, before any model's: imports, processes that compile."""
    started = time.perf_counter()
    torch.compile(lambda x: x + 1)(torch.ones(64, device=device))
    return time.perf_counter() - started


def _started(way: Way, setting: Setting) -> tuple[float, ImageTower, nn.Module]:
    """Seconds from the loaded model to the first batch's embeddings; the tower, and its module before it is wrapped."""
    torch._dynamo.reset()
    compiler_s = _compiler_s(setting.device) if way.compiles else 0.0
    started = time.perf_counter()
    tower, module = _built(way, setting.loaded, setting.device)
    tower.encode(np.resize(setting.images, (setting.batch_size, *setting.images.shape[1:])))
    return time.perf_counter() - started + compiler_s, tower, module


def _built(way: Way, loaded: LoadedModel, device: torch.device) -> tuple[ImageTower, nn.Module]:
    tower = ImageTower(loaded, device=device, precision=way.precision)
    if way.name == SHIPPED:
        return tower, tower._tower
    # A copy, since what need not be converted is shared with the model, and other weights are written here.
    module = copy.deepcopy(placed(loaded.model.get_submodule("visual"), device, PRECISIONS[way.precision]))
    if not way.is_open_clips:
        make = plain_linear if way.layer is nn.Linear else partial(eight_bit_linear, way.layer)
        replace_blocks(module, make)
    tower._tower = module if way.wrap is None else way.wrap(module)  # type: ignore[assignment]
    return tower, module


def _batch(tower: ImageTower, setting: Setting) -> UInt8Array:
    """The photographs, again and again: on zeros a GPU is faster."""
    batch = tower.new_batch(setting.batch_size)
    batch[:] = np.resize(setting.images, batch.shape)
    return batch


def _rates(way: Way, tower: ImageTower, setting: Setting) -> tuple[float, float]:
    """Images/s of a way, the best of some; and its ratio to the shipped one, the median of as many runs in turn.

    On a machine that others use as well, neighbouring runs are slowed alike.
    """
    if way.name == SHIPPED:
        return best_rate(_run(tower, 1, setting), synchronizer(setting.device)), 1.0
    runs = _run(setting.shipped, 1, setting), _run(tower, way.at_once, setting)
    wait = synchronizer(setting.device)
    pairs = [[_rate(run, wait) for run in runs] for _ in range(PAIRS)]
    return max(mine for _, mine in pairs), statistics.median(mine / shipped for shipped, mine in pairs)


def _rate(run: Callable[[], int], wait: Callable[[], None]) -> float:
    wait()
    started = time.perf_counter()
    items = run()
    wait()
    return items / (time.perf_counter() - started)


def _run(tower: ImageTower, at_once: int, setting: Setting) -> Callable[[], int]:
    """Encodes for `RUN_S` or longer, and says how many images that were."""
    batches = [_batch(tower, setting) for _ in range(at_once)]
    tower.encode(batches[0])  # which warms up
    started = time.perf_counter()
    tower.encode(batches[0])
    each = max(1, math.ceil(RUN_S[setting.device.type] / (time.perf_counter() - started) / at_once))

    def encode(batch: UInt8Array) -> None:
        begun = tower.begin(batch)
        for _ in range(each - 1):  # a batch ahead, as the job is
            before, begun = begun, tower.begin(batch)
            before()
        begun()

    # Each thread keeps its stream, and with it the memory that PyTorch has for that stream.
    pool = ThreadPoolExecutor(at_once, initializer=partial(_take_stream, setting.device)) if at_once > 1 else None

    def run() -> int:
        list((pool.map if pool else map)(encode, batches))
        return each * at_once * setting.batch_size

    run()
    return run


def _take_stream(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def _cosines(way: Way, tower: ImageTower, module: nn.Module, name: str, setting: Setting) -> dict[str, float]:
    """To fp32's. Other weights are put into the same tensors, so that nothing is compiled or captured again."""
    loaded, expected = setting.variants[name]
    if loaded is not setting.loaded and way.wrap is None:
        tower = _built(way, loaded, setting.device)[0]
    elif loaded is not setting.loaded:
        if way.wrap is frozen:
            return {"least": math.nan, "mean": math.nan}  # its weights are constants; no others than "compiled"
        module.load_state_dict(_built(replace(way, wrap=None), loaded, setting.device)[1].state_dict())
    batch = tower.new_batch(setting.batch_size)
    cosines: list[float] = []
    for at in range(0, NUM_IMAGES, len(batch)):
        part = setting.images[at : at + len(batch)]
        batch[: len(part)] = part  # a batch is always full: its shape is compiled in
        cosines += (tower.encode(batch).unit[: len(part)] * expected[at : at + len(part)]).sum(axis=1).tolist()
    return {"least": round(min(cosines), 5), "mean": round(sum(cosines) / len(cosines), 5)}


def _pays_after(rate: float, ratio: float, extra_s: float) -> str:
    """Images after which the seconds of starting have come back."""
    if ratio < LEAST_GAIN:
        return "never"
    return f"{max(extra_s, 0.0) * rate / (ratio - 1):,.0f}"


def _note(way: Way, tower: ImageTower, setting: Setting) -> str:
    """What helps to understand a row: of what a batch's time is made, and what the product of its numbers can do."""
    if way.name == SHIPPED:
        return (
            f"bare bf16 product {setting.product / 1e12:.3g} TFLOP/s; {_parts(setting)}; {_new_shape(tower, setting)}"
        )
    if way.wrap is without_cudnn_attention:
        return _new_shape(tower, setting, fewer=2)
    if way.layer is not nn.Linear:
        rate = bare_8_bit(way.layer is Int8Linear, setting.device)
        return f"bare product {rate / 1e12:.3g} TFLOP/s"
    return ""


def _new_shape(tower: ImageTower, setting: Setting, fewer: int = 1) -> str:
    """What the first batch that is so much smaller takes more than the next such: each shape is prepared."""
    batch = _batch(tower, setting)[:-fewer]

    def encode() -> int:
        tower.encode(batch)
        return 1

    first, second = (1 / _rate(encode, synchronizer(setting.device)) for _ in range(2))
    return f"the first batch of another size takes {1000 * (first - second):.0f} ms more"


def _parts(setting: Setting) -> str:
    """Milliseconds of a batch: all, and the tower alone, whose pixels are there."""
    batch = _batch(setting.shipped, setting)
    shape = (setting.batch_size, 3, *setting.loaded.info.preprocess.size)
    pixels = torch.randn(shape, device=setting.device).to(torch.bfloat16, memory_format=torch.channels_last)

    def tower() -> int:
        with torch.inference_mode():
            setting.shipped._tower(pixels)
        return 1

    def whole() -> int:
        setting.shipped.encode(batch)
        return 1

    wait = synchronizer(setting.device)
    return f"of a batch's {1000 / best_rate(whole, wait):.1f} ms the tower takes {1000 / best_rate(tower, wait):.1f}"


def row_of(model: str, way: str, **found: str | float) -> Row:
    """All columns in order; '-' where nothing is known."""
    cosines = [f"{n}, {what}" for n in WEIGHTS for what in ("least", "mean")]
    names = ["device", "batch", "images_per_s", "of_shipped", "start_s", "again_s", "pays_after", "of_product"]
    names += [*cosines, "note"]
    row: Row = {"model": model, "way": way}
    for name in names:
        value = found.get(name, "-")
        row[name] = "-" if isinstance(value, float) and math.isnan(value) else value
    return row
