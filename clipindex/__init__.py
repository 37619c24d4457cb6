"""Very large image corpora into CLIP embeddings worth keeping.

from clipindex import embed, classify

embed("shards/{000..999}.tar", "out", model="ViT-B-32", pretrained="laion2b_s34b_b79k")
print(classify("out", classes="classnames.txt").acc1)
"""

import importlib
from typing import TYPE_CHECKING, Any

from clipindex.version import __version__

if TYPE_CHECKING:
    from clipindex.embed_job import EmbedSummary, embed
    from clipindex.errors import ClipindexError
    from clipindex.models import load_model
    from clipindex.packing import PackSummary, pack
    from clipindex.probing import (
        Evaluation,
        FewShotCurve,
        Probe,
        TrainSummary,
        evaluate_probe,
        few_shot_curve,
        read_probe,
        train_probe,
    )
    from clipindex.retrieval import Filter, Hit, Query, read_image, search
    from clipindex.shards import list_shards, read_samples
    from clipindex.store import read_dataset, read_embeddings, read_rejects
    from clipindex.types import ModelSpec
    from clipindex.verification import VerifySummary, verify
    from clipindex.zeroshot import ClassifySummary, build_classifier, classify, classify_images

_HOMES = {
    "ClassifySummary": "zeroshot",
    "ClipindexError": "errors",
    "EmbedSummary": "embed_job",
    "Evaluation": "probing",
    "FewShotCurve": "probing",
    "Filter": "retrieval",
    "Hit": "retrieval",
    "ModelSpec": "types",
    "PackSummary": "packing",
    "Probe": "probing",
    "Query": "retrieval",
    "TrainSummary": "probing",
    "VerifySummary": "verification",
    "build_classifier": "zeroshot",
    "classify": "zeroshot",
    "classify_images": "zeroshot",
    "embed": "embed_job",
    "evaluate_probe": "probing",
    "few_shot_curve": "probing",
    "list_shards": "shards",
    "load_model": "models",
    "pack": "packing",
    "read_dataset": "store",
    "read_embeddings": "store",
    "read_image": "retrieval",
    "read_probe": "probing",
    "read_rejects": "store",
    "read_samples": "shards",
    "search": "retrieval",
    "train_probe": "probing",
    "verify": "verification",
}

__all__ = [
    "train_probe",
    "read_probe",
    "few_shot_curve",
    "TrainSummary",
    "Probe",
    "FewShotCurve",
    "Evaluation",
    "ClassifySummary",
    "ClipindexError",
    "EmbedSummary",
    "Filter",
    "Hit",
    "ModelSpec",
    "PackSummary",
    "Query",
    "VerifySummary",
    "__version__",
    "build_classifier",
    "classify",
    "classify_images",
    "embed",
    "evaluate_probe",
    "list_shards",
    "load_model",
    "pack",
    "read_dataset",
    "read_embeddings",
    "read_image",
    "read_rejects",
    "read_samples",
    "search",
    "verify",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the module holds
    """Import a public name when it is first used: PyTorch alone takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'clipindex' has no attribute {name!r}")
    return getattr(importlib.import_module(f"clipindex.{_HOMES[name]}"), name)
