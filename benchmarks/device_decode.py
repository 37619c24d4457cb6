"""Decoding on a CUDA device: whether its pixels are right, then how many there are a second.

Right: the deviation of its pixels from the CPU's way, and the cosine of their embeddings, for photographs in each form
that is for the device. Expected: within 2/255 for 4:4:4 and grey; for 4:2:0 at 500 x 375 up to 20/255 and 0.5 on
average, since nvJPEG repeats chroma samples where libjpeg-turbo interpolates. Fast: by images a call and size, beside
the cores of the CPU; and the whole job each way, of as many images and in batches of one size. Nothing of this has been
measured yet. `--device cpu` tries the script out.
"""

import io
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from reporting import Row, arguments, finish, said

from clipindex.batch_size import fastest_batch_size
from clipindex.bench.corpus import repeated, write_corpus
from clipindex.bench.measure import Measurement, measure_decode, measure_device_decode
from clipindex.bench.utilisation import describe_utilisation, sampling_utilisation
from clipindex.decode import MAX_PIXELS, decode_image
from clipindex.decode.on_device import DeviceDecoder
from clipindex.devices import choose_devices, choose_precision
from clipindex.embed_job import embed
from clipindex.encode import ImageTower
from clipindex.models import LoadedModel, load_model
from clipindex.shards import list_shards, read_samples
from clipindex.threads import num_cores
from clipindex.types import ModelSpec, Sample, UInt8Array

