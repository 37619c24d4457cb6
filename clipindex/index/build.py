"""Vectors into a FAISS index: trained on a sample, filled in bounded memory."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import faiss
import numpy as np
import torch

from clipindex.atomic import create_temporary
from clipindex.errors import StoreError
from clipindex.index.kmeans import nearest_centroids, train_centroids
from clipindex.index.lists import Mask, write_lists
from clipindex.index.plan import HNSW_NEIGHBOURS, Plan
from clipindex.types import Float32Array

PART_BYTES = 1 << 30
"""Lists in memory are written out as a part at this size."""
SAMPLE_ROWS_A_LIST = 50
"""To train on; FAISS asks for 39 to 256."""
SAMPLE_BYTES = 1 << 30
"""And no more than this."""
ENCODER_ROWS = 16_384
"""To train quantizers of values on: 64 for each of their 256 centroids. Four times as many take four times as long and
win under a hundredth of recall, which ranking again by the embeddings themselves makes up for."""
PQ_ITERATIONS = 12


def sample_rows(plan: Plan, rows: int, item_bytes: int) -> int:
    """How many rows, of numbers of so many bytes, to train on."""
    wanted = max(SAMPLE_ROWS_A_LIST * plan.num_lists, ENCODER_ROWS)
    return min(rows, max(plan.num_lists, min(wanted, SAMPLE_BYTES // (item_bytes * plan.dim))))


def train_index(
    plan: Plan,
    sample: np.ndarray[Any, Any],
    *,
    device: str,
    dtype: torch.dtype,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> faiss.Index:
    """An empty index, ready for vectors.

    Args:
        plan: What to build.
        sample: Unit vectors [n, D], of any float type; not looked at for flat and hnsw.
        device: Where to find centroids.
        dtype: Of the products by which they are found.
        seed: Of the centroids.
        on_progress: Called with the steps that are done, and their number.
    """
    if plan.kind == "flat":
        return faiss.IndexFlatIP(plan.dim)
    if plan.kind == "hnsw":
        # From the float16 that embeddings are stored as nothing is lost.
        return faiss.IndexHNSWSQ(plan.dim, faiss.ScalarQuantizer.QT_fp16, HNSW_NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
    centroids = train_centroids(sample, plan.num_lists, device=device, dtype=dtype, seed=seed, on_progress=on_progress)
    chosen = np.random.default_rng(seed).permutation(len(sample))[:ENCODER_ROWS]
    vectors = np.ascontiguousarray(sample[chosen], np.float32)
    return _product_index(plan, centroids, vectors) if plan.kind == "ivfpq" else _scalar_index(plan, centroids, vectors)


def ivf_of(index: faiss.Index) -> Any:  # noqa: ANN401 - an IndexIVF
    """The index of inverted lists in an index; None where it has none."""
    found = faiss.try_extract_index_ivf(index)
    return None if found is None else faiss.downcast_index(found)


class Filler:
    """Adds vectors to a trained index. `lists` or leaving the context ends it; part files go with it."""

    def __init__(self, index: faiss.Index, folder: Path, *, device: str, dtype: torch.dtype) -> None:
        self._index = index
        self._folder = folder
        self._device = device
        self._dtype = dtype
        self._parts: list[tuple[Path, BinaryIO]] = []
        self._before: faiss.InvertedLists | None = None
        self._held_bytes = 0
        self._ivf = ivf_of(index)
        if self._ivf is not None:
            quantizer = faiss.downcast_index(self._ivf.quantizer)
            self._centroids = torch.from_numpy(quantizer.reconstruct_n(0, self._ivf.nlist)).to(device, dtype)
            self._before = _exchange_lists(self._ivf, self._empty_lists())

    def __enter__(self) -> "Filler":
        return self

    def __exit__(self, *_: object) -> None:
        for path, file in self._parts:
            file.close()
            path.unlink(missing_ok=True)

    def add(self, vectors: np.ndarray[Any, Any], first_id: int) -> None:
        """Add unit vectors [n, D] of any float type; their ids count on from `first_id`."""
        wide = torch.from_numpy(vectors).to(torch.float32).numpy()
        if self._ivf is None:
            assert first_id == self._index.ntotal, "an index without lists knows vectors by their place"
            self._index.add(wide)
            return
        rotated = _before_lists(self._index, wide)
        lists = nearest_centroids(torch.from_numpy(rotated).to(self._device, self._dtype), self._centroids)
        ids = np.arange(first_id, first_id + len(vectors), dtype=np.int64)
        self._ivf.add_core(len(vectors), *(faiss.swig_ptr(each) for each in (rotated, ids, lists)))
        self._held_bytes += len(vectors) * (self._ivf.code_size + ids.itemsize)
        if self._held_bytes >= PART_BYTES:
            self._write_part()

    def finish(self, file: BinaryIO, keep: Mask | None) -> None:
        """Write the index's lists to a file: what it held before, as far as `keep` says, and what was added.

        The index has the places of the lists then, and no lists; `lists.map_lists` gives it those of the file.
        """
        parts = [faiss.read_index(str(path), faiss.IO_FLAG_MMAP) for path, _ in self._parts]
        sources = [self._before, *(ivf_of(part).invlists for part in parts), self._ivf.invlists]
        lists = write_lists(file, sources, keep)
        _exchange_lists(self._ivf, lists)
        self._ivf.ntotal = self._index.ntotal = lists.compute_ntotal()

    def _write_part(self) -> None:
        path, file = create_temporary(self._folder / "part", ".tmp")
        self._parts.append((path, file))
        write_index(self._index, path)
        self._ivf.reset()
        self._held_bytes = 0

    def _empty_lists(self) -> faiss.InvertedLists:
        return faiss.ArrayInvertedLists(self._ivf.nlist, self._ivf.code_size)


def write_index(index: faiss.Index, path: Path) -> None:
    """Write an index to a file.

    Raises:
        StoreError: That failed; a full disk, mostly.
    """
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        reason = re.search(r"\(([^()]+)\)$", str(error).strip())  # the system's words come last
        raise StoreError(f"{path} cannot be written: {reason[1] if reason else error}") from error


def _exchange_lists(ivf: faiss.IndexIVF, lists: faiss.InvertedLists) -> faiss.InvertedLists:
    """Give an index other lists; those it had are the caller's."""
    before = ivf.invlists
    ivf.own_invlists = False  # or FAISS would free them
    before.this.own(True)
    lists.this.disown()
    ivf.replace_invlists(lists, True)
    return before


