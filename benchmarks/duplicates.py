"""`clipindex dedup` beside the range search of the same index by FAISS.

Physics: a row is compared with the rows of one or two of L = 4 sqrt(N) lists, some hundreds of rows at N = 200,000 and
a thousand at N = 1,000,000, and with 256 centroids: about a MFLOP. Two cores that multiply bf16 matrices at 800 GFLOP/s
could do 800,000 rows/s; reading rows twice, rounding them and looking for what is above the threshold cost several
times that. FAISS multiplies float16 codes one by one, and to find as many pairs it looks at more lists, since it goes
from each row and not from either of two. Expected: ten times its rows/s at a million rows, at the same recall; less
where lists are short.

Of the vectors a fifth are made from others: of those a quarter are copies, and the rest lie at cosines of 0.9 to 1. The
search is timed by itself, as FAISS's is, and the command whole, with start-up and its own certificate. Recall is
measured apart from that: the share of the true pairs of 1,000 other rows, by exact search, that are in one group. FAISS
is asked for 20,000 rows, with the fewest lists (powers of two) that find as much of the pairs of those 1,000 as is the
target.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
from commands import run_command
from reporting import Row, arguments, finish
from vectors import DIM, SHARD_ROWS, shards_of, write_directory

from clipindex import build_index, find_duplicates
from clipindex.index.build import ivf_of
from clipindex.index.files import open_index
from clipindex.recall import draw_rows, read_drawn
from clipindex.store import published_shards, read_embeddings
from clipindex.types import Float32Array, IntArray

THRESHOLD = 0.95
TARGET = 0.99
NUM_CHECKED = 1000
NUM_TIMED = 20_000
MADE = 0.2
COPIES = 0.25
LEAST_COSINE = 0.9


def main() -> None:
    """Measure, print and, with --save, keep."""
    options = _options()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for number in options.rows:
            for kind in options.kinds:
                root = Path(folder) / str(number)
                if not root.exists():
                    write_directory(root, _planted(number))
                build_index(root, kind=kind, rebuild=True)
                rows += _measured(root, number, kind, options.limit)
    finish("duplicates", rows, options.save)


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--rows", default="200000,1000000", help="default: %(default)s")
    parser.add_argument("--kinds", default="ivf", help="of the index; default: %(default)s")
    parser.add_argument("--folder", type=Path, help="for the embeddings: 3 KB a row; default: a temporary one")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for one command; default: %(default)s")
    options = parser.parse_args()
    options.rows = [int(number) for number in options.rows.split(",")]
    options.kinds = options.kinds.split(",")
    return options


def _planted(number: int) -> Iterator[Float32Array]:
    """CLIP-like vectors of which some are made from others of their shard."""
    for seed, vectors in enumerate(shards_of(number)):
        rng = np.random.default_rng(1000 + seed)
        made = rng.choice(len(vectors), int(MADE * len(vectors)), replace=False)
        aside = rng.normal(size=(len(made), DIM)).astype(np.float32)
        aside /= np.linalg.norm(aside, axis=1, keepdims=True)
        angles = np.arccos(rng.uniform(LEAST_COSINE, 1, len(made)))
        angles[rng.random(len(made)) < COPIES] = 0
        near = vectors[rng.integers(0, len(vectors), len(made))] + np.tan(angles)[:, None].astype(np.float32) * aside
        vectors[made] = near / np.linalg.norm(near, axis=1, keepdims=True)
        yield vectors


def _measured(root: Path, number: int, kind: str, limit: float) -> list[Row]:
    seconds = _search_seconds(root)
    command = [sys.executable, "-m", "clipindex", "dedup", str(root), "--json", "--device", "cpu",
               "--threshold", str(THRESHOLD), "--target-recall", str(TARGET)]  # fmt: skip
    done = run_command(command, limit)
    summary = json.loads(done.said)
    drawn = draw_rows({name: record.rows for name, record in published_shards(root).items()}, NUM_CHECKED, 99)
    asked, pairs = _true_pairs(root, drawn)
    group = _groups(root, number)
    is_found = (group[asked[pairs[0]]] == group[pairs[1]]) & (group[pairs[1]] >= 0)
    first = {
        "rows": number,
        "way": "clipindex dedup",
        "index": kind,
        "lists a row": summary["lists"],
        "search, s": round(seconds, 1),
        "search, rows/s": round(number / seconds),
        "whole command, s": round(done.seconds, 1),
        "recall": round(_recall(pairs[0][is_found], pairs[0]), 4),
        "recall it says": round(summary["recall"], 4),
        "could go": summary["duplicates"],
        "peak memory, MiB": done.peak_memory_bytes >> 20,
    }
    return [first, *_by_faiss(root, number, kind, drawn, pairs[0])]


def _search_seconds(root: Path) -> float:
    """Of finding the lists that rows reach and comparing rows, without start, copies, certificate and writing."""
    begun: dict[str, float] = {}

    def on_progress(step: str, done: int, total: int) -> None:
        begun.setdefault(step, time.perf_counter())

    find_duplicates(root, threshold=THRESHOLD, target_recall=TARGET, device="cpu", on_progress=on_progress)
    return begun["write"] - begun.get("find lists", begun["compare"])


def _by_faiss(root: Path, number: int, kind: str, drawn: list[tuple[str, IntArray]], truth: IntArray) -> list[Row]:
    opened = open_index(root, 1 << 40)
    assert opened is not None
    if kind != "ivf":
        return []
    sizes = {name: record.rows for name, record in published_shards(root).items()}
    timed = read_drawn(root, draw_rows(sizes, NUM_TIMED, 98)).astype(np.float32)
    checked = read_drawn(root, drawn).astype(np.float32)

    def search(vectors: Float32Array, probes: int) -> IntArray:
        limits, _, _ = opened.faiss.range_search(vectors, THRESHOLD, params=faiss.SearchParametersIVF(nprobe=probes))
        found: IntArray = np.diff(limits.astype(np.int64)) - 1
        return found

    probes, most = 1, ivf_of(opened.faiss).nlist
    number_true = np.bincount(truth, minlength=len(checked))
    while True:
        shares = np.clip(search(checked, probes), 0, number_true)[number_true > 0] / number_true[number_true > 0]
        if shares.mean() >= TARGET or probes == most:
            break
        probes = min(2 * probes, most)
    started = time.perf_counter()
    search(timed, probes)
    rate = len(timed) / (time.perf_counter() - started)
    return [
        {
            "rows": number,
            "way": f"FAISS range search, by {NUM_TIMED:,} rows",
            "index": kind,
            "lists a row": probes,
            "search, s": round(number / rate, 1),
            "search, rows/s": round(rate),
            "whole command, s": "-",
            "recall": round(float(shares.mean()), 4),
            "recall it says": "-",
            "could go": "-",
            "peak memory, MiB": "-",
        }
    ]


def _true_pairs(root: Path, drawn: list[tuple[str, IntArray]]) -> tuple[IntArray, tuple[IntArray, IntArray]]:
    """Numbers [S] of the rows that are drawn; places among those, and numbers of other rows, of the pairs."""
    names = sorted(published_shards(root))
    asked = np.concatenate([names.index(name) * SHARD_ROWS + rows for name, rows in drawn])
    vectors = _unit(read_drawn(root, drawn))
    found = []
    for batch in read_embeddings(root):
        one, other = np.nonzero(vectors @ _unit(batch.embedding).T >= THRESHOLD)
        found.append((one, other + names.index(batch.shard.name) * SHARD_ROWS + batch.first_row))
    one, other = (np.concatenate(each) for each in zip(*found, strict=True))
    apart = asked[one] != other
    return asked, (one[apart], other[apart])


def _unit(vectors: np.ndarray[tuple[int, int], np.dtype[np.float16]]) -> Float32Array:
    wide = vectors.astype(np.float32)
    unit: Float32Array = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return unit


def _groups(root: Path, number: int) -> IntArray:
    """The group [N] of each row, by its number; -1 where it is alone."""
    names = sorted(published_shards(root))
    table = pq.read_table(root / "duplicates" / "groups.parquet", columns=["shard", "row", "group"])
    group = np.full(number, -1, np.int64)
    shards = np.array([names.index(name) for name in table["shard"].to_pylist()], np.int64)
    group[shards * SHARD_ROWS + table["row"].to_numpy()] = table["group"].to_numpy()
    return group


def _recall(found: IntArray, truth: IntArray) -> float:
    """Share of the pairs that are found, averaged over rows that have any."""
    there = np.bincount(truth)
    return float((np.bincount(found, minlength=len(there))[there > 0] / there[there > 0]).mean())


if __name__ == "__main__":
    main()
