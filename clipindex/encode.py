"""One tower of a model on a device: uint8 pixels or texts in, unit vectors out."""

import logging
import sys
from collections.abc import Callable, Sequence

import numpy as np
import open_clip
import torch
from torch import nn

from clipindex.devices import PRECISIONS, stopwatch
from clipindex.errors import ModelError, UsageError, first_line
from clipindex.models import LoadedModel, Project, cut_projection
from clipindex.towers import placed, use_fast_layers
from clipindex.types import Encoding, Float32Array, UInt8Array, Vectors

log = logging.getLogger(__name__)

_EXHAUSTED = ("CUDA error: out of memory", "_STATUS_ALLOC_FAILED", "unable to find an engine", "DefaultCPUAllocator")
"""Of plain RuntimeErrors for want of memory: the driver's, cuBLAS's and cuDNN's for their workspaces, and a CPU's."""
_TEXT_BATCH = 256
_TEXT_LENGTH_STEP = 16  # tokens; few shapes, so that similar texts are computed alike


class ImageTower:
    """The image tower of a model on a device; the text tower is let go.

    Args:
        loaded: The model. Some of its tensors may be shared, most are copied: whoever lets it go frees memory.
        device: Where to run.
        precision: Of the weights: 'bf16', 'fp16' or 'fp32'.
        with_pre_projection: Whether the features before the projection are wanted beside those after it.
    """

    def __init__(
        self, loaded: LoadedModel, *, device: torch.device, precision: str, with_pre_projection: bool = False
    ) -> None:
        self.info = loaded.info
        self.device = str(device)
        self.precision = precision
        self._device = device
        self._dtype = PRECISIONS[precision]
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._fitting = sys.maxsize
        """Images at once that did not exhaust the device's memory."""
        self._tower = placed(loaded.model.get_submodule("visual"), device, self._dtype)
        self._project: Project | None = None
        if with_pre_projection or loaded.info.features == "pre-projection":
            projection = cut_projection(self._tower)
            self._project = projection if with_pre_projection else None
        use_fast_layers(self._tower, device, self._dtype)
        preprocess = loaded.info.preprocess
        # Of a row of pixels: a CPU takes four times as long where the innermost dimension is the three channels.
        mean, std = (
            torch.tensor(v, device=device).repeat(preprocess.size[1]) for v in (preprocess.mean, preprocess.std)
        )
        # (x / 255 - mean) / std as one multiply-add
        self._scale, self._shift = 1 / (255 * std), -mean / std

    def new_batch(self, size: int) -> UInt8Array:
        """Memory for images, uint8 [size, H, W, 3]: pinned where the device is CUDA, which copies from it unwaited."""
        shape = (size, *self.info.preprocess.size, 3)
        if self._device.type != "cuda":
            return np.zeros(shape, np.uint8)  # PyTorch's would have OpenMP's threads for the caller's
        memory: UInt8Array = torch.zeros(shape, dtype=torch.uint8, pin_memory=True).numpy()
        return memory

    def encode(self, images: UInt8Array) -> Vectors:
        """Embed images, uint8 RGB [N, H, W, 3] of the model's size; as `begin`, and wait for it."""
        return self.begin(images)().vectors

    @torch.inference_mode()
    def begin(self, images: UInt8Array) -> Callable[[], Encoding]:
        """Begin to embed images, halving how many go at once while the device's memory is too small.

        On a CUDA device nothing waits where the images' memory is pinned: while one batch is computed, the next is
        copied there and its work lined up, so that the device always has some. On a CPU all is done at once.

        Args:
            images: uint8 RGB [N, H, W, 3] of the model's size, which have to stay as they are until the result is
                there.

        Returns:
            Waits for the embeddings; not-a-number passes through and shows in the norms.

        Raises:
            ModelError: the tower gives something other than one vector an image.
            UsageError: the device's memory is too small for one.
        """
        if not len(images):
            nothing = Vectors(np.empty((0, self.info.dim), np.float32), np.empty(0, np.float32))
            return lambda: Encoding(nothing, 0.0)
        while True:
            try:
                return self._begin(images)
            except RuntimeError as error:
                if not _is_exhaustion(error):
                    raise
                failed = error.with_traceback(None)  # whose frames hold what was computed by then
            self._halve(len(images), failed)

    def _begin(self, images: UInt8Array) -> Callable[[], Encoding]:
        size = min(self._fitting, len(images))
        pixels = self._copied(images[:size])
        stop = stopwatch(self._device)
        parts = [self._embed(pixels)]
        parts += [self._embed(self._copied(images[at : at + size])) for at in range(size, len(images), size)]
        columns = [torch.cat(column).to("cpu", non_blocking=True) for column in zip(*parts, strict=True)]
        seconds = stop()

        def finish() -> Encoding:
            passed = seconds()  # until then nothing is in the columns
            return Encoding(_vectors(columns), passed)

        return finish

    def _halve(self, wanted: int, error: RuntimeError) -> None:
        tried = min(self._fitting, wanted)
        if tried == 1:
            remedy = f"free some, or take another device ({first_line(error)})"
            raise UsageError(f"{self.device} has no memory for one image; {remedy}") from error
        self._fitting = tried // 2
        torch.cuda.empty_cache()
        log.warning("%s has no memory for %d images at once: going on with %d", self.device, tried, self._fitting)

    def _copied(self, images: UInt8Array) -> torch.Tensor:
        # from_numpy warns of read-only memory; only such arrays are copied here.
        pixels = torch.from_numpy(np.require(images, np.uint8, ["C", "W"]))
        if self._copies is None:
            return pixels
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copies):
            there = pixels.to(self._device, non_blocking=pixels.is_pinned())
        computing.wait_stream(self._copies)
        there.record_stream(computing)  # or the allocator gave its memory to the next copy, while it is read
        return there

    def _embed(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Unit vectors and norms; where they are wanted, those of the features before the projection too."""
        rows = pixels.flatten(2).to(torch.float32)
        normal = torch.addcmul(self._shift, rows, self._scale).to(self._dtype).view(pixels.shape)
        # NHWC read as NCHW is channels_last, the order in which convolutions are fastest: no transposition.
        pooled = _pooled(self._tower(normal.permute(0, 3, 1, 2)))
        if self._project is None:
            return _unit(pooled, self.info.dim)
        return _unit(self._project(pooled), self.info.dim) + _unit(pooled, pooled.shape[-1])


class TextTower:
    """The text tower of a model on a device; the image tower is let go.

    Args:
        loaded: The model. Some of its tensors may be shared, most are copied: whoever lets it go frees memory.
        device: Where to run.
        precision: Of the weights: 'bf16', 'fp16' or 'fp32'.

    Raises:
        ModelError: the model has none.
    """

    def __init__(self, loaded: LoadedModel, *, device: torch.device, precision: str) -> None:
        if not loaded.info.has_texts:
            remedy = (
                "embed with --features projected or both"
                if loaded.info.features == "pre-projection"
                else "a backbone knows no texts, a CLIP model does"
            )
            raise ModelError(
                f"{loaded.info.spec.name}: its embeddings are {loaded.info.features} features, which share no space"
                f" with texts; {remedy}. Rows are found by --image and --key all the same"
            )
        self.info = loaded.info
        self._device = device
        self._tokenize = loaded.tokenize
        others = [module for name, module in loaded.model.named_children() if name in ("visual", "text_decoder")]
        self._model: open_clip.CLIP = placed(loaded.model, device, PRECISIONS[precision], without=others)
        self._text: nn.Module = getattr(self._model, "text", self._model)
        self._context = _causal_context(self._text)
        use_fast_layers(self._text, device, PRECISIONS[precision])

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Float32Array:
        """Embed texts as unit vectors, float32 [N, D], in batches of fixed size.

        Raises:
            ModelError: the model's tokenizer cannot be loaded.
        """
        if not len(texts):
            return np.empty((0, self.info.dim), np.float32)
        parts = []
        for start in range(0, len(texts), _TEXT_BATCH):
            tokens = self._shortened(self._tokenize(texts[start : start + _TEXT_BATCH]))
            features = self._model.encode_text(tokens.to(self._device), normalize=False)
            parts.append(_unit(_pooled(features), self.info.dim)[0])
        return torch.cat(parts).cpu().numpy()

    def _shortened(self, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens up to the longest text's end: under a causal mask nothing after it reaches the pooled token.

        A prompt of ten tokens otherwise costs the 77 of the context.
        """
        if self._context is None:
            return tokens
        mask, positions = self._context
        longest = int(tokens.argmax(1).max()) + 1
        length = min(-(-longest // _TEXT_LENGTH_STEP) * _TEXT_LENGTH_STEP, len(positions))
        self._text.attn_mask = mask[:length, :length]
        self._text.positional_embedding = nn.Parameter(positions[:length], requires_grad=False)
        return tokens[:, :length]


def _is_exhaustion(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _EXHAUSTED)


def _vectors(columns: Sequence[torch.Tensor]) -> Vectors:
    unit, norms, *before = (column.numpy() for column in columns)
    return Vectors(unit, norms, Vectors(before[0], before[1]) if before else None)


def _pooled(features: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    # CoCa's towers also give their tokens.
    return features[0] if isinstance(features, tuple) else features


def _unit(pooled: torch.Tensor, dim: int) -> list[torch.Tensor]:
    """Unit vectors and norms, float32 [N, D] and [N], where `pooled` is."""
    if pooled.ndim != 2 or pooled.shape[1] != dim:
        raise ModelError(
            f"the tower gives {list(pooled.shape)} instead of [N, {dim}]: it is not pooled to one vector; "
            "use a model whose pool_type is not 'none'"
        )
    raw = pooled.to(torch.float32)
    norms = torch.linalg.vector_norm(raw, dim=1)
    unit = raw / norms.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return [unit, norms]


def _causal_context(text: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mask and position embeddings of a tower that pools at the highest token and looks back only, else None."""
    pooling = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
    mask, positions = getattr(text, "attn_mask", None), getattr(text, "positional_embedding", None)
    if pooling != "argmax" or mask is None or positions is None or getattr(text, "cls_emb", None) is not None:
        return None
    return mask, positions.detach()