def _before_lists(index: faiss.Index, vectors: Float32Array) -> Float32Array:
    """Vectors as the lists of an index see them: rotated, where it rotates."""
    outer = faiss.downcast_index(index)
    if not isinstance(outer, faiss.IndexPreTransform):
        return vectors
    rotated: Float32Array = outer.chain.at(0).apply(vectors)
    return rotated


def _scalar_index(plan: Plan, centroids: Float32Array, vectors: Float32Array) -> faiss.Index:
    kind = faiss.ScalarQuantizer.QT_fp16 if plan.kind == "ivf" else faiss.ScalarQuantizer.QT_8bit
    index = faiss.IndexIVFScalarQuantizer(
        _quantizer(centroids), plan.dim, plan.num_lists, kind, faiss.METRIC_INNER_PRODUCT, False
    )
    index.train(vectors)
    return index


def _product_index(plan: Plan, centroids: Float32Array, vectors: Float32Array) -> faiss.Index:
    """A product quantizer of what is left of vectors after their centroids, rotated so that its parts weigh alike.

    The rotation is that of parametric optimized product quantization (Ge et al., 2013): principal axes, dealt out so
    that the products of their variances are even. It takes a second, where the iterated one takes minutes.
    """
    nearest = nearest_centroids(torch.from_numpy(vectors), torch.from_numpy(centroids))
    left = vectors - centroids[nearest]
    rotation = faiss.LinearTransform(plan.dim, plan.dim, False)  # an inner product must not have its mean taken away
    axes = np.eye(plan.dim, dtype=np.float32).reshape(-1)
    if len(left) >= plan.dim:  # fewer do not span the space
        principal = faiss.PCAMatrix(plan.dim, plan.dim, 0, False)
        principal.balanced_bins = plan.code_bytes
        principal.train(left)
        axes = faiss.vector_to_array(principal.A)[: plan.dim**2]
    faiss.copy_array_to_vector(axes, rotation.A)
    rotation.is_orthonormal = rotation.is_trained = True
    ivf = faiss.IndexIVFPQ(
        _quantizer(rotation.apply(centroids)), plan.dim, plan.num_lists, plan.code_bytes, 8, faiss.METRIC_INNER_PRODUCT
    )
    ivf.pq.cp.niter = PQ_ITERATIONS
    ivf.train(rotation.apply(vectors))
    return faiss.IndexPreTransform(rotation, ivf)


def _quantizer(centroids: Float32Array) -> faiss.IndexFlatIP:
    quantizer = faiss.IndexFlatIP(centroids.shape[1])
    quantizer.add(centroids)
    return quantizer
