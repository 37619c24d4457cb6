"""What low precision moves: the cosine of each precision's embeddings to fp32's, image and text, and its speed.

bf16 has 8 significant bits, so one rounding moves a value by up to 2^-9; averaged over a dot product the angle of an
embedding was expected to move by a few thousandths: cosines above 0.999. Weights are random but for the shipped model.
"""

import time
from pathlib import Path

import numpy as np
from reporting import Row, arguments, finish

from clipindex.decode import decode_image
from clipindex.demo import DATA
from clipindex.devices import choose_device, choose_precision
from clipindex.encode import ImageTower, TextTower
from clipindex.errors import UsageError
from clipindex.models import LoadedModel, load_model
from clipindex.shards import list_shards, read_samples
from clipindex.types import ImageEncoder, ModelSpec, Sample, UInt8Array

MODELS = ("demo", "ViT-B-32", "RN50", "ViT-B-16-SigLIP")
NUM_IMAGES = 32
TEXTS = ("a photo of a red panda", "a handwritten digit seven", "two dogs on a beach", "a blue square")


def main() -> None:
    """Measure, print and, with --save, keep."""
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    rows: list[Row] = []
    for name in options.models:
        loaded = load_model(ModelSpec(name=name, random_init=None if name == "demo" else 0))
        rows += compare(name, loaded, options.device)
    finish("precision", rows, options.save)


def compare(name: str, loaded: LoadedModel, device_name: str) -> list[Row]:
    """A row for each precision that a device has: cosines to fp32 on the CPU, and speed."""
    device = choose_device(device_name)
    images = _images(loaded)
    reference = ImageTower(loaded, device=choose_device("cpu"), precision="fp32").encode(images)[0]
    rows: list[Row] = []
    for precision in ("fp32", "bf16", "fp16"):
        try:
            choose_precision(precision, device)
        except UsageError:
            continue
        tower = ImageTower(loaded, device=device, precision=precision)
        cosines = (tower.encode(images)[0] * reference).sum(axis=1)
        rows.append(
            {
                "model": name,
                "precision": precision,
                "device": str(device),
                "image cosine, least": round(float(cosines.min()), 6),
                "image cosine, mean": round(float(cosines.mean()), 6),
                "text cosine, least": _text_cosine(name, loaded, precision, device_name),
                "images_per_s": round(_rate(tower, images), 1),
            }
        )
    return rows


def _text_cosine(name: str, loaded: LoadedModel, precision: str, device_name: str) -> str | float:
    if "SigLIP" in name:
        return "-"  # its tokenizer is a download of its own
    reference = TextTower(loaded, device=choose_device("cpu"), precision="fp32").encode(TEXTS)
    found = TextTower(loaded, device=choose_device(device_name), precision=precision).encode(TEXTS)
    return round(float((found * reference).sum(axis=1).min()), 6)


def _images(loaded: LoadedModel) -> UInt8Array:
    samples = [s for shard in list_shards([str(Path(DATA))]) for s in read_samples(shard) if isinstance(s, Sample)]
    samples = [samples[at * len(samples) // NUM_IMAGES] for at in range(NUM_IMAGES)]
    images = np.zeros((NUM_IMAGES, *loaded.info.preprocess.size, 3), np.uint8)
    for sample, pixels in zip(samples, images, strict=True):
        decode_image(sample.image, loaded.info.preprocess, pixels)
    return images


def _rate(tower: ImageEncoder, images: UInt8Array) -> float:
    tower.encode(images)
    started = time.perf_counter()
    tower.encode(images)
    return len(images) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
