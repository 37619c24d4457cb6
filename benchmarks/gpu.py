"""Everything worth knowing of one GPU, in one command of nine minutes at most: is it right, then how fast is it.

Right: pixels that the GPU decoded beside the CPU's (`device_decode.py`), and cosines of each precision's embeddings to
those of fp32 on the CPU. Fast: the bus; for each model, encoder and whole job beside what bounds them;
then decoding by the device, at several images a call, and the whole job with it; what the pipeline hands on to a device
that takes no time (`feed.py`); in what time is left, ways of running the image tower (`encode_paths.py`, which alone
goes on for ten minutes). Expected of bf16 on a data-centre GPU: small models are bound by decoding, ViT-L/14 and larger
by the GPU at half of its bare matrix product.

Each step is a process of its own with a limit in time, since a decoder that nobody has tried here may crash or hang;
what it has found by then is on the screen, and with --save in its file: results/STEP_HARDWARE_DATE.json, STEP being
gpu_decode_precision, gpu_precision, gpu_speed, gpu_decode_speed, feed and encode_paths, and gpu_steps for how each
ended. `--device cpu --images 64` tries it out. Linear probes are a command of their own, see `probe.py`.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import device_decode
import encode_paths
from device_decode import SMALL
from precision import compare
from reporting import RESULTS, Row, arguments, finish, keep, said

from clipindex.allocator import keep_freed_memory
from clipindex.batch_size import fastest_batch_size
from clipindex.bench.ceilings import image_flops, product_flops_per_s
from clipindex.bench.measure import (
    Measurement,
    measure_copy,
    measure_decode,
    measure_encode,
    measure_end_to_end,
)
from clipindex.devices import choose_devices, choose_precision
from clipindex.encode import ImageTower
from clipindex.models import load_model
from clipindex.threads import num_cores
from clipindex.types import ModelSpec

MODELS = ("ViT-B-32", "ViT-L-14", "ViT-B-16")
LIMIT_S = 500.0
"""Of ten minutes, of which starting, installing and killing take some."""
STEPS_S = {
    "gpu_decode_precision": 60,
    "gpu_precision": 75,
    "gpu_speed": 150,
    "gpu_decode_speed": 120,
    "feed": 50,
    "encode_paths": 45,
}
"""At most, of each, in this order; but the last has all that is left, if that is as much as this."""
KILL_S = 10
"""Between being asked to end and being killed."""
JOB_S = 6.0
"""Of the whole job, which is run twice for each model."""
FEED_S = 3.0
"""Of a run of feed.py, of which there are four."""


def main() -> None:
    """Run every step, or one of them in this process."""
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, default=device_decode.IMAGES, help="different ones, which jobs repeat")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where --save keeps what is found")
    parser.add_argument("--step", choices=STEPS, help="one alone, here")
    parser.add_argument("--work", type=Path, help="for the images, which steps share; a temporary one by default")
    options = parser.parse_args()
    options.chosen = choose_devices(options.device)[0]
    with tempfile.TemporaryDirectory() as folder:
        options.work = options.work or Path(folder)
        if options.step:
            STEPS[options.step](options)
        else:
            _every_step(options)


def _every_step(options: argparse.Namespace) -> None:
    until = time.perf_counter() + options.limit_s
    # What a shell runs in the background ignores it, and so would the steps, which are stopped by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rows: list[Row] = []
    kept = ["--results", str(options.results), *(["--save", options.save] if options.save else [])]
    device = ["--device", str(options.chosen)]
    ours = ["--work", str(options.work), "--images", str(options.images), "--models", *options.models]
    for step, most_s in STEPS_S.items():
        left_s = until - time.perf_counter() - KILL_S
        limit_s = min(most_s, left_s)
        started = time.perf_counter()
        print(f"\n== {step}", flush=True)
        if step == "encode_paths":
            limit_s = left_s if left_s >= most_s else 0.0
            # It ends by itself, and in time; the rest is for beginning and ending.
            largest = encode_paths.MODELS[options.chosen.type][0]
            command = ["encode_paths.py", "--limit-s", str(limit_s - KILL_S), "--models", largest, *device, *kept]
        elif step == "feed":
            command = ["feed.py", "--threads", str(num_cores()), "--seconds", str(FEED_S), *kept]
        else:
            command = ["gpu.py", "--step", step, *ours, *device, *kept]
        outcome = _run(command, limit_s)
        rows.append({"step": step, "seconds": round(time.perf_counter() - started, 1), "outcome": outcome})
        keep("gpu_steps", rows, options.save, options.results, options.chosen)
    print(flush=True)
    finish("gpu_steps", rows, options.save, options.results, options.chosen)


def _run(command: list[str], limit_s: float) -> str:
    """How a script of this folder ended; it and all its processes are gone then."""
    if limit_s <= 0:
        return "left out: the time was up"
    script = [sys.executable, "-u", str(Path(__file__).with_name(command[0])), *command[1:]]
    process = subprocess.Popen(script, start_new_session=True)
    try:
        status = process.wait(limit_s)
        return "done" if status == 0 else f"failed: exit status {status}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # a traceback says where it was
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_S)
        return f"stopped after {limit_s:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may keep it
            process.wait(KILL_S)


def _decode_precision(options: argparse.Namespace) -> None:
    small = load_model(ModelSpec(name=device_decode.MODEL, random_init=0))
    rows = device_decode.compare(small, options.chosen, _keeping("gpu_decode_precision", options))
    finish("gpu_decode_precision", rows, options.save, options.results, options.chosen)


def _decode_speed(options: argparse.Namespace) -> None:
    small = load_model(ModelSpec(name=device_decode.MODEL, random_init=0))
    on_rows = _keeping("gpu_decode_speed", options)
    rows = device_decode.rates(small, options.chosen, options.images, options.work, on_rows)
    finish("gpu_decode_speed", rows, options.save, options.results, options.chosen)


def _precision(options: argparse.Namespace) -> None:
    rows: list[Row] = []
    for name in options.models:
        rows += compare(name, load_model(ModelSpec(name=name, random_init=0)), str(options.chosen))
        keep("gpu_precision", rows, options.save, options.results, options.chosen)
        print(f"{name}: {rows[-1]}", flush=True)
    finish("gpu_precision", rows, options.save, options.results, options.chosen)


def _keeping(theme: str, options: argparse.Namespace) -> Callable[[list[Row]], None]:
    """Prints the last row, and keeps all, each time that there is one more."""

    def on_rows(rows: list[Row]) -> None:
        print(rows[-1], flush=True)
        keep(theme, rows, options.save, options.results, options.chosen)

    return on_rows


def _speed(options: argparse.Namespace) -> None:
    """As `clipindex bench`, but what fails is a row, and the CPU decodes: the device's decoder may end the process."""
    device = options.chosen
    if device.type == "cpu":
        keep_freed_memory()  # as the job does
    rows: list[Row] = []
    on_rows = _keeping("gpu_speed", options)

    def noted(stage: str, measure: Callable[[], Measurement]) -> float:
        """Images/s; 0 where it failed."""
        found = None
        try:
            found = measure()
            rows.append(_row(found))
        except Exception as error:  # whatever a machine may say: the others are worth knowing all the same
            traceback.print_exc()
            rows.append(_failed(stage, error))
        on_rows(rows)
        return found.images_per_s if found else 0.0

    tars = device_decode.corpus(options.work, options.images)
    precision = choose_precision("auto", device)
    product = product_flops_per_s(device, precision)
    decode_per_s: dict[str, float] = {}
    for name in options.models:
        spec = ModelSpec(name=name, random_init=0)
        try:
            loaded = load_model(spec)
            tower = ImageTower(loaded, device=device, precision=precision)
            size, _ = fastest_batch_size(tower)
            flops = image_flops(loaded)
        except Exception as error:
            traceback.print_exc()
            rows.append(_failed("load", error))
            on_rows(rows)
            continue
        is_first = not decode_per_s
        if is_first:  # the models here take pixels of one size
            what = tars[:1], f"{SMALL[0]}x{SMALL[1]}", loaded.info.preprocess
            decode_per_s["cpu"] = noted("decode", partial(measure_decode, *what, num_cores()))
        encode = noted("encode", partial(measure_encode, tower, name, size, flops, product))
        if is_first and device.type == "cuda":
            noted("copy", partial(measure_copy, tower, size, device))
        del tower, loaded
        job = tars, options.work, spec, precision, device, size, decode_per_s, encode
        noted(
            "end to end",
            partial(measure_end_to_end, *job, num_images=options.images, seconds=JOB_S, decode="cpu"),
        )
    finish("gpu_speed", rows, options.save, options.results, device)


def _row(found: Measurement) -> Row:
    return {
        "stage": found.stage,
        "setting": found.setting,
        "images_per_s": round(found.images_per_s, 1),
        "ceiling_per_s": round(found.ceiling_per_s, 1),
        "ratio": round(found.of_ceiling, 3) if found.ceiling_per_s else "-",
        "note": found.note or found.ceiling,
    }


def _failed(stage: str, error: Exception) -> Row:
    rates: Row = {"images_per_s": "-", "ceiling_per_s": "-", "ratio": "-"}
    return {"stage": stage, "setting": "-", **rates, "note": f"failed: {said(error)}"}


STEPS = {
    "gpu_decode_precision": _decode_precision,
    "gpu_precision": _precision,
    "gpu_speed": _speed,
    "gpu_decode_speed": _decode_speed,
}
"""Those of this file."""


if __name__ == "__main__":
    main()
