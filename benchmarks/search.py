"""Reading embeddings back, classifying and searching them, against bare FAISS.

Physics: 512 half floats are 1 KiB a row, so reading is bound by memory copies; a search among 1,000 classes is
1.02 MFLOP a row, so it is bound by the matrix product. Expected: reading above 500k rows/s on one core; classification
(read, search, probabilities over all classes, predictions written) at 0.75 or more of FAISS's own top-5 search of rows
already in memory.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from reporting import Row, arguments, finish
from vectors import DIM, INFO

from clipindex.index.exact import flat_index
from clipindex.metrics import ClassificationCounts
from clipindex.retrieval import Query, search
from clipindex.store import ShardWriter, open_dataset, read_embeddings
from clipindex.types import Float32Array, Sample, Shard, Vectors
from clipindex.zeroshot import ZeroShotClassifier, predict_directory

NUM_CLASSES = 1000
NUM_SHARDS = 4
BATCH = 256


def main() -> None:
    """Measure, print and, with --save, keep."""
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    vectors = _unit(rng.normal(size=(NUM_CLASSES, DIM)))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _write(root, rng, vectors, options.rows)
        queries = np.concatenate([batch.embedding for batch in read_embeddings(root)]).astype(np.float32)
        index = flat_index(vectors)
        classifier = ZeroShotClassifier([f"class {at}" for at in range(NUM_CLASSES)], vectors, INFO)
        likeness = [Query(keys=(f"0_{at}",)) for at in range(100)]
        rates = _interleaved(
            {
                "read into NumPy": lambda: sum(len(batch.embedding) for batch in read_embeddings(root)),
                "bare FAISS top-5, rows in memory": lambda: index.search(queries, 5),
                "classify: read, top-5, probabilities, write": lambda: predict_directory(
                    root, classifier, root / "predictions", 5, ClassificationCounts(NUM_CLASSES), lambda rows: None
                ),
                "search: 100 rows as queries, top-10 of all rows": lambda: search(root, likeness, k=10),
            },
            options.rows,
            options.repeats,
        )
    bare = rates["bare FAISS top-5, rows in memory"]
    rows: list[Row] = [
        {"what": what, "rows_per_s": round(rate), "of bare FAISS": round(rate / bare, 2)}
        for what, rate in rates.items()
    ]
    finish("search", rows, options.save)


def _interleaved(ways: dict[str, Callable[[], object]], num_rows: int, repeats: int) -> dict[str, float]:
    """Median rows/s of each way, taken in turns so that a busy moment of the machine hits all alike."""
    seconds: dict[str, list[float]] = {what: [] for what in ways}
    for _ in range(repeats + 1):
        for what, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[what].append(time.perf_counter() - started)
    return {what: num_rows / statistics.median(taken[1:]) for what, taken in seconds.items()}


def _unit(raw: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> Float32Array:
    unit: Float32Array = (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)
    return unit


def _write(root: Path, rng: np.random.Generator, vectors: Float32Array, num_rows: int) -> None:
    dataset = open_dataset(root, INFO, "float16", "benchmark")
    for at in range(NUM_SHARDS):
        shard = Shard(url=f"/synthetic/{at}.tar", name=f"synthetic-{at}", size=0, version="")
        writer = ShardWriter(root, shard, dataset)
        number = num_rows // NUM_SHARDS
        labels = rng.integers(0, NUM_CLASSES, number)
        rows = _unit(vectors[labels] + rng.normal(size=(number, DIM)) * 0.2)
        samples = [
            Sample(key=f"{at}_{i}", member=f"{at}_{i}.jpg", image=b"", tar_offset=0, label=int(labels[i]))
            for i in range(number)
        ]
        for start in range(0, number, BATCH):  # as an embedding job does
            batch = slice(start, min(start + BATCH, number))
            sizes = [(1, 1)] * (batch.stop - start)
            writer.append(samples[batch], Vectors(rows[batch], np.ones(len(sizes), np.float32)), sizes)
        writer.publish(samples=number, precision="fp32", decoder="exact", device="cpu", seconds=0.0)


if __name__ == "__main__":
    main()
