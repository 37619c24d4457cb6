"""Embedding directories out of vectors, written by the store."""

import numpy as np
from conftest import PixelEncoder

from clipindex.store import ShardWriter, open_dataset
from clipindex.types import Sample, Shard, Vectors

INFO = PixelEncoder().info


def clustered(number, seed=0, dim=INFO.dim, num_clusters=60, spread=0.35):
    """Unit vectors [n, D] about a common mean, in clusters of very different sizes."""
    shape = np.random.default_rng(99)
    scale = np.arange(1, dim + 1) ** -0.4
    centres = shape.normal(size=(num_clusters, dim)) * scale + 1.0
    rng = np.random.default_rng(seed)
    chosen = (rng.random(number) ** 2 * num_clusters).astype(int)
    raw = centres[chosen] + rng.normal(size=(number, dim)) * scale * spread
    return (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)


def write_shard(folder, name, vectors, version="mtime:1", dtype="float16", sizes=None, caption=None, info=INFO):
    """Publish one shard; keys are NAME-ROW, labels the row modulo ten."""
    dataset = open_dataset(folder, info, dtype, "test")
    writer = ShardWriter(folder, Shard(url=f"/data/{name}.tar", name=name, size=9, version=version), dataset)
    for first in range(0, len(vectors), 5000):
        part = vectors[first : first + 5000]
        samples = [
            Sample(key=f"{name}-{at}", member="x.jpg", image=b"", tar_offset=512 * at, label=at % 10,
                   caption=caption and caption(at))
            for at in range(first, first + len(part))
        ]  # fmt: skip
        shapes = [(64, 48)] * len(part) if sizes is None else sizes[first : first + 5000]
        writer.append(samples, Vectors(part, np.ones(len(part), np.float32)), shapes)
    writer.publish(samples=len(vectors), precision="fp32", decoder="exact", device="cpu", seconds=1.0)


def write_directory(folder, number=6000, num_shards=3, **options):
    """Some shards of clustered vectors; returns all of them, in the order of the shards."""
    parts = [clustered(number // num_shards, seed=at) for at in range(num_shards)]
    for at, part in enumerate(parts):
        write_shard(folder, f"s{at}", part, **options)
    return np.concatenate(parts)
