"""Training a linear probe from an embedding directory, beside scikit-learn on the same rows and the same C.

Physics: at 50,000 x 512 and 100 classes, an evaluation of loss and gradient is two products of 5.1 GFLOP together; two
cores do that in 0.1 s in float32 and in 0.04 s in bfloat16. So the number of evaluations is what matters: L-BFGS as
scikit-learn runs it takes 100 to 150 on features of a CLIP encoder's kind (norm about 10, a long common mean, a
decaying spectrum, one label in ten wrong), and stops 2e-3 above the minimum. Expected: a fifth of its time or less, an
objective that is no higher, and an accuracy within 0.1 points of the minimum's.

Each way runs in a process of its own and reads the directory itself, so that its peak memory is its own. Memory counts
what the process has in all, and what it added to that after its imports: PyTorch alone is larger than scikit-learn. The
seconds of clipindex begin with reading, those of the others with rows in memory; none have CUDA's start among them,
which a first product and a first decomposition pay.

Also beside what people write for a GPU: torch.optim.LBFGS in float32 on the same objective, down to the gradient at
which scikit-learn ends. What should fit into five minutes of 16 cores and a GPU, of which writing a million rows takes
one: `--device cuda --rows 50000,1000000 --scikit-learn-up-to 50000 --tight-up-to 0`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from vectors import DIM, INFO

from clipindex.store import ShardWriter, open_dataset, read_embeddings
from clipindex.types import Float32Array, Sample, Shard, Vectors

if TYPE_CHECKING:
    import torch
    from reporting import Row

NUM_CLASSES = 100
TEST_ROWS = 10_000
NUM_SHARDS = 10
BATCH = 4096
C = 0.316
TOLERANCE = 1e-4
"""scikit-learn's default: of the largest component of the mean objective's gradient."""
LABEL_NOISE = 0.1


def main() -> None:
    """Measure, print and, with --save, keep."""
    if sys.argv[1:2] == ["--one"]:  # before anything that scikit-learn does not need is imported
        way, where, device = sys.argv[2:]
        print(json.dumps(WAYS[way](Path(where), device)))
        return
    from reporting import RESULTS, arguments, finish, keep

    from clipindex.devices import choose_device

    parser = arguments(__doc__)
    parser.add_argument("--rows", default="50000,200000,1000000", help="training rows, several with commas between")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--scikit-learn-up-to",
        type=int,
        default=200_000,
        help="rows; half a minute for 50,000; on a CPU L-BFGS as well",
    )
    parser.add_argument("--tight-up-to", type=int, default=50_000, help="the same to 1e-6: three times as long")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where --save keeps it")
    options = parser.parse_args()
    chosen = choose_device(options.device)
    rows: list[Row] = []
    for num_rows in map(int, options.rows.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            _write(root / "test", TEST_ROWS, seed=1)
            _write(root / "train", num_rows, seed=0)
            for row in _compare(root, num_rows, str(chosen), _ways(num_rows, chosen, options)):
                rows.append(row)
                print(row, flush=True)
                keep("probe", rows, options.save, options.results, chosen)
    finish("probe", rows, options.save, options.results, chosen)


def _ways(num_rows: int, device: "torch.device", options: argparse.Namespace) -> list[str]:
    most = {"scikit-learn": options.scikit_learn_up_to, "scikit-learn-tight": options.tight_up_to}
    most |= {"lbfgs": options.scikit_learn_up_to} if device.type == "cpu" else {}
    return [way for way in WAYS if num_rows <= most.get(way, num_rows)]


def _compare(root: Path, num_rows: int, device: str, ways: list[str]) -> Iterator["Row"]:
    """A row for each way, as they come; scikit-learn's, beside which the others are put, is the first of them."""
    reference: dict[str, float] | None = None
    for way in ways:
        try:
            one = _run(way, root, device)
        except subprocess.CalledProcessError as error:  # which has said why
            yield _row(num_rows, f"{WORDS[way]}: failed, exit status {error.returncode}")
            continue
        reference = one if way == "scikit-learn" else reference
        row = _row(num_rows, WORDS[way])
        row |= {
            "seconds": round(one["seconds"], 2),
            "C": round(one["c"], 4),
            "passes": int(one["passes"]),
            "objective": round(one["objective"], 2),
            "acc1": round(one["acc1"], 4),
            "peak_memory_mib": round(one["peak_mib"]),
            "after imports, mib": round(one["peak_mib"] - one["imports_mib"]),
        }
        if reference is not None:
            row["of scikit-learn's"] = round(one["seconds"] / reference["seconds"], 3)
            if one["c"] == C:
                row["over scikit-learn's"] = f"{one['objective'] / reference['objective'] - 1:+.1e}"
        yield row


