"""Kill -9 at random moments, two writers at once, a full disk: what is lost, and what is there twice?

A corpus with some dirty images is embedded again and again into one directory until it is complete; each run is killed
after a random time. The writer is alone, or one of two that are killed apart, or finds the disk full before it is
killed. After each kill all published files are read. A complete directory is verified to the bottom (every tar is read
again, rows embedded anew) and its keys are compared with those that were written into the tars; then the next directory
is begun. The last one is finished without a kill.

The processes are forked from one that has loaded PyTorch, so that the kills meet work and not the start.
"""

import contextlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from reporting import Row, arguments, finish

import clipindex.embed_job  # noqa: F401 - loaded before the forks
from clipindex.cli import run
from clipindex.store import published_shards, read_embeddings, read_rejects
from clipindex.verification import verify

Result = TypeVar("Result")

KILLS = 200
NUM_SHARDS = 40
SHARD_SAMPLES = 100
DIRTY_EVERY = 17
LONGEST_S = (2.0, 16.0)
"""Until a kill: of each two, one within what the corpus takes a fresh run, one long enough for what suspects take."""
DISK_BYTES = 64 << 20
SPARE_BYTES = 96 << 10
"""Left on a full disk: enough to begin, not to finish."""
EMBED = ("--model", "demo", "--precision", "fp32", "--device", "cpu", "--batch-size", "16")
KINDS = ("one writer", "one writer", "one writer", "two writers", "full disk")
"""Drawn from, so three of five are plain."""


def main() -> None:
    """Measure, print and, with --save, keep."""
    parser = arguments(__doc__)
    parser.add_argument("--kills", type=int, default=KILLS, help="that meet a running process; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, _small_disk(Path(folder) / "disk") as is_small:
        _write_corpus(Path(folder) / "corpus", random.Random(options.seed))
        rows = _torment(Path(folder), options.kills, random.Random(options.seed), is_small)
    finish("chaos", rows, options.save)
    if any(rows[-1][name] for name in ("lost", "twice", "faults")):
        raise SystemExit("rows were lost, or are there twice, or are not what they should be")


def _torment(root: Path, kills: int, rng: random.Random, is_small: bool) -> list[Row]:
    corpus, out = root / "corpus", root / "disk" / "out"
    kinds = KINDS if is_small else tuple(kind for kind in KINDS if kind != "full disk")
    runs, killed, refused = Counter[str](), Counter[str](), 0
    found: Counter[str] = Counter()
    while killed.total() < kills:
        kind = rng.choice(kinds)
        with _full(root / "disk") if kind == "full disk" else contextlib.nullcontext():
            writers = [_start(corpus, out) for _ in range(2 if kind == "two writers" else 1)]
            for writer in writers:
                status = _kill_after(writer, rng.uniform(0.05, rng.choice(LONGEST_S)))
                runs[kind] += 1
                killed[kind] += status == -signal.SIGKILL
                refused += kind == "full disk" and status == 1
        # Each file that has a name must be whole, whatever happened.
        complete = _apart(lambda: (out / "embeddings").is_dir() and len(published_shards(out)) == NUM_SHARDS)
        print(f"{killed.total()} of {kills} kills, {found['directories']} directories complete", flush=True)
        if complete:
            found += _apart(lambda: _judge(corpus, out))
            shutil.rmtree(out)
    if _kill_after(_start(corpus, out), None):
        raise SystemExit("a run without a kill did not finish")
    found += _apart(lambda: _judge(corpus, out))
    print(f"{refused} runs ended by the full disk, {found['samples']} samples judged")
    nothing = dict.fromkeys(("lost", "twice", "faults"), "-")
    rows: list[Row] = [{"what": kind, "runs": runs[kind], "killed": killed[kind], **nothing} for kind in sorted(runs)]
    judged = f"all: {found['directories']} complete directories, {found['samples']} samples"
    counts = {name: found[name] for name in nothing}
    return [*rows, {"what": judged, "runs": runs.total(), "killed": killed.total(), **counts}]


def _start(corpus: Path, out: Path) -> int:
    """Process id of a run of the real command, its output thrown away."""
    child = os.fork()
    if child:
        return child
    with open(os.devnull, "r+b") as nowhere:
        for descriptor in (1, 2):
            os.dup2(nowhere.fileno(), descriptor)
    os._exit(run(["embed", str(corpus), "--out", str(out), *EMBED]))


def _kill_after(child: int, seconds: float | None) -> int:
    """Its exit status, or minus the signal that ended it."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, 0 if deadline is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            deadline = None
        time.sleep(0.005)


def _apart(function: Callable[[], Result]) -> Result:
    """Call it in a process of its own: this one must not start the threads that a fork then lacks."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: sender.send(function()))
    process.start()
    sender.close()
    result: Result = receiver.recv()
    process.join()
    return result


def _judge(corpus: Path, out: Path) -> "Counter[str]":
    """What is lost, twice or faulty in a directory that says it is complete."""
    expected = Counter(name.partition(".")[0] for path in corpus.glob("*.tar") for name in _images(path))
    there = Counter(key for batch in read_embeddings(out, ("key",)) for key in batch.columns["key"].to_pylist())
    for name in published_shards(out):
        there.update(read_rejects(out, name)["key"].to_pylist())
    checked = verify(out, deep=True, sample=32, device="cpu", precision="fp32")
    for fault in checked.faults:
        print(f"fault: {fault.path}: {fault.what}", flush=True)
    return Counter(
        directories=1,
        samples=expected.total(),
        lost=(expected - there).total(),
        twice=(there - expected).total(),
        faults=len(checked.faults),
    )


def _images(tar: Path) -> list[str]:
    with tarfile.open(tar) as file:
        return [name for name in file.getnames() if name.endswith(".jpg")]


def _write_corpus(folder: Path, rng: random.Random) -> None:
    folder.mkdir()
    for shard in range(NUM_SHARDS):
        with tarfile.open(folder / f"{shard:02}.tar", "w") as tar:
            for at in range(SHARD_SAMPLES):
                key = f"{shard:02}-{at:03}"
                _add(tar, f"{key}.jpg", b"<html>" if at % DIRTY_EVERY == 5 else _picture(rng))
                _add(tar, f"{key}.cls", str(at % 10).encode())


def _picture(rng: random.Random) -> bytes:
    coarse = np.frombuffer(rng.randbytes(5 * 7 * 3), np.uint8).reshape(5, 7, 3)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((128, 96), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@contextlib.contextmanager
def _small_disk(place: Path) -> Iterator[bool]:
    """A file system that can be filled, where this user may mount one; else a plain folder."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        print("no right to mount a small file system: no full disks")
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", str(place)], check=True)


@contextlib.contextmanager
def _full(disk: Path) -> Iterator[None]:
    ballast = disk / "ballast"
    room = os.statvfs(disk)
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(room.f_bavail * room.f_frsize - SPARE_BYTES, 1))
    try:
        yield
    finally:
        ballast.unlink()


if __name__ == "__main__":
    main()
