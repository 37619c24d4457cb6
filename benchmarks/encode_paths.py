"""Which ways of running the image tower pay beside the shipped one: bf16 by `clipindex.towers`, uncompiled.

Expected on two cores of Zen 5 (ViT-B/32, nine tenths of the bare bf16 product as shipped): compiled with frozen weights
it is as fast after some 20 s, since the operators are the same; open_clip's blocks, and weights not packed, are
a fifth slower; int8 multiplies twice as fast, of which quantising activations takes most; fp8 is emulated.
On an H100: launches are hidden at batches of 256 and more, so CUDA graphs win little; compiling fuses what lies between
the products, 10 to 20 %; fp8 and int8 multiply twice as fast, which compiled may bring half as much again to ViT-L/14.

A way is right by its cosine to fp32, over photographs: of random weights, and of the same with massive channels as
trained ones have them (`low_precision.with_outliers`), which the following layers read or do not. Each way is measured
beside the shipped one, in turn, since a machine's speed wanders. Each compiles into a cache of its own. A process
of its own does the work: what crashes it, or hangs, is a row that says so, and the others go on in the next.
"""

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from encode_ways import WAYS
from encode_worker import measure_ways, row_of
from reporting import RESULTS, Row, arguments, finish, keep

from clipindex.devices import choose_devices

MODELS = {"cpu": ("ViT-B-32",), "cuda": ("ViT-L-14", "ViT-B-32")}
LIMIT_S = 600.0
WAY_LIMIT_S = 180.0
"""Of silence, after which a process is taken to hang."""


def rows_of(model: str, ways: Sequence[str], device: str, until: float, folder: Path) -> Iterator[Row]:
    """A row for each way, from processes that are begun anew when one dies or is silent for too long.

    Args:
        model: open_clip architecture.
        ways: Names.
        device: As for `choose_devices`; its first.
        until: By time.perf_counter(); what is not done then is left out.
        folder: For what processes share.
    """
    waiting = list(ways)
    while waiting:
        left_s = until - time.perf_counter()
        if left_s <= 0:
            yield from (row_of(model, way, note="left out: the time was up") for way in waiting)
            return
        begun: set[str] = set()
        with (folder / "stderr").open("w+") as log, _worker(model, waiting, device, folder, left_s, log) as lines:
            for line in _until(lines, until):
                if "begins" in line:
                    begun.add(str(line["begins"]))
                if "way" in line:
                    waiting.remove(str(line["way"]))
                    yield line
            reason = _last_words(log, until)
        # What it had not begun is for the next one, unless it came to nothing at all.
        stopped = [way for way in waiting if way in begun or not begun]
        waiting = [way for way in waiting if way not in stopped]
        yield from (row_of(model, way, note=reason) for way in stopped)


@contextlib.contextmanager
def _worker(
    model: str, ways: Sequence[str], device: str, folder: Path, left_s: float, log: IO[str]
) -> Iterator["queue.Queue[Row | None]"]:
    """Lines of a process that measures, None last; it is killed in the end."""
    command = [sys.executable, __file__, "--worker", str(folder), "--models", model, "--device", device]
    command += ["--limit-s", str(left_s), "--ways", *ways]
    lines: queue.Queue[Row | None] = queue.Queue()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)

    def read() -> None:
        for line in process.stdout or ():
            with contextlib.suppress(ValueError):  # not a line of ours
                lines.put(dict(json.loads(line)))
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield lines
    finally:
        process.kill()
        process.wait()


def _until(lines: "queue.Queue[Row | None]", until: float) -> Iterator[Row]:
    """Lines until there are no more, the time is up, or nothing is heard for too long."""
    with contextlib.suppress(queue.Empty):
        line = lines.get(timeout=_patience_s(until))
        while line and "done" not in line:
            yield line
            line = lines.get(timeout=_patience_s(until))


def _patience_s(until: float) -> float:
    return max(0.0, min(until - time.perf_counter(), WAY_LIMIT_S))


def _last_words(log: IO[str], until: float) -> str:
    if time.perf_counter() >= until:
        return "stopped: the time was up"
    log.seek(0)
    said = [line.strip() for line in log if line.strip()]
    return f"its process died, or said nothing for {WAY_LIMIT_S:.0f} s; last words: {said[-1][:300] if said else '-'}"


def main() -> None:
    """Measure, print and, with --save, keep, after each way."""
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--ways", nargs="+", choices=[way.name for way in WAYS], default=[way.name for way in WAYS])
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="of all; models share it")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where --save keeps it")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = choose_devices(options.device)[0]
    models = options.models or MODELS[device.type]
    if options.worker:
        try:
            measure_ways(models[0], options.ways, device, options.worker, options.limit_s)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(0)  # neither for compilers' processes nor for a device in disorder is waited
    until = time.perf_counter() + options.limit_s
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for at, model in enumerate(models):
            now = time.perf_counter()
            for row in rows_of(
                model, options.ways, str(device), now + (until - now) / (len(models) - at), Path(folder)
            ):
                rows.append(row)
                print(", ".join(f"{name} {value}" for name, value in row.items() if value not in ("-", "")), flush=True)
                keep("encode_paths", rows, options.save, options.results, device)
    finish("encode_paths", rows, options.save, options.results, device)


if __name__ == "__main__":
    main()
