"""clipindex against the loop that people write: webdataset, DataLoader, open_clip's transform, encode_image, np.save.

Physics: ViT-B/32's image tower is 4.4 GMAC, some 50 ms of two AVX-512 cores in fp32. Decoding and resizing a photo of
500 x 375 is some 5 ms of one core with Pillow, 2 ms with libjpeg-turbo and PyTorch. On a CPU the model is therefore the
bound, and bf16 instructions, which multiply twice the numbers a cycle and move half the bytes, were expected to give 3
to 4 times the fp32 loop; autocast rounds the same products but goes back to fp32 between them and converts the weights
for each batch: 1.2 to 1.5 times it. A GPU waits for the decoding, so there the ratio was expected to be that of the
decoders, 2 to 3. Cosines above 0.999: pixels differ by at most 2/255, and bf16 moves what precision.py says.

Both sides get the same tars, weights, device and number of decoders; neither time holds the loading of the model, nor
ours the search for a batch size. The loop takes 64 images at once on a CPU and 256 on CUDA.

Weights are random, and random weights put all images close together: the centred cosine, after the mean embedding of
the corpus is subtracted from both sides, is the one that a row at a wrong place would ruin.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import open_clip
import torch
import webdataset
from open_clip.transform import PreprocessCfg, image_transform_v2
from reporting import Row, arguments, finish
from torch.utils.data import DataLoader

from clipindex import embed, read_embeddings
from clipindex.bench.corpus import write_corpus
from clipindex.devices import choose_device
from clipindex.models import LoadedModel, load_model
from clipindex.threads import num_cores
from clipindex.types import Float32Array, ModelSpec

CPU_IMAGES = 256
CUDA_IMAGES = 16_384
BATCH_SIZES = {"cpu": 64, "cuda": 256}
"""Of the others; clipindex measures its own."""

Float64Array = npt.NDArray[np.float64]
Vectors = dict[str, Float32Array]
"""Embeddings by key."""


def main() -> None:
    """Measure, print and, with --save, keep."""
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, help=f"default: {CPU_IMAGES} on a CPU, {CUDA_IMAGES} on CUDA")
    parser.add_argument("--model", default="ViT-B-32", help="architecture, given random weights; or demo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = choose_device(options.device)
    num_images = options.images or (CUDA_IMAGES if device.type == "cuda" else CPU_IMAGES)
    with tempfile.TemporaryDirectory() as folder:
        rows = _compare(Path(folder), options.model, device, num_images, options.repeats)
    finish("against_naive", rows, options.save)


def _compare(root: Path, model: str, device: torch.device, num_images: int, repeats: int) -> list[Row]:
    workers = min(num_cores(), num_images)
    # DataLoader hands whole tars to its workers, and webdataset stops where one gets none.
    urls = write_corpus(root / "tars", num_images, shard_images=num_images // workers)
    spec = ModelSpec(name=model, random_init=None if model == "demo" else 0)
    loop = _Loop(load_model(spec), urls, device, workers)
    ours = _Ours(spec, urls, device, root)
    seconds = _in_turns(
        {
            "fp32": lambda: loop.run(root / "fp32", autocast=False),
            "bf16": lambda: loop.run(root / "bf16", autocast=True),
            "ours": ours.run,
        },
        repeats,
    )
    vectors = {
        "fp32": _loop_vectors(root / "fp32"),
        "bf16": _loop_vectors(root / "bf16"),
        "ours": our_vectors(ours.out),
    }
    names = {
        "fp32": "DataLoader loop, fp32",
        "bf16": "DataLoader loop, bf16 autocast",
        "ours": f"clipindex.embed, {ours.precision}",
    }
    rows: list[Row] = []
    for way, name in names.items():
        plain, centred = least_cosines(vectors[way], vectors["fp32"])
        rows.append(
            {
                "what": name,
                "model": model,
                "device": str(device),
                "images_per_s": round(num_images / seconds[way], 1),
                "of the fp32 loop": round(seconds["fp32"] / seconds[way], 2),
                "of the bf16 loop": round(seconds["bf16"] / seconds[way], 2),
                "cosine to the fp32 loop, least": round(plain, 6),
                "centred cosine, least": round(centred, 4),
            }
        )
    return rows


class _Loop:
    """What a tutorial shows, without its mistakes: pinned memory on CUDA, no gradients, features normalised in fp32."""

    def __init__(self, loaded: LoadedModel, urls: Sequence[str], device: torch.device, workers: int) -> None:
        self._model: open_clip.CLIP = loaded.model.to(device)
        asked = loaded.info.preprocess
        self._transform = image_transform_v2(
            PreprocessCfg(
                size=asked.size,
                mean=asked.mean,
                std=asked.std,
                interpolation=asked.interpolation,
                resize_mode=asked.resize_mode,
                fill_color=asked.fill_color,
            ),
            is_train=False,
        )
        self._urls = list(urls)
        self._device = device
        self._workers = workers

    def run(self, out: Path, *, autocast: bool) -> float:
        """Embed everything into OUT.npy, keys into OUT.json; seconds."""
        started = time.perf_counter()
        samples = webdataset.WebDataset(self._urls, shardshuffle=False).decode("pil")
        loader = DataLoader(
            samples.to_tuple("jpg", "__key__").map_tuple(self._transform),
            batch_size=BATCH_SIZES[self._device.type],
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
        )
        keys: list[str] = []
        parts: list[Float32Array] = []
        with torch.inference_mode(), torch.autocast(self._device.type, torch.bfloat16, enabled=autocast):
            for images, names in loader:
                features = self._encode(images)
                parts.append((features / features.norm(dim=-1, keepdim=True)).cpu().numpy())
                keys += names
        np.save(out.with_suffix(".npy"), np.concatenate(parts))
        out.with_suffix(".json").write_text(json.dumps(keys))
        return time.perf_counter() - started

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self._model.encode_image(images.to(self._device, non_blocking=True))
        return features.float()


class _Ours:
    """clipindex.embed with its defaults, into a new directory each time; the last one stays readable."""

    def __init__(self, spec: ModelSpec, urls: Sequence[str], device: torch.device, root: Path) -> None:
        self._spec = spec
        self._urls = urls
        self._device = device
        self._root = root
        self.out = root
        self.precision = ""

    def run(self) -> float:
        """Embed everything; seconds, the loading of the model apart."""
        self.out = Path(tempfile.mkdtemp(dir=self._root))
        summary = embed(
            self._urls,
            self.out,
            model=self._spec.name,
            random_init=self._spec.random_init,
            device=str(self._device),
        )
        self.precision = summary.precision
        return summary.seconds


def _in_turns(ways: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median seconds of each way, taken in turns so that a busy moment hits all alike; the first round warms up."""
    seconds: dict[str, list[float]] = {what: [] for what in ways}
    for _ in range(repeats + 1):
        for what, way in ways.items():
            seconds[what].append(way())
    return {what: statistics.median(taken[1:]) for what, taken in seconds.items()}


