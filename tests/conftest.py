"""Fixtures that several test modules share."""

import hashlib
import os
import time

import numpy as np
import pytest

from clipindex.types import Encoding, ModelInfo, ModelSpec, Preprocess, Vectors

# PyTorch's and FAISS's threads that wait for each other do so asleep, here and in every process that a test starts:
# spinning, they take a machine's cores from each other and from whatever else runs. Read when those are first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

CUDA = "cuda"
DEVICES = ["cpu", pytest.param(CUDA, marks=pytest.mark.cuda)]
"""For tests of what is the same on both; where there is no CUDA device, tests with the mark are skipped."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


class PixelEncoder:
    """A stand-in tower whose embedding is the image itself, shrunk: fast, and it tells images apart."""

    device = "cpu"
    precision = "fp32"

    def __init__(self, size=32, seed=0):
        preprocess = Preprocess(
            size=(size, size), resize_mode="shortest", interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
        )
        self.info = ModelInfo(
            spec=ModelSpec(name="pixels", random_init=seed),
            fingerprint=hashlib.sha256(str(seed).encode()).hexdigest(),
            dim=48,
            preprocess=preprocess,
            logit_scale=100.0,
            logit_bias=None,
        )

    def new_batch(self, size):
        return np.zeros((size, *self.info.preprocess.size, 3), np.uint8)

    def encode(self, images):
        size = self.info.preprocess.size[0] // 4
        blocks = images.reshape(len(images), 4, size, 4, size, 3).astype(np.float32).mean(axis=(2, 4))
        raw = blocks.reshape(len(images), -1) / 255
        norms = np.linalg.norm(raw, axis=1)
        return Vectors(raw / np.maximum(norms, 1e-12)[:, None], norms)

    def begin(self, images):
        started = time.perf_counter()
        encoding = Encoding(self.encode(images), time.perf_counter() - started)
        return lambda: encoding


@pytest.fixture
def pixel_encoder():
    return PixelEncoder()
