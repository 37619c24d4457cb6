"""How busy a GPU was, as NVIDIA's management library says it: the share of the time in which some kernel ran."""

import contextlib
import threading
from collections.abc import Iterator

import torch

INTERVAL_S = 0.1


@contextlib.contextmanager
def sampling_utilisation(device: torch.device) -> Iterator[list[int]]:
    """A list that fills with percentages while the block runs; it stays empty where nobody can say (no pynvml)."""
    samples: list[int] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(INTERVAL_S):
            samples.append(torch.cuda.utilization(device))

    watcher = threading.Thread(target=sample, daemon=True, name="utilisation")
    if _can_say(device):
        watcher.start()
    try:
        yield samples
    finally:
        stop.set()
        if watcher.is_alive():
            watcher.join()


def describe_utilisation(samples: list[int]) -> str:
    """In a few words."""
    if not samples:
        return "GPU utilisation unknown: pip install nvidia-ml-py"
    return f"GPU utilisation {sum(samples) / len(samples):.0f} %"


def _can_say(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        torch.cuda.utilization(device)
    except Exception:  # pynvml is missing, or its library, or the right to ask
        return False
    return True
