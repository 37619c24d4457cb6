"""What a result was measured on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

VARIABLES = ("OPENBLAS_", "OMP_", "MKL_", "ONEDNN_", "DNNL_", "ATEN_CPU_CAPABILITY")
"""How the names of variables begin by which libraries choose their threads and instructions."""
PACKAGES = ("torch", "open_clip_torch", "numpy", "pyarrow", "faiss-cpu", "pillow", "simplejpeg")


def describe_machine(device: torch.device | None = None) -> dict[str, Any]:
    """Processor, cores, device, versions of what the speed depends on, and the variables that change it, if any."""
    cpu = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    cuda = device is not None and device.type == "cuda"
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **({"gpu": torch.cuda.get_device_name(device)} if cuda else {}),
        **({"variables": variables} if variables else {}),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # copied beside the others, without its metadata
        return "unknown"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
