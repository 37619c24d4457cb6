"""Decoding an image in a process of its own, which may die of it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from clipindex.decode import decode_image
from clipindex.errors import SampleError
from clipindex.types import Preprocess, UInt8Array

TIMEOUT_S = 120
"""For loading PyTorch on a busy machine and decoding the largest image there is."""

_CODE = "from clipindex.pipeline.alone import main; main()"


def decode_alone(
    data: bytes, preprocess: Preprocess, out: UInt8Array, *, fast: bool, max_pixels: int
) -> tuple[int, int]:
    """As `decode.decode_image`, seconds slower, and whatever the image does to its decoder, this process goes on.

    Raises:
        SampleError: As there; or the decoder crashed or hung.
    """
    wanted = json.dumps({"preprocess": asdict(preprocess), "fast": fast, "max_pixels": max_pixels})
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CODE, wanted],
            input=data,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
            # The working directory may hold anything; modules come from where this process has them.
            env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    except subprocess.TimeoutExpired:
        raise SampleError(f"its decoder hung for {TIMEOUT_S} s") from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise SampleError(f"its decoder crashed ({name}) and had ended an earlier run")
    if done.returncode:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise SampleError(f"its decoder failed in a process of its own: {''.join(last)}")
    answer, _, pixels = done.stdout.partition(b"\n")
    found = json.loads(answer)
    if "error" in found:
        raise SampleError(found["error"])
    out[:] = np.frombuffer(pixels, np.uint8).reshape(out.shape)
    return found["width"], found["height"]


def main(decode: Callable[..., tuple[int, int]] = decode_image) -> None:
    """The process: settings as argument, image on standard input; a line of JSON and the pixels on standard output."""
    wanted = json.loads(sys.argv[1])
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in wanted["preprocess"].items()
    }
    preprocess = Preprocess(**fields)
    pixels = np.empty((*preprocess.size, 3), np.uint8)
    try:
        width, height = decode(
            sys.stdin.buffer.read(), preprocess, pixels, fast=wanted["fast"], max_pixels=wanted["max_pixels"]
        )
        answer: dict[str, int | str] = {"width": width, "height": height}
    except SampleError as error:
        answer = {"error": str(error)}
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n" + pixels.tobytes())
