"""Class vectors, and what they say of embeddings."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from clipindex.agreement import Agreement, measure_agreement
from clipindex.devices import choose_device, choose_devices, choose_precision
from clipindex.encode import TextTower
from clipindex.errors import UsageError
from clipindex.index.approximate import approximate_index, scan_approximately
from clipindex.index.exact import Neighbours, flat_index, scan
from clipindex.models import LoadedModel
from clipindex.prompts import check_classes, check_templates, embed_classes
from clipindex.types import Float32Array, ModelInfo


class ZeroShotClassifier:
    """Class names, an index of their vectors, and how the model turns cosines into probabilities.

    Args:
        classes: Their names.
        vectors: Unit vectors [C, D].
        model: That made them.
        approximate: Predict by `index.approximate` in place of `index.exact`.
    """

    def __init__(
        self, classes: Sequence[str], vectors: Float32Array, model: ModelInfo, *, approximate: bool = False
    ) -> None:
        self.classes = list(classes)
        self.model = model
        self.index = flat_index(vectors)
        self.approximate = approximate_index(self.index) if approximate else None

    def predict(self, embeddings: np.ndarray[Any, Any], k: int) -> Neighbours:
        """The `k` best classes, at most C, of unit embeddings [n, D] of any float type."""
        scale, bias = self.model.logit_scale, self.model.logit_bias
        if self.approximate is not None:
            return scan_approximately(self.approximate, embeddings, k, logit_scale=scale, logit_bias=bias)
        return scan(self.index, embeddings, k, logit_scale=scale, logit_bias=bias)

    def agreement(self, embeddings: np.ndarray[Any, Any], k: int) -> Agreement | None:
        """With exact classification of unit embeddings [n, D]; None where it is exact, or n is 0."""
        scale, bias = self.model.logit_scale, self.model.logit_bias
        if self.approximate is None:
            return None
        return measure_agreement(self.approximate, embeddings, k, logit_scale=scale, logit_bias=bias)


def build_classifier(
    loaded: LoadedModel,
    classes: Sequence[str],
    templates: Sequence[str],
    *,
    device: str = "auto",
    precision: str = "auto",
    approximate: bool = False,
    on_classes: Callable[[int], None] = lambda num_classes: None,
) -> ZeroShotClassifier:
    """Embed class prompts with a model's text tower.

    Args:
        loaded: The model.
        classes: Class names.
        templates: Prompt templates with `{c}`.
        device: Where to run it.
        precision: As in `embed_job.embed`.
        approximate: See `classify`.
        on_classes: Called with the number of classes embedded so far.

    Raises:
        UsageError: Approximate, and this CPU does not multiply bf16.
        ClassesError: Names or templates cannot define a classifier.
        ModelError: The model's tokenizer cannot be had.
    """
    check_classes(classes, "classes")
    check_templates(templates, "templates")
    if approximate and choose_precision("auto", choose_device("cpu")) != "bf16":
        raise UsageError(
            "this CPU has no bf16 instructions, without which approximate is slower than exact: leave it out"
        )
    chosen = choose_devices(device)[0]
    tower = TextTower(loaded, device=chosen, precision=choose_precision(precision, chosen))
    vectors = embed_classes(tower, classes, templates, on_classes)
    return ZeroShotClassifier(classes, vectors, loaded.info, approximate=approximate)