MODEL = "ViT-B-32"
NUM_PHOTOGRAPHS = 48
SMALL, LARGE = (500, 375), (1600, 1200)
IMAGES = 4096
"""Different ones."""
SHARD_IMAGES = 1024
DECODE_TARS = 2
"""Of small images, that are decoded again and again."""
NUM_LARGE = 256
CHUNKS = {SMALL: (32, 8, 128), LARGE: (32,)}
"""Images a call."""
WAYS = (("cpu", "exact"), ("cuda", "exact"), ("auto", "fast"), ("auto", "exact"))
"""--decode and --preprocess of the whole job. Of images so small, the CPU's fast way is the exact one."""
JOB_S = 6.0
"""Of a job where the CPU's cores decode."""
JOB_BATCH = 512
FORMS: dict[str, dict[str, Any]] = {
    "4:2:0": {"subsampling": "4:2:0"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:4:4": {"subsampling": "4:4:4"},
    "4:2:0, quality 40": {"subsampling": "4:2:0", "quality": 40},
    "4:2:0, own codes": {"subsampling": "4:2:0", "optimize": True},
    "4:2:0, restarts": {"subsampling": "4:2:0", "restart_marker_rows": 1},
    "grey": {"mode": "L"},
    "333 x 251": {"subsampling": "4:2:0", "size": (333, 251)},
    "97 x 130": {"subsampling": "4:2:0", "size": (97, 130)},
    "1600 x 1200": {"subsampling": "4:2:0", "size": (1600, 1200)},
}


def main() -> None:
    """Measure, print and, with --save, keep."""
    parser = arguments(__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, default=IMAGES, help="different ones, that the whole job repeats")
    options = parser.parse_args()
    device = choose_devices(options.device)[0]
    loaded = load_model(ModelSpec(name=MODEL, random_init=0))
    finish("device_decode_precision", compare(loaded, device), options.save, device=device)
    with tempfile.TemporaryDirectory() as folder:
        rows = rates(loaded, device, options.images, Path(folder))
    finish("device_decode_speed", rows, options.save, device=device)


def compare(
    loaded: LoadedModel, device: torch.device, on_rows: Callable[[list[Row]], None] = lambda rows: None
) -> list[Row]:
    """A row for each form of photographs: how many the device takes, and how far its pixels and embeddings are off.

    Args:
        loaded: The model.
        device: That decodes.
        on_rows: Called with all rows whenever there is one more.
    """
    tower = ImageTower(loaded, device=device, precision="fp32")
    decoder = DeviceDecoder(loaded.info.preprocess, device, max_pixels=MAX_PIXELS)
    with tempfile.TemporaryDirectory() as folder:
        tars = write_corpus(Path(folder), NUM_PHOTOGRAPHS, size=(800, 600))
        drawn = _images(tars)
    rows: list[Row] = []
    for form, how in FORMS.items():
        rows.append(_row(form, [_encoded(data, **how) for data in drawn], decoder, tower))
        on_rows(rows)
    rows.append(_row("as a corpus has them", drawn, decoder, tower))
    on_rows(rows)
    return rows


def _row(form: str, images: Sequence[bytes], decoder: DeviceDecoder, tower: ImageTower) -> Row:
    mine = [(data, size) for data in images if (size := decoder.size_of(data)) is not None]
    found = np.zeros((len(mine), *decoder.preprocess.size, 3), np.uint8)
    decoded, _ = decoder.decode([data for data, _ in mine], [size for _, size in mine], list(found))
    expected = np.zeros_like(found)
    for (data, _), pixels in zip(mine, expected, strict=True):
        decode_image(data, decoder.preprocess, pixels)
    done = np.flatnonzero(decoded)
    deviation = np.abs(found[done].astype(np.int16) - expected[done])
    return {
        "photographs": form,
        "device": str(decoder.device),
        "images": len(images),
        "for the device": len(mine),
        "decoded": len(done),
        "deviation of 255, mean": round(float(deviation.mean()), 4) if len(done) else "-",
        "of the worst image": round(float(deviation.mean(axis=(1, 2, 3)).max()), 4) if len(done) else "-",
        "largest": int(deviation.max()) if len(done) else "-",
        "cosine, least": round(_least_cosine(tower, found[done], expected[done]), 6) if len(done) else "-",
        "last error": decoder.last_error,
    }


def _least_cosine(tower: ImageTower, found: UInt8Array, expected: UInt8Array) -> float:
    return float((tower.encode(found).unit * tower.encode(expected).unit).sum(axis=1).min())


def _images(tars: Sequence[str]) -> list[bytes]:
    return [item.image for shard in list_shards(tars) for item in read_samples(shard) if isinstance(item, Sample)]


def _encoded(data: bytes, mode: str = "RGB", size: tuple[int, int] = (500, 375), **options: Any) -> bytes:  # noqa: ANN401
    """A photograph once more, at a size and in a form."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        resized = image.convert(mode).resize(size, Image.Resampling.LANCZOS)
    resized.save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def corpus(folder: Path, num_images: int) -> list[str]:
    """Tars of small images, drawn once for all that work in a folder."""
    return write_corpus(folder / "small", num_images, size=SMALL, shard_images=SHARD_IMAGES)


def rates(
    loaded: LoadedModel,
    device: torch.device,
    num_images: int,
    folder: Path,
    on_rows: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Images/s of the CPU's cores and of the device at several images a call, and of the whole job each way.

    What fails is a row that says why, and the others go on.

    Args:
        loaded: The model.
        device: That decodes.
        num_images: Different ones.
        folder: For them; see `corpus`.
        on_rows: Called with all rows whenever there is one more.
    """
    rows: list[Row] = []
    preprocess = loaded.info.preprocess

    def note(what: str, setting: str, measure: Callable[[], Row]) -> Row:
        try:
            rows.append(measure())
        except Exception as error:  # nvJPEG's, CUDA's
            rows.append({"what": what, "setting": setting, "images_per_s": "-", "note": f"failed: {said(error)}"})
        on_rows(rows)
        return rows[-1]

    def decode(tars: Sequence[str], size: tuple[int, int]) -> Row:
        """By the cores, then by the device; the row of the cores."""
        name = f"{size[0]}x{size[1]}"
        cores = note("decode", name, partial(_decoded, partial(measure_decode, tars, name, preprocess, num_cores())))
        for chunk in CHUNKS[size]:
            setting = f"{name}, {device}, {chunk} a call"
            measure = partial(measure_device_decode, tars, name, preprocess, device, chunk)
            note("decode", setting, partial(_decoded, measure))
        return cores

    tars = corpus(folder, num_images)
    by_cores = decode(tars[:DECODE_TARS], SMALL)["images_per_s"]
    encoded = fastest_batch_size(ImageTower(loaded, device=device, precision=choose_precision("auto", device)))[1]
    images = JOB_S * min(encoded, by_cores if isinstance(by_cores, float) else 0.0)
    with tempfile.TemporaryDirectory() as jobs:
        many = repeated(tars, Path(jobs) / "tars", max(1, math.ceil(images / num_images)))
        for way, how in WAYS if device.type == "cuda" else WAYS[:1]:
            job = partial(_job, many, Path(jobs) / "out", way, how, device)
            note("embed", f"--decode {way} --preprocess {how}", job)
    decode(write_corpus(folder / "large", min(NUM_LARGE, num_images), size=LARGE), LARGE)
    return rows


def _decoded(measure: Callable[[], Measurement]) -> Row:
    found = measure()
    return {
        "what": "decode",
        "setting": found.setting,
        "images_per_s": round(found.images_per_s, 1),
        "note": f"{found.of_ceiling:.2f} of {found.ceiling}" + (f"; {found.note}" if found.note else ""),
    }


def _job(tars: Sequence[str], out: Path, way: str, how: str, device: torch.device) -> Row:
    shutil.rmtree(out, ignore_errors=True)  # of the job before
    with sampling_utilisation(device) as samples:
        summary = embed(
            tars,
            out,
            model=MODEL,
            random_init=0,
            device=str(device),
            decode=way,
            preprocess=how,
            batch_size=JOB_BATCH,
            on_plan=lambda plan: samples.clear(),
        )
    busy = ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in summary.stages.busy.items())
    return {
        "what": "embed",
        "setting": f"--decode {way} --preprocess {how}: {summary.decode} ({summary.decode_reason})",
        "images_per_s": summary.images_per_s,
        "note": f"{summary.decoded_on_device:,} of {summary.samples:,} on the device; {busy};"
        f" {describe_utilisation(samples)}",
    }


if __name__ == "__main__":
    main()
