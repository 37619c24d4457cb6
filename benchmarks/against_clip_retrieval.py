"""clipindex against clip-retrieval 2.45.0, both as their users run them: one command, the same tars, the same weights.

Physics: on a CPU clip-retrieval computes in fp32, some 50 ms of two AVX-512 cores for an image of ViT-B/32; bf16
instructions multiply twice the numbers a cycle and move half the bytes, which precision.py measures as 3.4 times the
images. It decodes with Pillow in worker processes that compete with the model for the cores and hand float pixels over
through shared memory, some 8 ms an image against 2 ms. Expected on a CPU with bf16 instructions: 4 to 5 times its rate
(the goal: at least 5), and cosines above 0.999.

It gets the same release of PyTorch in a virtual environment of its own (its other pins do not go with ours: numpy<2,
pyarrow<16, open_clip<3), batches of 64 on a CPU, and else its own defaults. Its start-up embeds two such batches of
images and of texts, most of a minute on two cores with its own 256; ours looks for the fastest batch size. Both
commands are timed whole and on a corpus of a few images, and the difference is the work; what each says of itself is
there to check that by. Both use one device. With a GPU, take --images 20000 or more: a few hundred are gone before its
workers are warm.

Weights are random, and random weights put all images close together: the centred cosine, after the mean embedding of
the corpus is subtracted from both sides, is the one that a row at a wrong place would ruin.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from against_naive import BATCH_SIZES, Vectors, least_cosines, our_vectors
from commands import install, run_command
from reporting import Row, arguments, finish

from clipindex.bench.corpus import write_corpus
from clipindex.devices import choose_device
from clipindex.models import load_model
from clipindex.types import ModelSpec

MODEL = "ViT-B-32"
THEIRS = "clip-retrieval 2.45.0"
WORKERS = 4
"""clip-retrieval's default; it stops where there are fewer tars."""
TINY_SHARD_IMAGES = 2
DOUBTFUL = 1.33
"""A rate that differs by more from the program's own account was spoilt by a start-up of varying length."""
VENV_BYTES = 10 << 30
"""6.4 GB with PyTorch's CUDA build, and what pip unpacks on the way."""


def main() -> None:
    """Measure, print and, with --save, keep."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        program = _install(options.venv or _temporary_venv(root, options.keep), options.python, options.limit)
        rows = _compare(root, program, options)
    finish("against_clip_retrieval", rows, options.save)


def _compare(root: Path, program: Path, options: argparse.Namespace) -> list[Row]:
    whole = write_corpus(root / "whole", options.images, shard_images=options.shard_images)
    tiny = write_corpus(root / "tiny", WORKERS * TINY_SHARD_IMAGES, shard_images=TINY_SHARD_IMAGES)
    if len(whole) < WORKERS:
        raise SystemExit(f"{len(whole)} tars for {WORKERS} workers: give a smaller --shard-images")
    weights = root / "weights.pt"
    torch.save(load_model(ModelSpec(name=MODEL, random_init=0)).model.state_dict(), weights)
    theirs = _Contender(
        command=lambda urls, out: _their_command(program, weights, urls, out),
        account=_their_account,
        out=root / "theirs",
        limit=options.limit,
    )
    ours = _Contender(
        command=lambda urls, out: _our_command(weights, urls, out),
        account=_our_account,
        out=root / "ours",
        limit=options.limit,
    )
    for contender in (theirs, ours):
        contender.warm_up(tiny)
    for _ in range(options.repeats):
        for contender in (theirs, ours):  # in turns, so that a busy moment of the machine hits both
            contender.run(tiny, whole)
    return _rows(theirs, ours, options.images)


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--shard-images", type=int, default=128, help="a tar; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--venv",
        type=Path,
        help="where clip-retrieval is installed, once, and stays; default: a temporary folder, removed at the end",
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the temporary folder of clip-retrieval, and say where"
    )
    parser.add_argument("--python", default=sys.executable, help="for clip-retrieval: 3.10 to 3.12; default: this one")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one command; default: %(default)s")
    options = parser.parse_args()
    if options.python == sys.executable and sys.version_info >= (3, 13):
        parser.error("clip-retrieval's numpy<2 has no wheels for this Python: name a 3.10 to 3.12 with --python")
    return options


def _temporary_venv(root: Path, keep: bool) -> Path:
    if not keep:
        return root / "venv"
    folder = Path(tempfile.mkdtemp(prefix="clip-retrieval-"))
    print(f"clip-retrieval is kept: --venv {folder} uses it again", file=sys.stderr)
    return folder


def _install(venv: Path, python: str, limit: float) -> Path:
    """clip-retrieval's program, in a virtual environment that is built where it is not there already."""
    # Our release of PyTorch, so that the difference is not PyTorch's; a local build's suffix is not on PyPI.
    ours = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "torchvision")]
    # Only these setuptools please both PyTorch, which wants a new one, and what imports pkg_resources, since removed.
    wanted = [THEIRS.replace(" ", "=="), "setuptools>=77.0.3,<81", "numpy<2", *ours]
    return install(venv, wanted, python, limit, VENV_BYTES).with_name("clip-retrieval")