def _loop_vectors(out: Path) -> Vectors:
    keys: list[str] = json.loads(out.with_suffix(".json").read_text())
    return dict(zip(keys, np.load(out.with_suffix(".npy")), strict=True))


def our_vectors(folder: Path) -> Vectors:
    """The embeddings of one of our directories by key."""
    vectors: Vectors = {}
    for batch in read_embeddings(folder, columns=("key",)):
        vectors |= zip(batch.columns["key"].to_pylist(), batch.embedding.astype(np.float32), strict=True)
    return vectors


def least_cosines(found: Vectors, reference: Vectors) -> tuple[float, float]:
    """The least cosine of all rows to the reference's row of the same key, as they are and centred.

    Raises:
        SystemExit: The keys are not the same ones.
    """
    if found.keys() != reference.keys():
        raise SystemExit(f"{len(found.keys() ^ reference.keys())} keys are on one side only; the rates mean nothing")
    a: Float64Array = np.stack([found[key] for key in reference]).astype(np.float64)
    b: Float64Array = np.stack(list(reference.values())).astype(np.float64)
    return _least_cosine(a, b), _least_cosine(a - a.mean(axis=0), b - b.mean(axis=0))


def _least_cosine(a: Float64Array, b: Float64Array) -> float:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / norms).min())


if __name__ == "__main__":
    main()
