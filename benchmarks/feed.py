"""How many images/s the pipeline hands to a device that takes no time: tars, decoding and Parquet, without a model.

Physics: decoding runs outside of Python's lock, all else of an image under it: 17 microseconds of tar reading, 3 of
laying it into a batch, 2 of its row, and 20 around the calls that decode. So a process cannot hand on more than
about 24,000 a second, however many cores decode; tiny images show that bound, ordinary ones the cores'.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from reporting import RESULTS, Row, arguments, finish, keep
from vectors import INFO

from clipindex.bench.corpus import repeated, write_corpus
from clipindex.bench.measure import measure_decode
from clipindex.pipeline import embed_shards
from clipindex.shards import list_shards
from clipindex.store import open_dataset
from clipindex.threads import num_cores
from clipindex.types import Encoding, UInt8Array, Vectors

IMAGES = 1024
SECONDS = 8.0
MOST_PER_S = 12_000
"""To expect of tiny images at most, by which a run is made as long as asked: more are decoded than pass the lock."""
SIZES = (((64, 48), 32), ((500, 375), 224))
"""Of images, and what they are resized to."""
BATCH = 256
REPEATS = 2


class FreeEncoder:
    """Gives the same vectors whatever it sees; its device has a name of its own, since decoding yields to a CPU."""

    device = "none"
    precision = "fp32"

    def __init__(self, side: int) -> None:
        self.info = replace(INFO, preprocess=replace(INFO.preprocess, size=(side, side)))
        raw = np.random.default_rng(0).normal(size=(BATCH, INFO.dim)).astype(np.float32)
        self._unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)

    def new_batch(self, size: int) -> UInt8Array:
        """Memory for images."""
        return np.zeros((size, *self.info.preprocess.size, 3), np.uint8)

    def encode(self, images: UInt8Array) -> Vectors:
        """The vectors."""
        return Vectors(self._unit[: len(images)], np.ones(len(images), np.float32))

    def begin(self, images: UInt8Array) -> Callable[[], Encoding]:
        """At once."""
        encoding = Encoding(self.encode(images), 0.0)
        return lambda: encoding


def main() -> None:
    """Measure, print and, with --save, keep."""
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", help="that decode; 1, 2, 4, … up to one a core by default")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where --save keeps it")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of a run, about; each row has {REPEATS}")
    options = parser.parse_args()
    cores = num_cores()
    threads = options.threads or [*(1 << at for at in range(cores.bit_length()) if 1 << at < cores), cores]

    def on_rows(rows: list[Row]) -> None:
        print(rows[-1], flush=True)
        keep("feed", rows, options.save, options.results)

    finish("feed", measure(threads, options.seconds, on_rows), options.save, options.results)


def measure(threads: list[int], seconds: float, on_rows: Callable[[list[Row]], None]) -> list[Row]:
    """A row for each size of image and number of threads; `on_rows` is called whenever there is one more."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for size, side in SIZES:
            encoder = FreeEncoder(side)
            name = f"{size[0]}x{size[1]}"
            tars = write_corpus(Path(folder) / name, IMAGES, size=size, shard_images=IMAGES)
            for number in threads:
                decode = measure_decode(tars, name, encoder.info.preprocess, number).images_per_s
                again = Path(folder) / f"{name}-{number}"
                many = repeated(tars, again, round(seconds * min(decode, MOST_PER_S) / IMAGES) + 1)
                rate, cpu_s = _handed_on(many, encoder, again, number)
                rows.append(
                    {
                        "images": f"{name} to {side}x{side}",
                        "decode threads": number,
                        "handed_on_per_s": round(rate),
                        "decoded alone_per_s": round(decode),
                        "ratio": round(rate / decode, 3),
                        "cpu microseconds an image": round(cpu_s * 1e6, 1),
                    }
                )
                on_rows(rows)
    return rows


def _handed_on(tars: list[str], encoder: FreeEncoder, folder: Path, threads: int) -> tuple[float, float]:
    """Images/s of the better of some runs, and the CPU's seconds for each image then."""
    found: list[tuple[float, float]] = []
    for at in range(REPEATS):
        out = folder / f"out-{at}"
        dataset = open_dataset(out, encoder.info, "float16", "benchmark")
        started, cpu = time.perf_counter(), time.process_time()
        results = embed_shards(list_shards(tars), [encoder], out, dataset, batch_size=BATCH, decode_threads=threads)
        rows = sum(result.record.rows for result in results if result.record is not None)
        found.append((rows / (time.perf_counter() - started), (time.process_time() - cpu) / rows))
        assert rows == len(tars) * IMAGES
    return max(found)


if __name__ == "__main__":
    main()
