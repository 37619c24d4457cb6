"""Fixtures that several test modules share."""

import hashlib

import numpy as np
import pytest

from clipindex.types import ModelInfo, ModelSpec, Preprocess, Vectors


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


@pytest.fixture
def pixel_encoder():
    return PixelEncoder()
