"""Classifying single image files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipindex.decode import decode_image
from clipindex.devices import choose_devices, choose_precision
from clipindex.encode import ImageTower
from clipindex.errors import SampleError, SourceError
from clipindex.models import LoadedModel
from clipindex.zeroshot.classifier import ZeroShotClassifier


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePrediction:
    """The best classes of one image, best first."""

    path: str
    classes: list[str]
    cosines: list[float]
    probabilities: list[float]
    """Over all classes."""


def classify_images(
    paths: Sequence[str | Path],
    loaded: LoadedModel,
    classifier: ZeroShotClassifier,
    *,
    top: int = 5,
    device: str = "auto",
    precision: str = "auto",
) -> list[ImagePrediction]:
    """Classify image files with the classifier's own model.

    Raises:
        SourceError: A file cannot be read.
        SampleError: A file is no image.
    """
    chosen = choose_devices(device)[0]
    tower = ImageTower(loaded, device=chosen, precision=choose_precision(precision, chosen))
    predictions = []
    for path in paths:
        pixels = np.empty((1, *tower.info.preprocess.size, 3), np.uint8)
        try:
            decode_image(Path(path).read_bytes(), tower.info.preprocess, pixels[0])
        except OSError as error:
            raise SourceError(f"{path}: {error.strerror}") from error
        except SampleError as error:
            raise SampleError(f"{path}: {error}") from error
        found = classifier.predict(tower.encode(pixels).unit, top)
        predictions.append(
            ImagePrediction(
                path=str(path),
                classes=[classifier.classes[at] for at in found.ids[0]],
                cosines=found.cosines[0].tolist(),
                probabilities=found.probabilities[0].tolist(),
            )
        )
    return predictions
