"""Zero-shot classification as what it is, too: a linear classifier, of unit embeddings."""

from collections.abc import Sequence
from pathlib import Path

import torch

from clipindex.devices import choose_precision
from clipindex.logistic import Linear
from clipindex.prompts import embed_classes
from clipindex.types import ModelInfo, ModelSpec


def zero_shot_linear(
    folder: Path,
    info: ModelInfo,
    names: Sequence[str],
    labels: Sequence[int],
    templates: Sequence[str],
    model: ModelSpec | None,
    precision: str,
    device: torch.device,
) -> Linear:
    """The nearest class prompt among all names, whatever labels occur: as `zeroshot.classify` classifies.

    Args:
        folder: The embedding directory.
        info: Of its embeddings.
        names: Class names, whose place is the label.
        labels: Of the class ids 0, 1, … of the rows. Those without a name are never given.
        templates: Prompts.
        model: How to load the model, where the directory's record does not lead to its weights.
        precision: Of the text tower.
        device: Where the classifier goes.

    Returns:
        Weights and intercepts of the class ids in order, then of all other names.

    Raises:
        FingerprintError: The model is not that of the directory.
        ModelError: It cannot be loaded, or knows no texts.
    """
    # Here, since loading open_clip takes longer than training does, and only names need it.
    from clipindex.encode import TextTower
    from clipindex.models import load_model_of

    loaded = load_model_of(folder, info, model)
    tower = TextTower(loaded, device=device, precision=choose_precision(precision, device))
    vectors = torch.from_numpy(embed_classes(tower, names, templates)).to(device) * info.logit_scale
    occurring = set(labels)
    order = [*labels, *(label for label in range(len(names)) if label not in occurring)]
    is_named = torch.tensor([0 <= label < len(names) for label in order], device=device)
    places = torch.tensor([label if 0 <= label < len(names) else 0 for label in order], device=device)
    intercept = torch.where(is_named, 0.0, -torch.inf)
    return vectors[places] * is_named[:, None], intercept
