"""Reading tars: samples/s of one thread, three members a sample, from the page cache.

Physics: a sample of 50 KB costs 7 microseconds to copy (7 GB/s), so nothing reads more than 140,000 a second. What is
left is Python: every function call of three headers, names and keys. Expected: 50,000 samples/s, where a general reader
builds objects for 10,000.
"""

import io
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import webdataset
from reporting import Row, arguments, finish

from clipindex.bench.ceilings import best_rate, read_bytes_per_s
from clipindex.shards import list_shards, read_samples

NUM_SAMPLES = 4000
IMAGE_BYTES = 50_000


def main() -> None:
    """Measure, print and, with --save, keep."""
    options = arguments(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.tar"
        _write(path)
        (shard,) = list_shards([str(path)])
        ways: dict[str, Callable[[], int]] = {
            "tarfile, streaming": lambda: _with_tarfile(path),
            "webdataset": lambda: sum(1 for _ in webdataset.WebDataset(str(path), shardshuffle=False)),
            "clipindex": lambda: sum(1 for _ in read_samples(shard)),
        }
        rates = {what: best_rate(way) for what, way in ways.items()}
        rates["the bytes, in pieces of 1 MiB"] = read_bytes_per_s(str(path)) * NUM_SAMPLES / path.stat().st_size
    rows: list[Row] = [
        {
            "reader": what,
            "samples_per_s": round(rate),
            "over webdataset": round(rate / rates["webdataset"], 2),
        }
        for what, rate in rates.items()
    ]
    finish("read", rows, options.save)


def _with_tarfile(path: Path) -> int:
    samples = 0
    with tarfile.open(path, "r|") as tar:
        for member in tar:
            file = tar.extractfile(member)
            samples += member.name.endswith(".jpg") and file is not None and bool(file.read())
    return samples


def _write(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for at in range(NUM_SAMPLES):
            members = {"jpg": os.urandom(IMAGE_BYTES), "cls": str(at % 1000).encode(), "json": b'{"number": %d}' % at}
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{at:08}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


if __name__ == "__main__":
    main()
