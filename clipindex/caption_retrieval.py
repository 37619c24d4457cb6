"""How well captions find their images and images their captions: retrieval recall as CLIP_benchmark defines it.

A caption is a line of a row's `caption` (`str.splitlines`), as in CLIP_benchmark's WebDataset form, where the lines of
`.txt` are the captions of an image, empty ones too. Instead of lists of the best, what is nearer than the right answer
is counted: that takes a few numbers for each caption and each image.
"""

import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from clipindex.atomic import atomic_write
from clipindex.devices import choose_device, choose_precision
from clipindex.encode import TextTower
from clipindex.errors import ModelError, StoreError, UsageError
from clipindex.metrics import retrieval_recall
from clipindex.models import load_model_of
from clipindex.products import multiply
from clipindex.store import EmbeddingBatch, check_cosines, read_dataset, read_embeddings
from clipindex.threads import map_in_order, num_cores
from clipindex.types import Float32Array, IntArray, ModelSpec, TextEncoder

METRICS_FILE = "metrics.json"
EMBEDDED_AT_ONCE = 1024
"""Captions between two reports of progress."""
CAPTIONS_AT_ONCE = 256
IMAGES_AT_ONCE = 4096
"""The cosines of a block are 4 MiB, which stay in the cache while they are counted."""
SAME = 1e-6
"""Cosines this near are one: sums of 512 products in float32, in another order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalSummary:
    """How well captions and images find each other; retrieval/metrics.json holds the same."""

    out: str
    """Where that lies."""
    model: str
    fingerprint: str
    images: int
    """Rows with captions: what is searched, and what searches."""
    captions: int
    empty_captions: int
    """Of those, lines without a letter: CLIP_benchmark counts them, and hardly one is ever found."""
    rows_without_captions: int
    """Left out."""
    metrics: dict[str, float]
    """By CLIP_benchmark's names: `image_retrieval_recall@k`, the share of captions whose image is among the k nearest
    to them, and `text_retrieval_recall@k`, the share of images with a caption of theirs among the k nearest."""
    seconds: float


class _Captions(NamedTuple):
    """All captions in order of their images, which are numbered through."""

    vectors: Float32Array
    """[U, D], of the distinct ones."""
    texts: IntArray
    """[T], places in `vectors`."""
    images: IntArray
    """[T], ascending."""
    own: Float32Array
    """[T], cosine to its image."""
    batches: list[tuple[str, int, int]]
    """Shard, first row, and images of each batch that was read."""
    rows: int
    """With or without captions."""
    empty: int


class _Ranks(NamedTuple):
    """For each query, answers nearer than its nearest right one, as near as that, and how many of those are right."""

    above: IntArray
    level: IntArray
    right: IntArray


class _Block(NamedTuple):
    """Images and captions that are compared at once."""

    images: torch.Tensor
    """Vectors [n, D]."""
    here: slice
    """Their places among all images."""
    there: slice
    """Those of the captions; the last ones' may end behind all."""


