"""A trained probe, and its two files: weights as safetensors, everything else as JSON."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save

from clipindex.atomic import atomic_write, write_json
from clipindex.errors import StoreError
from clipindex.probing.rows import FEATURES
from clipindex.store import parse_model_info
from clipindex.types import ModelInfo

FORMAT_VERSION = 1
WEIGHTS_FILE = "probe.safetensors"
PROBE_FILE = "probe.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A linear classifier of one model's embeddings: logits are features x weights' + intercept."""

    model: ModelInfo
    """Of whose embeddings."""
    features: str
    """'raw' or 'normalized'."""
    classes: tuple[int, ...]
    """The labels that it tells apart, in the order of its logits; labels may have gaps."""
    names: tuple[str, ...] | None
    """Of these classes, where they are known."""
    protocol: str
    """How it was trained; one of `protocols.PROTOCOLS`."""
    c: float | None
    """scikit-learn's C; None where the protocol knows none."""
    training: dict[str, Any]
    """Rows, seed, objective and whatever else the protocol records."""
    metrics: dict[str, Any] | None
    """Measured on held-out rows when it was trained; None where there were none."""
    weights: torch.Tensor
    """Float32 [C, D]."""
    intercept: torch.Tensor
    """Float32 [C]."""
    multi_label: bool = False
    """Whether a row may have any number of the classes, so that each has a probability of its own."""

    def name(self, class_id: int) -> str:
        """What to call a class: its name, or its label."""
        return self.names[class_id] if self.names else str(self.classes[class_id])


def write_probe(folder: str | Path, probe: Probe) -> None:
    """Write both files; the JSON, which comes last, knows the digest of the other."""
    folder = Path(folder)
    tensors = save({"weights": probe.weights.cpu().contiguous(), "intercept": probe.intercept.cpu().contiguous()})
    document = {field: getattr(probe, field) for field in (*_FIELDS, "multi_label")}
    document |= {"model": asdict(probe.model), "format_version": FORMAT_VERSION, "weights_sha256": _digest(tensors)}
    with atomic_write(folder / WEIGHTS_FILE) as file:
        file.write(tensors)
    write_json(folder / PROBE_FILE, document)


def read_probe(folder: str | Path) -> Probe:
    """Read a probe back.

    Raises:
        StoreError: It is missing or damaged, or its two files are not of one training.
    """
    folder = Path(folder)
    path = folder / PROBE_FILE
    try:
        document = json.loads(path.read_bytes())
        tensors = (folder / WEIGHTS_FILE).read_bytes()
    except FileNotFoundError as error:
        raise StoreError(
            f"{folder} holds no probe: {error.filename} is missing; clipindex probe train makes it"
        ) from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is damaged ({error}); train the probe again") from error
    try:
        if document["format_version"] != FORMAT_VERSION:
            found = document["format_version"]
            raise StoreError(f"{path}: format version {found}; this clipindex reads version {FORMAT_VERSION}")
        if document["weights_sha256"] != _digest(tensors):
            raise StoreError(
                f"{folder}/{WEIGHTS_FILE} is not the one that {PROBE_FILE} describes; train the probe again"
            )
        probe = _parse(document, load(tensors))
    except (TypeError, KeyError, ValueError, AttributeError, safetensors.SafetensorError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} lacks what it should hold ({error}); train the probe again") from error
    return probe


_FIELDS = ("features", "classes", "names", "protocol", "c", "training", "metrics")


def _parse(document: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Probe:
    info = parse_model_info(document["model"])
    fields = {field: document[field] for field in _FIELDS}
    multi_label = document.get("multi_label", False)  # probes of before there were such have none
    if not isinstance(multi_label, bool):
        raise ValueError("multi_label is neither true nor false")
    fields["classes"] = tuple(int(label) for label in fields["classes"])
    fields["names"] = None if fields["names"] is None else tuple(map(str, fields["names"]))
    probe = Probe(
        model=info, **fields, multi_label=multi_label, weights=tensors["weights"], intercept=tensors["intercept"]
    )
    num_classes = len(probe.classes)
    if probe.features not in FEATURES or (probe.names is not None and len(probe.names) != num_classes):
        raise ValueError("features or names do not fit")
    if probe.weights.shape != (num_classes, info.dim) or probe.intercept.shape != (num_classes,):
        raise ValueError(f"weights of shape {list(probe.weights.shape)} for {num_classes} classes of {info.dim}-d")
    if not (torch.isfinite(probe.weights).all() and torch.isfinite(probe.intercept).all()):
        raise ValueError("weights that are no numbers")
    return probe


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
