"""Records that one stage hands to the next.

Shapes: N images of a batch, H x W target pixels, D embedding dimensions, C classes, K neighbours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
UInt8Array = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """How an encoded image becomes the pixels that a model was trained on."""

    size: tuple[int, int]
    """Target height and width in pixels."""
    resize_mode: str
    """open_clip's names: 'shortest' (resize, then centre crop), 'longest' (resize, then pad) or 'squash'."""
    interpolation: str
    """'bicubic' or 'bilinear'; always antialiased."""
    mean: tuple[float, float, float]
    """Per channel, of pixels scaled to [0, 1]."""
    std: tuple[float, float, float]
    """Per channel, of pixels scaled to [0, 1]."""
    fill_color: int = 0
    """Grey level that 'longest' pads with."""
    resize_size: tuple[int, int] | None = None
    """Of timm's transform, which makes images RGB first: what they are resized to before the centre crop, as `size`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """What a user says to name a model."""

    name: str
    """open_clip architecture, 'hf-hub:ORG/REPO', 'local-dir:PATH', a directory, 'timm:BACKBONE', or 'demo'."""
    pretrained: str | None = None
    """Tag of open_clip's or timm's, or local weights file; only beside an architecture name."""
    random_init: int | None = None
    """Seed of random weights, in place of trained ones."""
    quick_gelu: bool | None = None
    """Activation of weights whose own config does not tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """What every embedding of a model shares; stored beside the embeddings."""

    spec: ModelSpec
    """How the model was asked for; enough to load it again."""
    fingerprint: str
    """Hex digest of architecture, weights, preprocessing and kind of features; not of precision, decoder or device."""
    dim: int
    """D, dimensions of the embeddings."""
    preprocess: Preprocess
    """The transform that belongs to the weights."""
    logit_scale: float
    """Multiplies a cosine to give a logit (already exponentiated)."""
    logit_bias: float | None
    """Added to the logits of sigmoid (SigLIP) models; None for softmax models."""
    features: str = "projected"
    """What an image's embedding is: 'projected' into the space shared with texts, 'pre-projection', that is before the
    tower's last linear layer, or 'pooled', of a backbone that knows no texts."""

    @property
    def has_texts(self) -> bool:
        """Whether the embeddings lie in one space with those of texts."""
        return self.features == "projected"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One tar of a corpus, or one file of vectors to import, as it was when the job began."""

    url: str
    """Absolute path, or URL."""
    name: str
    """Stem of the files that its rows are published under: unique and stable, derived from the URL."""
    size: int
    """Bytes; 0 where the server does not tell."""
    version: str
    """Changes with the content: 'mtime:NS' or 'etag:…'; empty where nothing is known."""


class Sample(NamedTuple):
    """All members of a tar with one key, with the image still encoded; a tuple, since millions are made."""

    key: str
    """Member name up to the first dot of its last component."""
    member: str
    """Name of the image member."""
    image: bytes
    """The encoded image, as it lies in the tar."""
    tar_offset: int | None
    """Where the image's bytes begin in the tar; None in a compressed tar, where no seek leads there."""
    label: int | None = None
    """From `.cls`."""
    caption: str | None = None
    """From `.txt`."""
    meta: str | None = None
    """From `.json`, not parsed."""
    labels: tuple[int, ...] | None = None
    """Of a sample with any number of classes, ascending: from `.npy`, or from a list in `.cls` or `.json`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """A sample that did not become a row, and why."""

    key: str
    member: str
    """The member at fault, or the first one of the sample."""
    stage: str
    """'tar', 'decode', 'encode' or 'label'."""
    reason: str
    """One line for a person."""
    tar_offset: int | None


class Vectors(NamedTuple):
    """Embeddings of N images."""

    unit: Float32Array
    """Unit vectors [N, D]."""
    norms: Float32Array
    """Their lengths before normalising [N]."""
    pre_projection: "Vectors | None" = None
    """The same of the features before the projection, where they were asked for."""

    def take(self, rows: list[int]) -> "Vectors":
        """Those of some images."""
        before = self.pre_projection
        return Vectors(self.unit[rows], self.norms[rows], None if before is None else before.take(rows))


class Encoding(NamedTuple):
    """What an encoder made of a batch."""

    vectors: Vectors
    seconds: float
    """That the device was at work on it."""


class ImageEncoder(Protocol):
    """The image tower on a device, as the pipeline sees it; one thread uses it."""

    info: ModelInfo
    device: str
    """As 'cpu' or 'cuda:1'."""
    precision: str
    """Of the weights: 'bf16', 'fp16' or 'fp32'."""

    def new_batch(self, size: int) -> UInt8Array:
        """Memory for images, uint8 [size, H, W, 3], from which the device copies fastest."""
        ...

    def encode(self, images: UInt8Array) -> Vectors:
        """Embed uint8 RGB images [N, H, W, 3]."""
        ...

    def begin(self, images: UInt8Array) -> Callable[[], Encoding]:
        """Begin to embed images, whose memory has to stay as it is until what is returned has been called.

        That waits until they are done; further batches may be begun before.
        """
        ...


class TextEncoder(Protocol):
    """The text tower on a device, as the classifier sees it."""

    info: ModelInfo

    def encode(self, texts: Sequence[str]) -> Float32Array:
        """Embed texts as unit vectors [N, D]."""
        ...