def measure_retrieval(
    folder: str | Path,
    *,
    k: Sequence[int] = (1, 5, 10),
    model: ModelSpec | None = None,
    device: str = "auto",
    precision: str = "auto",
    on_captions: Callable[[int], None] = lambda num_captions: None,
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> RetrievalSummary:
    """Measure text -> image and image -> text recall@k over the rows of a directory that have captions.

    Memory: some 200 bytes a caption. Vectors of captions lie in a nameless file in `folder` meanwhile.

    Args:
        folder: The embedding directory; its retrieval/metrics.json is written.
        k: How far down to look.
        model: How to load the model, where the directory's record does not lead to its weights on this machine.
        device: Where to run the text tower, and to compare.
        precision: Of the text tower; cosines are float32.
        on_captions: Called with the number of distinct captions that are embedded.
        on_images: Called with the number of images that are compared with all captions, and of all images.

    Raises:
        UsageError: A k is below 1, or there is none.
        StoreError: No row has a caption, or a file is damaged.
        FingerprintError: The embeddings are not of `model`.
    """
    if not k or min(k) < 1:
        raise UsageError(f"k {', '.join(map(str, k)) or 'of nothing'}: give numbers from 1")
    started = time.perf_counter()
    folder = Path(folder)
    dataset = read_dataset(folder)
    where = choose_device(device)
    precision = choose_precision(precision, where)
    tower = TextTower(load_model_of(folder, dataset.model, model), device=where, precision=precision)
    with tempfile.TemporaryFile(dir=folder) as file:
        captions = _embed_captions(folder, tower, file, on_captions)
        by_text, by_image = _rank(folder, captions, where, on_images)
    metrics = {f"image_retrieval_recall@{at}": retrieval_recall(*by_text, at) for at in sorted(set(k))}
    metrics |= {f"text_retrieval_recall@{at}": retrieval_recall(*by_image, at) for at in sorted(set(k))}
    summary = RetrievalSummary(
        out=str(folder / "retrieval"),
        model=dataset.model.spec.name,
        fingerprint=dataset.model.fingerprint,
        images=len(by_image.above),
        captions=len(captions.texts),
        empty_captions=captions.empty,
        rows_without_captions=captions.rows - len(by_image.above),
        metrics=metrics,
        seconds=round(time.perf_counter() - started, 3),
    )
    with atomic_write(folder / "retrieval" / METRICS_FILE) as metrics_file:
        metrics_file.write(json.dumps(asdict(summary), indent=2).encode() + b"\n")
    return summary


def _embed_captions(folder: Path, tower: TextEncoder, file: BinaryIO, on_captions: Callable[[int], None]) -> _Captions:
    """Embed each distinct caption once, into the file: copies of one text must have one cosine."""
    places: dict[bytes, int] = {}
    texts, images, own = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    batches: list[tuple[str, int, int]] = []
    rows = num_images = empty = 0
    for batch in read_embeddings(folder, ("caption",)):
        check_cosines(batch, np.square(batch.embedding.astype(np.float32)).sum(axis=1))
        lines = [(row, line) for row, captions in _captioned(batch) for line in captions]
        of = np.array([row for row, _ in lines], np.int64)
        distinct = {_digest(line): line for _, line in lines}
        new = {digest: line for digest, line in distinct.items() if digest not in places}
        _append_vectors(file, tower, list(new.values()), len(places), on_captions)
        places.update(zip(new, range(len(places), len(places) + len(new)), strict=True))
        texts.append(np.array([places[_digest(line)] for _, line in lines], np.int64))
        found, numbers = np.unique(of, return_inverse=True)
        images.append(numbers + num_images)
        own.append(_own_cosines(batch, of, _mapped(file, len(places), tower.info.dim), texts[-1]))
        batches.append((batch.shard.name, batch.first_row, len(found)))
        empty += sum(not line.strip() for _, line in lines)
        num_images += len(found)
        rows += len(batch.embedding)
    if not num_images:
        raise StoreError(f"{folder}: none of {rows:,} rows has a caption; they come from the .txt members of tars")
    vectors = _mapped(file, len(places), tower.info.dim)
    joined = [np.concatenate(each) for each in (texts, images)]
    return _Captions(vectors, joined[0], joined[1], np.concatenate(own), batches, rows, empty)


def _captioned(batch: EmbeddingBatch) -> Iterator[tuple[int, list[str]]]:
    """Rows with captions, and those."""
    column: pa.Array = batch.columns["caption"]
    for row, caption in enumerate(column.to_pylist()):
        if caption:
            yield row, caption.splitlines()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _append_vectors(
    file: BinaryIO, tower: TextEncoder, texts: Sequence[str], before: int, on_captions: Callable[[int], None]
) -> None:
    for first in range(0, len(texts), EMBEDDED_AT_ONCE):
        vectors = tower.encode(texts[first : first + EMBEDDED_AT_ONCE])
        if not np.isfinite(vectors).all():  # nothing would be above it
            raise ModelError("the text tower gives numbers that are none; give --precision fp32")
        file.write(vectors.tobytes())
        on_captions(before + min(first + EMBEDDED_AT_ONCE, len(texts)))
    file.flush()


def _mapped(file: BinaryIO, number: int, dim: int) -> Float32Array:
    if not number:  # nothing can be mapped
        return np.empty((0, dim), np.float32)
    return np.memmap(file, np.float32, "r", shape=(number, dim))


def _own_cosines(batch: EmbeddingBatch, rows: IntArray, vectors: Float32Array, texts: IntArray) -> Float32Array:
    parts = [
        np.einsum("td,td->t", batch.embedding[rows[at]].astype(np.float32), vectors[texts[at]])
        for at in np.array_split(np.arange(len(rows)), len(rows) // IMAGES_AT_ONCE + 1)
    ]
    return np.concatenate(parts)


def _rank(
    folder: Path, captions: _Captions, device: torch.device, on_images: Callable[[int, int], None]
) -> tuple[_Ranks, _Ranks]:
    """Compare every caption with every image: ranks of captions' images, and of images' captions."""
    own = torch.from_numpy(captions.own)
    starts = np.flatnonzero(np.diff(captions.images, prepend=-1))
    best = torch.from_numpy(np.maximum.reduceat(captions.own, starts))
    text_counts, image_counts = (torch.zeros(2, len(each), dtype=torch.int64) for each in (own, best))

    def compare(block: _Block) -> tuple[_Block, torch.Tensor, torch.Tensor]:
        texts = torch.from_numpy(captions.vectors[captions.texts[block.there]]).to(device)
        scores = multiply(texts, block.images.to(device).T)
        by_text = _count(scores, own[block.there, None].to(device), dim=1)
        return block, by_text, _count(scores, best[block.here].to(device), dim=0)

    at_once = num_cores() if device.type == "cpu" else 1
    with contextlib.closing(map_in_order(compare, _blocks(folder, captions), at_once)) as compared:
        for block, by_text, by_image in compared:
            text_counts[:, block.there] += by_text
            image_counts[:, block.here] += by_image
            if block.there.stop >= len(own):
                on_images(block.here.stop, len(best))
    right = np.add.reduceat((captions.own >= np.repeat(best.numpy(), np.diff([*starts, len(own)])) - SAME), starts)
    return _ranks(text_counts.numpy(), np.ones(len(own), np.int64)), _ranks(image_counts.numpy(), right)


def _blocks(folder: Path, captions: _Captions) -> Iterator[_Block]:
    done = 0
    for images in _image_vectors(folder, captions):
        here = slice(done, done + len(images))
        for first in range(0, len(captions.texts), CAPTIONS_AT_ONCE):
            yield _Block(images, here, slice(first, first + CAPTIONS_AT_ONCE))
        done += len(images)


def _image_vectors(folder: Path, captions: _Captions) -> Iterator[torch.Tensor]:
    """Vectors [n, D] of all images with captions, in order.

    Raises:
        StoreError: They are others than before.
    """
    names = list(dict.fromkeys(name for name, _, _ in captions.batches))
    expected = iter([*captions.batches, None])
    for batch in read_embeddings(folder, ("caption",), names):
        rows = [row for row, _ in _captioned(batch)]
        if (batch.shard.name, batch.first_row, len(rows)) != next(expected, None):
            raise StoreError(f"shard {batch.shard.name} changed while it was read; run again")
        for first in range(0, len(rows), IMAGES_AT_ONCE):
            yield torch.from_numpy(batch.embedding[rows[first : first + IMAGES_AT_ONCE]]).float()
    if next(expected) is not None:
        raise StoreError(f"{folder}: shards changed while they were read; run again")


def _count(scores: torch.Tensor, right: torch.Tensor, dim: int) -> torch.Tensor:
    """How many scores [t, n] are above those of right answers, and how many at least as high: [2, n or t]."""
    hits = torch.empty_like(scores)  # sums of float32 run ten times as fast as those of booleans
    above = torch.gt(scores, right + SAME, out=hits).sum(dim)
    reached = torch.ge(scores, right - SAME, out=hits).sum(dim)
    return torch.stack([above, reached]).long().cpu()


def _ranks(counts: IntArray, right: IntArray) -> _Ranks:
    above, reached = counts
    return _Ranks(above, np.maximum(reached - above, right), right)
