"""Decoding an image in a process of its own, which may die of it."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from clipindex.decode import decode_image
from clipindex.errors import ClipindexError, SampleError
from clipindex.types import Preprocess, UInt8Array

TIMEOUT_S = 120
"""For loading PyTorch on a busy machine and decoding the largest image there is."""
AT_ONCE = 4
"""Processes of up to 0.9 GB each: suspects are often neighbours, and come at the same moment."""

# The working directory may hold anything; modules come from where the parent has them (in Python 3.10, `-c` adds it).
_CODE = "import sys; sys.path[:] = filter(None, sys.path); from clipindex.pipeline.alone import main; main()"
_STOPPED_FROM_OUTSIDE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_room = threading.BoundedSemaphore(AT_ONCE)


class LoneDecoder:
    """Starts the processes; `close` ends those that run, and starts no more."""

    def __init__(self, preprocess: Preprocess, *, fast: bool, max_pixels: int) -> None:
        self._wanted = json.dumps({"preprocess": asdict(preprocess), "fast": fast, "max_pixels": max_pixels})
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._is_closed = False

    def decode(self, data: bytes, out: UInt8Array) -> tuple[int, int]:
        """As `decode.decode_image`, seconds slower, and whatever the image does to its decoder, this process goes on.

        Raises:
            SampleError: As there; or the decoder crashed or hung.
            ClipindexError: No process could be had, or it was stopped from outside: this says nothing of the image.
        """
        with _room:
            status, answer, said = self._run(data)
        if status == -signal.SIGALRM:
            raise SampleError(f"its decoder hung for {TIMEOUT_S} s, and had ended an earlier run")
        if self._is_closed or -status in _STOPPED_FROM_OUTSIDE:
            raise ClipindexError("decoding a suspect image in a process of its own was stopped; run again")
        if status < 0:
            raise SampleError(f"its decoder crashed ({_signal_name(-status)}), and had ended an earlier run")
        if status:
            raise SampleError(f"its decoder failed in a process of its own: {said}")
        line, _, pixels = answer.partition(b"\n")
        found = json.loads(line)
        if "error" in found:
            raise SampleError(found["error"])
        out[:] = np.frombuffer(pixels, np.uint8).reshape(out.shape)
        return found["width"], found["height"]

    def close(self) -> None:
        """End what runs."""
        with self._lock:
            self._is_closed = True
            for process in self._running:
                process.kill()

    def _run(self, data: bytes) -> tuple[int, bytes, str]:
        """Exit status, standard output, and the last line of standard error."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        pipe = subprocess.PIPE
        with self._lock:
            if self._is_closed:
                return -signal.SIGKILL, b"", ""
            try:
                process = subprocess.Popen(
                    [sys.executable, "-c", _CODE, self._wanted], stdin=pipe, stdout=pipe, stderr=pipe, env=environment
                )
            except OSError as error:
                raise ClipindexError(f"no process to decode a suspect image in: {error.strerror}; run again") from error
            self._running.add(process)
        try:
            answer, said = process.communicate(data)
        finally:
            with self._lock:
                self._running.discard(process)
        return process.returncode, answer, (said.decode("utf-8", "replace").strip().splitlines() or [""])[-1]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def main(decode: Callable[..., tuple[int, int]] = decode_image) -> None:
    """The process: settings as argument, image on standard input; a line of JSON and the pixels on standard output."""
    signal.alarm(TIMEOUT_S)  # its own, for the parent may be gone by then
    _offer_to_be_killed_first()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints
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
    with answers:
        answers.write(json.dumps(answer).encode() + b"\n" + pixels.tobytes())


def _offer_to_be_killed_first() -> None:
    """Where memory runs out, the kernel is to take this process and not its parent, which is larger."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:  # not Linux
        return
