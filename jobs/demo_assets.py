"""Write the data sets that the package ships: digits and scenes that the demo model never saw, and photographs.

python jobs/demo_assets.py [--out clipindex/demo_data]

The same versions of the libraries give the same bytes.
"""

import argparse
import importlib.util
import io
import json
import logging
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from demo_scenes import CLASS_NAMES, COMBINATIONS, HELD_OUT, render_scene
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

log = logging.getLogger(__name__)

OUT = Path(__file__).resolve().parents[1] / "clipindex" / "demo_data"
DIGIT_NAMES = "zero one two three four five six seven eight nine".split()
DIGIT_TEMPLATES = ["a handwritten digit {c}", "a handwritten {c}", "the number {c}", "an image of the digit {c}"]
SCENE_TEMPLATES = ["a {c}", "a photo of a {c}", "a drawing of a {c}", "an image of a {c}"]
HELD_OUT_DIGITS = 40
"""Of each digit: a fifth of scikit-learn's."""
SCENES_EACH = 12
"""Of each colour-shape pair that training never shows."""
SCENE_SEED = 1_000_003

Members = Sequence[tuple[str, bytes]]

PHOTOGRAPHS = [
    ("astronaut", "skimage/data/astronaut.png", "JPEG", "RGB", "an astronaut in orange", "NASA", "public domain"),
    ("coffee", "skimage/data/coffee.png", "WEBP", "RGB", "a cup of coffee on a table", "Rachel Michetti", "CC0"),
    ("cat", "skimage/data/chelsea.png", "JPEG", "RGB", "a cat called Chelsea", "Stefan van der Walt", "CC0"),
    ("cat_grey", "skimage/data/chelsea.png", "JPEG", "L", "a cat in shades of grey", "Stefan van der Walt", "CC0"),
    ("cat_palette", "skimage/data/chelsea.png", "PNG", "P", "a cat in few colours", "Stefan van der Walt", "CC0"),
    ("cat_alpha", "skimage/data/chelsea.png", "PNG", "RGBA", "a cat behind a veil", "Stefan van der Walt", "CC0"),
    ("rocket", "skimage/data/rocket.jpg", "", "", "a rocket taking off", "SpaceX", "public domain"),
    ("admiral", "matplotlib/mpl-data/sample_data/grace_hopper.jpg", "", "", "Grace Hopper in uniform", "US Navy",
     "public domain"),
    ("temple", "sklearn/datasets/images/china.jpg", "JPEG", "RGB", "a temple in China", "danielbuechele, Flickr",
     "CC BY 2.0"),
    ("flower", "sklearn/datasets/images/flower.jpg", "", "", "a yellow flower", "vultilion, Flickr", "CC BY 2.0"),
]  # fmt: skip
"""Key, file in a wheel, format and mode to write (none: the file's own bytes), caption, author, licence."""


def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]]:
    """scikit-learn's digits: uint8 images [1797, 8, 8], labels [1797], and which of them are held out [1797]."""
    data = load_digits()
    rng = np.random.default_rng(0)
    held_out = np.zeros(len(data.target), np.bool_)
    for digit in range(10):
        held_out[rng.permutation(np.flatnonzero(data.target == digit))[:HELD_OUT_DIGITS]] = True
    return (data.images * (255 / 16)).round().astype(np.uint8), data.target.astype(np.int64), held_out


def main() -> None:
    """Write everything but the model."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    out: Path = parser.parse_args().out
    _write_set(out / "wds_digits", _digit_samples(), 2, DIGIT_NAMES, DIGIT_TEMPLATES)
    _write_set(out / "wds_shapes", _scene_samples(), 1, CLASS_NAMES, SCENE_TEMPLATES)
    _write_set(out / "wds_photos", [_photograph(*row) for row in PHOTOGRAPHS], 1)


def _digit_samples() -> list[Members]:
    images, labels, held_out = digits()
    return [
        [
            (f"digit_{at:06}.png", _encoded(Image.fromarray(images[at]), "PNG")),
            (f"digit_{at:06}.cls", b"%d" % labels[at]),
        ]
        for at in np.flatnonzero(held_out)
    ]


def _scene_samples() -> list[Members]:
    rng = np.random.default_rng(SCENE_SEED)
    samples: list[Members] = []
    for at, label in enumerate(HELD_OUT * SCENES_EACH):
        scene = render_scene(*COMBINATIONS[label], rng)
        name, data = (f"scene_{at:06}.jpg", _encoded(scene, "JPEG")) if at % 4 else (
            f"scene_{at:06}.png", _encoded(scene.quantize(128), "PNG"))  # fmt: skip
        samples.append([(name, data), (f"scene_{at:06}.cls", b"%d" % label)])
    return samples


def _photograph(key: str, file: str, form: str, mode: str, caption: str, author: str, licence: str) -> Members:
    package, _, inside = file.partition("/")
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package} is not installed"
    path = Path(spec.origin).parent / inside
    data, extension = path.read_bytes(), path.suffix.removeprefix(".")
    if form:
        with Image.open(path) as image:
            image.thumbnail((320, 320))
            converted = image.convert("RGB").quantize(64) if mode == "P" else image.convert(mode)
            if mode == "RGBA":
                converted.putalpha(Image.linear_gradient("L").resize(converted.size))
            data, extension = _encoded(converted, form), {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[form]
    about = {"source": f"{package}: {inside}", "author": author, "licence": licence}
    return [(f"{key}.{extension}", data), (f"{key}.txt", caption.encode()), (f"{key}.json", json.dumps(about).encode())]


def _encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **({"optimize": True} if form == "PNG" else {"quality": 88}))
    return buffer.getvalue()


def _write_set(
    root: Path, samples: Sequence[Members], num_shards: int, classes: Sequence[str] = (), templates: Sequence[str] = ()
) -> None:
    """A data set in CLIP_benchmark's layout, with one split."""
    split = root / "test"
    split.mkdir(parents=True, exist_ok=True)
    for shard in range(num_shards):
        first, last = (len(samples) * at // num_shards for at in (shard, shard + 1))
        _write_tar(split / f"{shard}.tar", samples[first:last])
    (split / "nshards.txt").write_text(f"{num_shards}\n")
    for name, lines in (("classnames.txt", classes), ("zeroshot_classification_templates.txt", templates)):
        if lines:
            (root / name).write_text("".join(f"{line}\n" for line in lines))
    log.info("%s: %d samples, %d bytes", root, len(samples), sum(tar.stat().st_size for tar in split.glob("*.tar")))


def _write_tar(path: Path, samples: Iterable[Members]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in (member for sample in samples for member in sample):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


if __name__ == "__main__":
    main()
