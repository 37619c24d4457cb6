"""Devices and precisions by name, and what `auto` means on this machine."""

import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from clipindex.errors import UsageError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_CPU_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last is how Linux spells it on arm
_CPU_FP16_FLAGS = {"avx512_fp16", "amx_fp16", "asimdhp"}
_AMPERE = (8, 0)


def choose_device(name: str) -> torch.device:
    """The device that a name means on this machine.

    Args:
        name: 'auto' (CUDA where there is one, else the CPU), 'cpu', 'cuda' or 'cuda:N'.

    Raises:
        UsageError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r} is not a device; give auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported; give auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name!r} is not here: {torch.cuda.device_count()} CUDA devices found; give auto")
    return device


def choose_devices(name: str) -> list[torch.device]:
    """The devices that a name means: as in `choose_device`, several with commas between, and 'auto' every CUDA device.

    Raises:
        UsageError: one of them is not here.
    """
    if name == "auto" and torch.cuda.is_available():
        return [torch.device("cuda", at) for at in range(torch.cuda.device_count())]
    return [choose_device(one.strip()) for one in name.split(",")]


def choose_precision(name: str, device: torch.device) -> str:
    """The precision of the weights that a name means on a device.

    Args:
        name: 'auto' (16 bits where the hardware multiplies such matrices, else 'fp32'), 'bf16', 'fp16' or
            'fp32'.
        device: Where the tower will run.

    Returns:
        'bf16', 'fp16' or 'fp32'.

    Raises:
        UsageError: no such precision, or fp16 on a CPU without fp16 instructions.
    """
    if name == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.get_device_capability(device) >= _AMPERE else "fp16"
        return "bf16" if _CPU_BF16_FLAGS & _cpu_flags() else "fp32"
    if name not in PRECISIONS:
        raise UsageError(f"precision {name!r} is unknown; give auto, {', '.join(PRECISIONS)}")
    # Measured on such a CPU (Zen 5, torch 2.15): a plain product 0.3 GFLOP/s against fp32's 87, ViT-B/32 a
    # quarter of fp32's speed.
    if name == "fp16" and device.type == "cpu" and not _CPU_FP16_FLAGS & _cpu_flags():
        raise UsageError("fp16 on this CPU is much slower than fp32 and no better; give fp32 or bf16")
    return name


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux: nothing is known, so nothing is assumed
        return frozenset()
    flags = (line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features")))
    return frozenset(next(flags, "").split())


def stopwatch(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Begin to measure what this thread lets a device do.

    Returns:
        Ends it, without waiting; what that gives waits until the device is done, and says how many seconds it took.
    """
    if device.type != "cuda":
        started = time.perf_counter()

        def stop_clock() -> Callable[[], float]:
            passed = time.perf_counter() - started
            return lambda: passed

        return stop_clock
    # blocking: the core of a thread that waits is free for decoding
    begin, end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record(torch.cuda.current_stream(device))

    def stop() -> Callable[[], float]:
        end.record(torch.cuda.current_stream(device))

        def seconds() -> float:
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3

        return seconds

    return stop


def machine_memory_bytes() -> int:
    """Memory of this machine, or of the container where that has less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(path).read_text().strip() if os.access(path, os.R_OK) else ""
        if text.isdecimal():
            limits.append(int(text))
    return min(limits)
