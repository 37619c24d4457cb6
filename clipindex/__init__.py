"""Very large image corpora into CLIP embeddings worth keeping.

from clipindex import embed, classify

embed("shards/{000..999}.tar", "out", model="ViT-B-32", pretrained="laion2b_s34b_b79k")
print(classify("out", classes="classnames.txt").acc1)
"""

import importlib
from typing import TYPE_CHECKING, Any

from clipindex.version import __version__

if TYPE_CHECKING:
    from clipindex.caption_retrieval import RetrievalSummary, measure_retrieval
    from clipindex.duplicates import DuplicateSummary, find_duplicates
    from clipindex.embed_job import EmbedSummary, embed
    from clipindex.errors import ClipindexError
    from clipindex.exchange import ExportSummary, ImportSummary, export_embeddings, import_embeddings
    from clipindex.indexing import IndexSummary, build_index
    from clipindex.models import load_model
    from clipindex.nearest import Filter
    from clipindex.packing import PackSummary, pack
    from clipindex.probing import (
        Comparison,
        Evaluation,
        FewShotCurve,
        MultiLabelEvaluation,
        Probe,
        TrainSummary,
        compare_encoders,
        evaluate_probe,
        few_shot_curve,
        read_probe,
        train_probe,
    )
    from clipindex.retrieval import Hit, Query, read_image, search
    from clipindex.shards import list_shards, read_samples
    from clipindex.store import read_dataset, read_embeddings, read_rejects
    from clipindex.types import ModelSpec
    from clipindex.verification import VerifySummary, verify
    from clipindex.zeroshot import ClassifySummary, build_classifier, classify, classify_images

_HOMES = {
    "ClassifySummary": "zeroshot",
    "ClipindexError": "errors",
    "Comparison": "probing",
    "DuplicateSummary": "duplicates",
    "EmbedSummary": "embed_job",
    "Evaluation": "probing",
    "ExportSummary": "exchange",
    "FewShotCurve": "probing",
    "Filter": "nearest",
    "Hit": "retrieval",
    "ImportSummary": "exchange",
    "IndexSummary": "indexing",
    "ModelSpec": "types",
    "MultiLabelEvaluation": "probing",
    "PackSummary": "packing",
    "Probe": "probing",
    "Query": "retrieval",
    "RetrievalSummary": "caption_retrieval",
    "TrainSummary": "probing",
    "VerifySummary": "verification",
    "build_classifier": "zeroshot",
    "build_index": "indexing",
    "classify": "zeroshot",
    "classify_images": "zeroshot",
    "compare_encoders": "probing",
    "embed": "embed_job",
    "evaluate_probe": "probing",
    "export_embeddings": "exchange",
    "few_shot_curve": "probing",
    "find_duplicates": "duplicates",
    "import_embeddings": "exchange",
    "list_shards": "shards",
    "load_model": "models",
    "measure_retrieval": "caption_retrieval",
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
    "ClassifySummary",
    "ClipindexError",
    "Comparison",
    "DuplicateSummary",
    "EmbedSummary",
    "Evaluation",
    "ExportSummary",
    "FewShotCurve",
    "Filter",
    "Hit",
    "ImportSummary",
    "IndexSummary",
    "ModelSpec",
    "MultiLabelEvaluation",
    "PackSummary",
    "Probe",
    "Query",
    "RetrievalSummary",
    "TrainSummary",
    "VerifySummary",
    "__version__",
    "build_classifier",
    "build_index",
    "classify",
    "classify_images",
    "compare_encoders",
    "embed",
    "evaluate_probe",
    "export_embeddings",
    "few_shot_curve",
    "find_duplicates",
    "import_embeddings",
    "list_shards",
    "load_model",
    "measure_retrieval",
    "pack",
    "read_dataset",
    "read_embeddings",
    "read_image",
    "read_probe",
    "read_rejects",
    "read_samples",
    "search",
    "train_probe",
    "verify",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the module holds
    """Import a public name when it is first used: PyTorch alone takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'clipindex' has no attribute {name!r}")
    return getattr(importlib.import_module(f"clipindex.{_HOMES[name]}"), name)
