"""Weights of a module: drawn from a seed or left for later, filled from a checkpoint, and told from others."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict

import torch
from torch.overrides import TorchFunctionMode

from clipindex.errors import ModelError
from clipindex.models.checkpoints import Tensors
from clipindex.types import Preprocess

_MAX_NAMES = 3
_HASH_THREADS = 8


@contextlib.contextmanager
def drawing(random_init: int | None) -> Iterator[None]:
    """Build modules inside, with weights from a seed, or with any where there is none; random state is left alone."""
    with torch.random.fork_rng(devices=[]), nullcontext() if random_init is not None else _Unfilled():
        # Not torch.manual_seed, which would reseed the accelerators too.
        torch.default_generator.manual_seed(random_init or 0)
        yield


class _Unfilled(TorchFunctionMode):
    """Leaves out drawing the numbers that trained weights overwrite, most of a large model's building time."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        named = kwargs or {}
        # torch.nn.init's own functions name their tensor; timm draws with the tensor's methods.
        if getattr(func, "__module__", None) == "torch.nn.init" and "tensor" in named:
            return named["tensor"]
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_):
            return args[0]
        return func(*args, **named)


def fill(model: torch.nn.Module, tensors: Tensors, what: str) -> None:
    """Give a model exactly the weights of a state dict.

    Raises:
        ModelError: one is missing, unexpected or of another shape; it begins with `what`.
    """
    expected = model.state_dict()
    shapes = [
        f"{name} is {list(tensors[name].shape)}, not {list(expected[name].shape)}"
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].shape != expected[name].shape
    ]
    missing = sorted(n for n in expected.keys() - tensors.keys() if not n.endswith("num_batches_tracked"))
    unexpected = sorted(tensors.keys() - expected.keys())
    problems = [
        f"{len(names)} {problem} ({', '.join(names[:_MAX_NAMES])}{', ...' if len(names) > _MAX_NAMES else ''})"
        for problem, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise ModelError(f"{what}: {'; '.join(problems)}; name the architecture that these weights were trained with")
    model.load_state_dict(tensors, strict=False)


def fingerprint(architecture: object, weights: Tensors, preprocess: Preprocess) -> str:
    """Identity of the numbers that a model computes.

    Args:
        architecture: Of JSON types, spelled one way.
        weights: In fp32.
        preprocess: The transform that belongs to them.

    Returns:
        64 hex digits: sha256 over canonical JSON of the architecture, of [name, shape, sha256 of the bytes]
        of each weight in name order, and of the preprocessing. File format, storage dtype, precision and name
        do not enter, nor what of the preprocessing is not used.
    """
    names = sorted(name for name in weights if not name.endswith("num_batches_tracked"))  # which embeds nothing
    with ThreadPoolExecutor(_HASH_THREADS) as pool:  # hashlib releases the GIL
        digests = list(pool.map(_digest, (weights[name] for name in names)))
    listing = [[name, list(weights[name].shape), digest] for name, digest in zip(names, digests, strict=True)]
    transform = {field: value for field, value in asdict(preprocess).items() if value is not None}
    text = json.dumps(_plain([architecture, listing, transform]), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().reshape(-1).contiguous().numpy().data).hexdigest()


def _plain(value: object) -> object:
    """JSON types alone, every number a float, so that 4 and 4.0, (1, 2) and [1, 2] read the same."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
