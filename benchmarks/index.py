"""`clipindex index` against autofaiss 2.18.0 on the same embeddings, memory and cores, and how it grows.

Physics: assigning N rows to L = 4 sqrt(N) lists is 2 N L D floating-point operations, 4.2 TFLOP for a million rows of
512, and training another 2 TFLOP: seconds on two cores that multiply bf16 matrices, and hardly more than the exact
search of 1,500 queries that recall is measured with (2 N 1500 D = 1.5 TFLOP, in fp32). A graph of 32 neighbours, which
autofaiss builds where memory allows, looks at some thousand vectors a row, and waits for memory at each. Expected: a
million rows built in a fifth of its time or less, in half of its memory; a slower search at the same recall.

Both are run whole, as their users run them, with the same limit of memory. autofaiss tunes for 10 ms a query, and says
no recall; so each index is also searched with the least effort that reaches the target, found by the same search for
both. Queries are 1,000 rows, each of which does not count itself.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from commands import Finished, install, run_command
from reporting import Row, arguments, finish
from vectors import SHARD_ROWS, shards_of, write_directory

from clipindex.exchange import export_embeddings
from clipindex.index.files import open_index
from clipindex.nearest import row_cosines, through_index
from clipindex.recall import SAME, Questions, draw_rows, exact_answers, measure, read_drawn
from clipindex.store import VectorReader, published_shards, read_embeddings
from clipindex.threads import num_cores
from clipindex.types import Float32Array

THEIRS = "autofaiss==2.18.0"
ITS_PYARROW = "pyarrow<21"
"""It wants numpy<2, and later ones want another."""
TARGET = 0.95
K = 10
NUM_QUERIES = 1000
REPEATS = 3
VENV_BYTES = 2 << 30

_THEIR_PROGRAM = """
import sys
from autofaiss import build_index
folder, out, memory, cores = sys.argv[1:]
build_index(folder, index_path=out + "/knn.index", index_infos_path=out + "/infos.json", max_index_memory_usage=memory,
            current_memory_available="16G", nb_cores=int(cores), verbose=30)
