"""Embedding directories whose features are as a CLIP encoder's: long common mean, decaying spectrum, noisy labels."""

import hashlib

import numpy as np

from clipindex.store import ShardWriter, open_dataset
from clipindex.types import ModelInfo, ModelSpec, Preprocess, Sample, Shard, Vectors


def model(dim, seed=0):
    preprocess = Preprocess(
        size=(32, 32), resize_mode="shortest", interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    return ModelInfo(
        spec=ModelSpec(name="synthetic", random_init=seed),
        fingerprint=hashlib.sha256(f"synthetic {seed}".encode()).hexdigest(),
        dim=dim,
        preprocess=preprocess,
        logit_scale=100.0,
        logit_bias=None,
    )


def features(rows, dim=32, classes=7, seed=0, noise=0.1):
    """Raw features [rows, dim] of norm about 10, and labels [rows]; the classes are the same whatever the seed."""
    fixed, rng = np.random.default_rng(1), np.random.default_rng(seed + 2)
    spectrum = np.arange(1, dim + 1) ** -0.6
    spectrum /= np.linalg.norm(spectrum)
    basis = np.linalg.qr(fixed.normal(size=(dim, dim)))[0]
    mean = fixed.normal(size=dim)
    mean *= 7 / np.linalg.norm(mean)
    centres = fixed.normal(size=(classes, dim)) * spectrum * 2.5
    labels = rng.integers(0, classes, rows)
    raw = (centres[labels] + rng.normal(size=(rows, dim)) * spectrum * 5.5) @ basis + mean
    mixed = rng.random(rows) < noise
    labels[mixed] = rng.integers(0, classes, mixed.sum())
    return raw.astype(np.float32), labels


def write_directory(folder, raw, labels, keys=None, *, info=None, shards=2, dtype="float16"):
    """An embedding directory of raw features [n, D] and labels [n], where None is no label and tuples are lists.

    Keys are row numbers by default; shards a number of them, or names with the rows of each in the order to be stored.
    """
    dataset = open_dataset(folder, info or model(raw.shape[1]), dtype, "test")
    norms = np.linalg.norm(raw, axis=1).astype(np.float32)
    if isinstance(shards, int):
        parts = np.array_split(np.arange(len(raw)), shards)
        shards = {f"synthetic-{at}": rows for at, rows in enumerate(parts)}
    for name, rows in shards.items():
        shard = Shard(url=f"/synthetic/{name}.tar", name=name, size=0, version="")
        writer = ShardWriter(folder, shard, dataset)
        samples = [
            Sample(
                key=f"{row}" if keys is None else keys[row],
                member=f"{row}.jpg",
                image=b"",
                tar_offset=0,
                label=None if labels[row] is None or isinstance(labels[row], tuple) else int(labels[row]),
                labels=labels[row] if isinstance(labels[row], tuple) else None,
            )
            for row in rows
        ]
        writer.append(
            samples, Vectors((raw[rows] / norms[rows, None]).astype(np.float32), norms[rows]), [(1, 1)] * len(rows)
        )
        writer.publish(samples=len(rows), precision="fp32", decoder="exact", device="cpu", seconds=0.0)
    return folder


def read_back(folder, kind="raw"):
    """Features [n, D] as a probe sees them, and labels, None where there is none."""
    from clipindex.store import read_embeddings

    batches = list(read_embeddings(folder, ("norm", "label")))
    unit = np.concatenate([batch.embedding for batch in batches]).astype(np.float32)
    norms = np.concatenate([batch.columns["norm"].to_numpy() for batch in batches])
    labels = [label for batch in batches for label in batch.columns["label"].to_pylist()]
    return unit * norms[:, None] if kind == "raw" else unit, labels
