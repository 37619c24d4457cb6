"""Decoding: images/s on one core and on all, and how far each way is from open_clip's own transform.

Physics: an ordinary JPEG of 500 x 375 pixels costs libjpeg-turbo 0.4 ms, and an antialiased bicubic resize of it as
much again. Pillow takes 1 ms for each, and open_clip's transform then works in fp32. Expected: 2.5 times the speed of
that transform on a core, and as many times that as there are cores, since both libraries release the GIL. Decoding
large images at a fraction of their size saves the inverse transform and half of the resize, but not the entropy
decoding, which is half of the work: expected 1.5 times.
"""

import io
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from reporting import Row, arguments, finish

from clipindex.bench.ceilings import best_rate, jpegs_per_s
from clipindex.bench.corpus import write_corpus
from clipindex.decode import decode_image, decode_reference
from clipindex.devices import choose_device
from clipindex.encode import ImageTower
from clipindex.models import load_model
from clipindex.shards import list_shards, read_samples
from clipindex.threads import num_cores
from clipindex.types import ModelSpec, Preprocess, Sample, UInt8Array

MODEL = "ViT-B-32"
OPEN_CLIP = "open_clip's transform"
NUM_IMAGES = {(500, 375): 256, (1600, 1200): 64}

Decode = Callable[[bytes, Preprocess, UInt8Array], object]


def main() -> None:
    """Measure, print and, with --save, keep."""
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    loaded = load_model(ModelSpec(name=MODEL, random_init=0))
    tower = ImageTower(loaded, device=choose_device("cpu"), precision="fp32")
    ways: dict[str, Decode] = {
        OPEN_CLIP: _open_clips_transform(loaded.info.preprocess),
        "exact": decode_image,
        "fast": lambda data, preprocess, out: decode_image(data, preprocess, out, fast=True),
    }
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for size, number in NUM_IMAGES.items():
            name = f"{size[0]}x{size[1]}"
            tars = write_corpus(Path(folder) / name, number, size=size)
            images = [s.image for shard in list_shards(tars) for s in read_samples(shard) if isinstance(s, Sample)]
            rows += _compare(name, images, ways, tower)
    finish("decode", rows, options.save)


def _open_clips_transform(preprocess: Preprocess) -> Decode:
    """As people call it: down to the normalised float tensor."""
    transform = image_transform_v2(
        PreprocessCfg(size=preprocess.size, mean=preprocess.mean, std=preprocess.std), is_train=False
    )
    return lambda data, _, out: transform(Image.open(io.BytesIO(data)))


def _compare(name: str, images: list[bytes], ways: dict[str, Decode], tower: ImageTower) -> list[Row]:
    preprocess = tower.info.preprocess
    pixels: dict[str, UInt8Array] = {}
    rates = {}
    for what, way in ways.items():
        pixels[what] = np.empty((len(images), *preprocess.size, 3), np.uint8)
        rates[what] = [_rate(images, way, preprocess, pixels[what], threads) for threads in (1, num_cores())]
    reference = pixels[OPEN_CLIP]
    for data, out in zip(images, reference, strict=True):
        decode_reference(data, preprocess, out)
    embedded = tower.encode(reference[:64])[0]
    rows: list[Row] = []
    for what in ways:
        difference = np.abs(pixels[what].astype(np.int16) - reference)
        cosines = (tower.encode(pixels[what][:64])[0] * embedded).sum(axis=1)
        rows.append(
            {
                "images": name,
                "decoder": what,
                "images_per_s, one core": round(rates[what][0]),
                "over open_clip's": round(rates[what][0] / rates[OPEN_CLIP][0], 2),
                f"images_per_s, {num_cores()} cores": round(rates[what][1]),
                "deviation of 255, mean": round(float(difference.mean()), 4),
                "largest": int(difference.max()),
                "cosine, least": round(float(cosines.min()), 5),
            }
        )
    bare = [round(jpegs_per_s(images, threads)) for threads in (1, num_cores())]
    rows.append(
        {
            "images": name,
            "decoder": "libjpeg-turbo, no resize",
            "images_per_s, one core": bare[0],
            "over open_clip's": round(bare[0] / rates[OPEN_CLIP][0], 2),
            f"images_per_s, {num_cores()} cores": bare[1],
            "deviation of 255, mean": "-",
            "largest": "-",
            "cosine, least": "-",
        }
    )
    return rows


def _rate(images: list[bytes], way: Decode, preprocess: Preprocess, out: UInt8Array, threads: int) -> float:
    def run() -> int:
        with ThreadPoolExecutor(threads) as pool:
            return sum(1 for _ in pool.map(lambda at: way(images[at], preprocess, out[at]), range(len(images))))

    return best_rate(run)


if __name__ == "__main__":
    main()