"""


def main() -> None:
    """Measure, print and, with --save, keep."""
    options = _options()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder)
        python = install(
            options.venv or root / "venv", [THEIRS, ITS_PYARROW], sys.executable, options.limit, VENV_BYTES
        )
        for number, memory in options.cells:
            rows += _compared(root / f"{number}-{memory}", number, memory, python, options.limit)
        grown = [_ours(_made(root / str(number), number), number, "16GB", options.limit) for number in options.growth]
    rows += grown
    if len(grown) > 1:
        rows.append(_extrapolated(grown[-2], grown[-1], 10_000_000))
    finish("index", rows, options.save)


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    cells = "100000:400MB,1000000:4GB"
    parser.add_argument("--cells", default=cells, help="rows and memory to compare with; default: %(default)s")
    parser.add_argument("--growth", default="300000,1000000,3000000", help="rows to grow over; default: %(default)s")
    parser.add_argument("--venv", type=Path, help="where autofaiss is installed, once, and stays")
    parser.add_argument("--folder", type=Path, help="for the embeddings: 4 KB a row; default: a temporary one")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for one command; default: %(default)s")
    options = parser.parse_args()
    pairs = [cell.split(":") for cell in options.cells.split(",") if cell]
    options.cells = [(int(number), memory) for number, memory in pairs]
    options.growth = [int(number) for number in options.growth.split(",") if number]
    return options


def _made(root: Path, number: int) -> Path:
    write_directory(root, shards_of(number))
    return root


def _compared(root: Path, number: int, memory: str, python: Path, limit: float) -> list[Row]:
    _made(root, number)
    export_embeddings(root, root / "npy", format="npy")
    questions = _questions(root)
    rows = [_ours(root, number, memory, limit, questions)]
    out = root / "theirs"
    out.mkdir()
    arguments_ = [str(root / "npy" / "img_emb"), str(out), memory[:-1], str(num_cores())]
    done = run_command([str(python), "-c", _THEIR_PROGRAM, *arguments_], limit)
    rows.append(_theirs(root, number, memory, done, questions))
    if rows[0]["index"] == "flat":
        rows.append(_bare(root, number, questions))
    return rows


def _ours(root: Path, number: int, memory: str, limit: float, questions: Questions | None = None) -> Row:
    command = [sys.executable, "-m", "clipindex", "index", str(root), "--memory", memory, "--json",
               "--target-recall", str(TARGET), "--device", "cpu"]  # fmt: skip
    done = run_command(command, limit)
    summary = json.loads(done.said)
    opened = open_index(root, 1 << 40)
    assert opened is not None
    reader, effort = VectorReader(root), opened.record.effort
    asked = questions or _questions(root)
    rate = _queries_per_s(lambda vectors: through_index(reader, opened, vectors, K, effort), asked)
    key = f"{summary['kind']}, {opened.record.plan.num_lists} lists" if effort.probes else summary["kind"]
    recall = measure(reader, opened, asked, effort).recall_at_10
    return _row("clipindex", number, memory, key, done, summary["index_bytes"], (recall, rate), rate)


def _theirs(root: Path, number: int, memory: str, done: Finished, questions: Questions) -> Row:
    index = faiss.read_index(str(root / "theirs" / "knn.index"))
    infos = json.loads((root / "theirs" / "infos.json").read_text())
    space = faiss.ParameterSpace()
    space.set_index_parameters(index, infos["index_param"])
    as_built = _recall(index, root, questions), _queries_per_s(lambda vectors: index.search(vectors, K), questions)
    name = "efSearch" if infos["index_key"].startswith("HNSW") else "nprobe"

    def recall_at(effort: int) -> float:
        space.set_index_parameter(index, name, effort)
        return _recall(index, root, questions)

    effort = _least(recall_at)
    if effort is not None:
        space.set_index_parameter(index, name, effort)
    rate = _queries_per_s(lambda vectors: index.search(vectors, K), questions) if effort is not None else None
    size = (root / "theirs" / "knn.index").stat().st_size
    return _row("autofaiss 2.18.0", number, memory, infos["index_key"], done, size, as_built, rate)


def _bare(root: Path, number: int, questions: Questions) -> Row:
    index = faiss.IndexFlatIP(questions.vectors.shape[1])
    for batch in read_embeddings(root):
        index.add(batch.embedding.astype(np.float32))
    rate = _queries_per_s(lambda vectors: index.search(vectors, K), questions)
    return _row("bare FAISS", number, "-", "Flat", None, 4 * index.ntotal * index.d, (1.0, rate), rate)


def _row(
    tool: str,
    number: int,
    memory: str,
    index: str,
    done: Finished | None,
    index_bytes: int,
    as_built: tuple[float, float],
    at_target: float | None,
) -> Row:
    return {
        "tool": tool,
        "rows": number,
        "memory": memory,
        "index": index,
        "build, s": round(done.seconds, 1) if done else "-",
        "peak memory, MiB": done.peak_memory_bytes >> 20 if done else "-",
        "index, MiB": index_bytes >> 20,
        "recall@10": round(as_built[0], 4),
        "queries/s": round(as_built[1]),
        f"queries/s at {TARGET}": round(at_target) if at_target else "-",
    }


def _questions(root: Path) -> Questions:
    sizes = {name: record.rows for name, record in published_shards(root).items()}
    drawn = draw_rows(sizes, NUM_QUERIES, 99)
    own = [(name, row) for name, part in drawn for row in part.tolist()]
    vectors = read_drawn(root, drawn).astype(np.float32)
    return exact_answers(root, list(sizes), [vectors], [own], device="cpu")[0]


def _recall(index: Any, root: Path, questions: Questions) -> float:  # noqa: ANN401
    """As `recall.measure`, of an index whose ids are row numbers in the order of the shards."""
    _, ids = index.search(questions.vectors, K + 1)
    names = sorted(published_shards(root))
    shards, rows = np.divmod(np.maximum(ids, 0), SHARD_ROWS)
    vectors = torch.from_numpy(np.repeat(questions.vectors, K + 1, axis=0))
    cosines = row_cosines(VectorReader(root), names, vectors, shards.reshape(-1), rows.reshape(-1)).reshape(ids.shape)
    assert questions.own is not None
    own = np.array([names.index(name) * SHARD_ROWS + row for name, row in questions.own])
    cosines[(ids < 0) | (ids == own[:, None])] = -np.inf
    best = -np.sort(-cosines, axis=1)[:, :K]
    return float((best >= questions.cosines[:, K - 1 : K] - SAME).mean())


def _least(recall: Callable[[int], float]) -> int | None:
    """The least effort that reaches the target, to a sixteenth; None where the largest does not."""
    low, high = 0, 1
    while recall(high) < TARGET:
        low, high = high, 2 * high
        if high > 1 << 14:
            return None
    while high - low > max(1, high // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if recall(middle) < TARGET else (low, middle)
    return high


def _queries_per_s(search: Callable[[Float32Array], object], questions: Questions) -> float:
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        search(questions.vectors)
        taken.append(time.perf_counter() - started)
    return len(questions.vectors) / statistics.median(taken)


def _extrapolated(one: Row, other: Row, rows: int) -> Row:
    """As powers of the number of rows, through two measured ones."""
    grown = math.log(_number(other, "rows") / _number(one, "rows"))
    further = math.log(rows / _number(other, "rows"))

    def at(name: str) -> float:
        slope = math.log(_number(other, name) / _number(one, name)) / grown
        return _number(other, name) * math.exp(slope * further)

    names = ("build, s", "peak memory, MiB", "index, MiB")
    unknown = dict.fromkeys(("recall@10", "queries/s", f"queries/s at {TARGET}"), "-")
    sizes = {name: round(at(name)) for name in names}
    return {**other, "tool": "clipindex, extrapolated", "rows": rows, "index": "ivf", **sizes, **unknown}


def _number(row: Row, name: str) -> float:
    return float(row[name])


if __name__ == "__main__":
    main()