def _row(num_rows: int, way: str) -> "Row":
    """All columns in order, of a way of which nothing is known yet."""
    names = (
        "seconds",
        "of scikit-learn's",
        "C",
        "passes",
        "objective",
        "over scikit-learn's",
        "acc1",
        "peak_memory_mib",
        "after imports, mib",
    )
    return {"rows": num_rows, "way": way, **dict.fromkeys(names, "-")}


def _run(way: str, root: Path, device: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", way, str(root), device]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _scikit_learn(root: Path, device: str, tolerance: float = TOLERANCE) -> dict[str, float]:
    from sklearn.linear_model import LogisticRegression

    imports = _peak()
    x, y = _load(root / "train")
    started = time.perf_counter()
    model = LogisticRegression(C=C, max_iter=1000, tol=tolerance).fit(x, y)
    seconds = time.perf_counter() - started
    peak = _peak()
    weights, intercept = model.coef_.astype(np.float64), model.intercept_.astype(np.float64)
    return _result(root, weights, intercept, seconds, int(model.n_iter_[0]), imports, peak)


def _clipindex(root: Path, device: str, **options: float | None) -> dict[str, float]:
    from clipindex.devices import choose_device
    from clipindex.probing import read_probe, train_probe

    _warm_up(choose_device(device))
    imports = _peak()
    summary = train_probe(root / "train", device=device, out=root / "probe", **options)  # type: ignore[arg-type]
    peak = _peak()
    probe = read_probe(root / "probe")
    weights, intercept = probe.weights.double().numpy(), probe.intercept.double().numpy()
    passes = summary.training["passes"] + summary.training.get("search", {"passes": 0})["passes"]
    return _result(root, weights, intercept, summary.seconds, passes, imports, peak, summary.c)


def _torch_lbfgs(root: Path, device: str) -> dict[str, float]:
    """Steps by the strong Wolfe conditions; the gradient to end at and the pairs remembered are scikit-learn's."""
    import torch

    from clipindex.devices import choose_device

    where = choose_device(device)
    _warm_up(where)
    imports = _peak()
    x, y = _load(root / "train")
    started = time.perf_counter()
    features, labels = torch.from_numpy(x).to(where), torch.from_numpy(y).to(where)
    weights = torch.zeros(NUM_CLASSES, DIM, device=where, requires_grad=True)
    intercept = torch.zeros(NUM_CLASSES, device=where, requires_grad=True)
    descent = torch.optim.LBFGS(
        [weights, intercept],
        max_iter=1000,
        tolerance_grad=TOLERANCE,
        tolerance_change=0,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    passes = 0

    def objective() -> torch.Tensor:
        nonlocal passes
        passes += 1
        descent.zero_grad()
        losses = torch.nn.functional.cross_entropy(features @ weights.T + intercept, labels)
        mean = losses + weights.square().sum() / (2 * C * len(features))
        mean.backward()  # type: ignore[no-untyped-call]
        return mean

    descent.step(objective)  # type: ignore[no-untyped-call]
    found = weights.detach().cpu().double().numpy(), intercept.detach().cpu().double().numpy()
    return _result(root, *found, time.perf_counter() - started, passes, imports, _peak())


def _warm_up(device: "torch.device") -> None:
    """CUDA and its libraries begin with their first call, once for a process: that takes as long as many a fit."""
    import torch

    if device.type == "cuda":
        small = torch.eye(64, device=device)
        torch.linalg.eigh(small @ small)
        torch.cuda.synchronize(device)


def _result(
    root: Path,
    weights: "np.ndarray[tuple[int, int], np.dtype[np.float64]]",
    intercept: "np.ndarray[tuple[int], np.dtype[np.float64]]",
    seconds: float,
    passes: int,
    imports: float,
    peak: float,
    c: float | None = C,
) -> dict[str, float]:
    """The objective in float64 and the accuracy, computed alike for all."""
    loss = 0.0
    for x, y in _batches(root / "train"):
        logits = x.astype(np.float64) @ weights.T + intercept
        most = logits.max(1)
        loss += float((np.log(np.exp(logits - most[:, None]).sum(1)) + most - logits[np.arange(len(y)), y]).sum())
    x, y = _load(root / "test")
    return {
        "seconds": seconds,
        "passes": passes,
        "objective": (c or C) * loss + 0.5 * float((weights**2).sum()),
        "acc1": float(((x @ weights.T + intercept).argmax(1) == y).mean()),
        "c": c or C,
        "imports_mib": imports,
        "peak_mib": peak,
    }


WORDS = {
    "scikit-learn": "scikit-learn",
    "scikit-learn-tight": "scikit-learn, tol 1e-6",
    "lbfgs": "PyTorch's L-BFGS, in memory",
    "held": "clipindex, in memory",
    "streamed": "clipindex, read in each pass",
    "search": "clipindex, --c auto: 15 fits and one",
}
WAYS: dict[str, Callable[[Path, str], dict[str, float]]] = {
    "scikit-learn": _scikit_learn,
    "scikit-learn-tight": lambda root, device: _scikit_learn(root, device, 1e-6),
    "lbfgs": _torch_lbfgs,
    "held": _clipindex,
    "streamed": lambda root, device: _clipindex(root, device, memory_bytes=1),
    "search": lambda root, device: _clipindex(root, device, c=None),
}


def _peak() -> float:
    """Of this program: what getrusage counts includes the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _batches(folder: Path) -> Iterator[tuple[Float32Array, "np.ndarray[tuple[int], np.dtype[np.int64]]"]]:
    for batch in read_embeddings(folder, ("norm", "label")):
        norms = batch.columns["norm"].to_numpy()
        yield batch.embedding.astype(np.float32) * norms[:, None], batch.columns["label"].to_numpy().astype(np.int64)


def _load(folder: Path) -> tuple[Float32Array, "np.ndarray[tuple[int], np.dtype[np.int64]]"]:
    """Raw features, read into memory that is allocated once, as frugally as scikit-learn can have them."""
    num_rows = sum(len(batch.embedding) for batch in read_embeddings(folder))
    x, y, at = np.empty((num_rows, DIM), np.float32), np.empty(num_rows, np.int64), 0
    for features, labels in _batches(folder):
        x[at : at + len(labels)], y[at : at + len(labels)] = features, labels
        at += len(labels)
    return x, y


def _write(folder: Path, num_rows: int, seed: int) -> None:
    """Features as a CLIP encoder's; the classes are the same whatever the seed."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed + 1)
    spectrum = np.arange(1, DIM + 1) ** -0.6
    spectrum /= np.linalg.norm(spectrum)
    basis = np.linalg.qr(fixed.normal(size=(DIM, DIM)))[0]
    mean = fixed.normal(size=DIM)
    mean *= 7 / np.linalg.norm(mean)
    centres = fixed.normal(size=(NUM_CLASSES, DIM)) * spectrum
    dataset = open_dataset(folder, INFO, "float16", "benchmark")
    for at in range(NUM_SHARDS):
        number = num_rows // NUM_SHARDS
        shard = Shard(url=f"/synthetic/{at}.tar", name=f"synthetic-{at}", size=0, version="")
        writer = ShardWriter(folder, shard, dataset)
        for start in range(0, number, BATCH):
            labels = rng.integers(0, NUM_CLASSES, min(BATCH, number - start))
            raw = (centres[labels] + rng.normal(size=(len(labels), DIM)) * spectrum * 5.5) @ basis + mean
            mixed = rng.random(len(labels)) < LABEL_NOISE
            labels[mixed] = rng.integers(0, NUM_CLASSES, mixed.sum())
            norms = np.linalg.norm(raw, axis=1).astype(np.float32)
            samples = [
                Sample(key=f"{at}_{start + i}", member="x.jpg", image=b"", tar_offset=0, label=int(label))
                for i, label in enumerate(labels)
            ]
            unit: Float32Array = (raw / norms[:, None]).astype(np.float32)
            writer.append(samples, Vectors(unit, norms), [(1, 1)] * len(samples))
        writer.publish(samples=number, precision="fp32", decoder="exact", device="cpu", seconds=0.0)


if __name__ == "__main__":
    main()
