"""How memory and speed move with the size of a corpus: 1,000, 10,000 and 100,000 images, each in a process of its own.

Physics: pixel buffers are reused and queues are bounded, so nothing should grow with the corpus but the list of shards;
with the shard, only its keys. Expected: peak memory at 100,000 images at most 1.1 times that at 1,000, and a speed that
rises at first, as the start (loading, measuring the batch size) is spread over more.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from reporting import Row, arguments, finish

from clipindex.bench.corpus import write_corpus

SIZES = (1_000, 10_000, 100_000)
SHARD_IMAGES = 1_000
IMAGE_SIZE = (128, 96)
MODEL = "demo"


def main() -> None:
    """Measure, print and, with --save, keep."""
    parser = arguments(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="multiples of 1,000")
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        (tar,) = write_corpus(Path(folder) / "drawn", SHARD_IMAGES, size=IMAGE_SIZE, shard_images=SHARD_IMAGES)
        for number in options.sizes:
            corpus = Path(folder) / f"corpus-{number}"
            corpus.mkdir()
            for at in range(number // SHARD_IMAGES):
                os.link(tar, corpus / f"{at}.tar")  # bytes are read anew for each name; disk space is not the point
            rows.append(_embed(corpus, Path(folder) / f"out-{number}", number))
    for row in rows:
        row["peak over the first"] = round(float(row["peak_memory_mib"]) / float(rows[0]["peak_memory_mib"]), 3)
    finish("scaling", rows, options.save)


def _embed(corpus: Path, out: Path, number: int) -> Row:
    command = [sys.executable, "-m", "clipindex", "embed", str(corpus), "--out", str(out), "--model", MODEL, "--json"]
    # One batch size for all, or what is measured would be the choice of it.
    with subprocess.Popen(
        [*command, "--batch-size", "64"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        document = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    summary = json.loads(document)
    assert process.returncode == 0 and summary["rows"] == number, summary
    return {
        "images": number,
        "images_per_s": summary["images_per_s"],
        "seconds": summary["seconds"],
        "bound by": summary["stages"]["bound_by"],
        "peak_memory_mib": usage.ru_maxrss // 1024,
    }


if __name__ == "__main__":
    main()
