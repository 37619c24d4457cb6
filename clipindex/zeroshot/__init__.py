"""Zero-shot classification: embeddings searched for their nearest class vector."""

from clipindex.zeroshot.classifier import ZeroShotClassifier, build_classifier
from clipindex.zeroshot.directory import ClassifySummary, classify, predict_directory
from clipindex.zeroshot.images import ImagePrediction, classify_images

__all__ = [
    "ClassifySummary",
    "ImagePrediction",
    "ZeroShotClassifier",
    "build_classifier",
    "classify",
    "classify_images",
    "predict_directory",
]