def _their_command(program: Path, weights: Path, urls: Sequence[str], out: Path) -> list[str]:
    options = {
        "input_dataset": "{" + ",".join(urls) + "}",  # it expands braces, and takes no list
        "output_folder": out,
        "input_format": "webdataset",
        "clip_model": f"open_clip:{MODEL}/{weights}",
        "enable_text": False,
        "output_partition_count": 1,
        "num_prepro_workers": WORKERS,
        "batch_size": BATCH_SIZES[choose_device("auto").type],
    }
    return [str(program), "inference", *(f"--{name}={value}" for name, value in options.items())]


def _our_command(weights: Path, urls: Sequence[str], out: Path) -> list[str]:
    program = Path(sys.executable).with_name("clipindex")
    model = ["--model", MODEL, "--pretrained", str(weights), "--no-quick-gelu"]
    # clipindex would take every CUDA device, clip-retrieval takes the first.
    return [str(program), "embed", *urls, "--out", str(out), *model, "--device", str(choose_device("auto"))]


@dataclass(kw_only=True)
class _Contender:
    """One of the two programs, and the seconds that its whole command took."""

    command: Callable[[Sequence[str], Path], list[str]]
    account: Callable[[Path], float]
    """The images/s that it reports of itself, from what it wrote."""
    out: Path
    """Of the last run on the whole corpus."""
    limit: float
    tiny: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    accounts: list[float] = field(default_factory=list)
    """Of the whole corpus."""

    def warm_up(self, tiny: Sequence[str]) -> None:
        """Run once untimed: PyTorch's gigabytes, when they come from the disk for the first time, are a minute."""
        self._embed(tiny)

    def run(self, tiny: Sequence[str], whole: Sequence[str]) -> None:
        """Embed both corpora, each from nothing."""
        self.tiny.append(self._embed(tiny))
        self.whole.append(self._embed(whole))
        self.accounts.append(self.account(self.out))

    def _embed(self, urls: Sequence[str]) -> float:
        shutil.rmtree(self.out, ignore_errors=True)
        return run_command(self.command(urls, self.out), self.limit).seconds

    @property
    def start_up(self) -> float:
        """Median seconds of the command on the tiny corpus."""
        return statistics.median(self.tiny)

    def rate(self, num_images: int) -> float:
        """Images/s of the work alone: those that the whole corpus has more, in the time that it takes longer."""
        seconds = statistics.median(self.whole) - self.start_up
        if seconds <= 0:
            raise SystemExit("the corpus takes no longer than a few images: give more --images")
        return (num_images - WORKERS * TINY_SHARD_IMAGES) / seconds

    def rate_with_start_up(self, num_images: int) -> float:
        """Images/s of the whole command."""
        return num_images / statistics.median(self.whole)


def _rows(theirs: _Contender, ours: _Contender, num_images: int) -> list[Row]:
    summary = json.loads((ours.out / "summary.json").read_text())
    reference = _their_vectors(theirs.out)
    device = summary["device"]
    rows: list[Row] = []
    for name, contender, vectors in (
        (f"{THEIRS}, {'fp32' if device == 'cpu' else 'autocast'}, {device}", theirs, reference),
        (f"clipindex embed, {summary['precision']}, {device}", ours, our_vectors(ours.out)),
    ):
        if len(vectors) != num_images:
            raise SystemExit(f"{name} gave {len(vectors)} embeddings of {num_images} images; the rates mean nothing")
        plain, centred = least_cosines(vectors, reference)
        said = statistics.median(contender.accounts)
        if not 1 / DOUBTFUL < contender.rate(num_images) / said < DOUBTFUL:
            print(f"{name}: two rates that contradict each other; give more --images or --repeats", file=sys.stderr)
        with_start_up = contender.rate_with_start_up(num_images)
        rows.append(
            {
                "what": name,
                "images_per_s": round(contender.rate(num_images), 1),
                "ratio": round(contender.rate(num_images) / theirs.rate(num_images), 2),
                "with start-up": round(with_start_up, 1),
                "ratio with start-up": round(with_start_up / theirs.rate_with_start_up(num_images), 2),
                "by its own account": round(said, 1),
                "ratio by own accounts": round(said / statistics.median(theirs.accounts), 2),
                "start-up, s": round(contender.start_up, 1),
                "cosine, least": round(plain, 6),
                "centred cosine, least": round(centred, 4),
            }
        )
    return rows


def _their_account(out: Path) -> float:
    """From its statistics, not the rate that it prints, for which it adds up the start times of its batches."""
    stats = json.loads((out / "stats" / "0.json").read_text())
    return float(stats["sample_count"] / stats["total_duration"])


def _our_account(out: Path) -> float:
    return float(json.loads((out / "summary.json").read_text())["images_per_s"])


def _their_vectors(out: Path) -> Vectors:
    keys = pq.read_table(out / "metadata" / "metadata_0.parquet").column("image_path").to_pylist()
    return dict(zip(keys, np.load(out / "img_emb" / "img_emb_0.npy").astype(np.float32), strict=True))


if __name__ == "__main__":
    main()
