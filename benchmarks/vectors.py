"""Vectors like those of CLIP image towers, and embedding directories of them.

Real embeddings lie in a narrow cone (a common mean, with two random images at a cosine near 0.5), with a spectrum that
decays, in clusters of all sizes within clusters. Uniform noise has none of that, and no index finds anything in it.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from clipindex.store import ShardWriter, open_dataset
from clipindex.types import Float32Array, ModelInfo, ModelSpec, Preprocess, Sample, Shard, Vectors

DIM = 512
SHARD_ROWS = 20_000
BATCH = 256
INFO = ModelInfo(
    spec=ModelSpec(name="synthetic"),
    fingerprint="0" * 64,
    dim=DIM,
    preprocess=Preprocess(
        size=(224, 224), resize_mode="shortest", interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
    ),
    logit_scale=100.0,
    logit_bias=None,
)

_CLUSTERS = 2000
_WITHIN = 20
_MEAN, _BETWEEN, _AMONG, _OWN = 0.75, 0.45, 0.33, 0.33
"""Lengths of the common mean, of a cluster's, of a cluster's within it, and of an image's own part."""


def clip_like(number: int, seed: int) -> Float32Array:
    """Unit vectors [number, DIM]; of another seed, other images of the same world."""
    world = np.random.default_rng(12345)
    scale = (np.arange(1, DIM + 1) ** -0.5).astype(np.float32)
    scale /= np.linalg.norm(scale)
    axes = np.linalg.qr(world.normal(size=(DIM, DIM)))[0].astype(np.float32)
    clusters = world.normal(size=(_CLUSTERS, DIM)).astype(np.float32) * scale * _BETWEEN
    within = world.normal(size=(_CLUSTERS * _WITHIN, DIM)).astype(np.float32) * scale * _AMONG
    share = np.arange(1, _CLUSTERS + 1) ** -0.7
    rng = np.random.default_rng(seed)
    cluster = rng.choice(_CLUSTERS, number, p=share / share.sum())
    member = cluster * _WITHIN + (rng.random(number) ** 2 * _WITHIN).astype(int)
    own = rng.normal(size=(number, DIM)).astype(np.float32) * scale * _OWN
    raw = (clusters[cluster] + within[member] + own) @ axes + axes[0] * _MEAN
    unit: Float32Array = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    return unit


def shards_of(rows: int) -> Iterator[Float32Array]:
    """As many CLIP-like vectors, a shard at a time."""
    for seed, first in enumerate(range(0, rows, SHARD_ROWS)):
        yield clip_like(min(SHARD_ROWS, rows - first), seed)


def write_directory(root: Path, shards: Iterable[Float32Array]) -> None:
    """Publish vectors as an embedding job does, a shard each."""
    dataset = open_dataset(root, INFO, "float16", "benchmark")
    for at, vectors in enumerate(shards):
        shard = Shard(url=f"/synthetic/{at}.tar", name=f"synthetic-{at:05}", size=0, version="")
        writer = ShardWriter(root, shard, dataset)
        for first in range(0, len(vectors), BATCH):
            part = vectors[first : first + BATCH]
            samples = [
                Sample(key=f"{at}_{row}", member="", image=b"", tar_offset=0) for row in range(first, first + len(part))
            ]
            writer.append(samples, Vectors(part, np.ones(len(part), np.float32)), [(1, 1)] * len(part))
        writer.publish(samples=len(vectors), precision="fp32", decoder="exact", device="cpu", seconds=0.0)
