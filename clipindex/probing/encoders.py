"""The directories that are compared: which may be, what their probes learn from, their zero-shot classifiers."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from clipindex.errors import ModelError, UsageError
from clipindex.logistic import Linear
from clipindex.probing.task import check_test_is_other
from clipindex.probing.zero_shot import zero_shot_linear
from clipindex.store import Dataset
from clipindex.types import ModelInfo, ModelSpec

log = logging.getLogger(__name__)


def check_directories(paths: Sequence[Path], tests: Sequence[Path]) -> None:
    """Refuse directories that cannot be compared, or tested on.

    Raises:
        UsageError: There are too few, or one is named twice.
    """
    if len(paths) < 2:
        raise UsageError("give two or more embedding directories to compare; probe train measures a single one")
    for what in (paths, tests):
        twice = [path for at, path in enumerate(what) if path.resolve() in [other.resolve() for other in what[:at]]]
        if twice:
            raise UsageError(f"{twice[0]} is given twice: give each directory once")
    if tests and len(tests) != len(paths):
        raise UsageError(
            f"{len(paths)} directories to compare and {len(tests)} to test on: give one test directory for each, in the"
            " same order"
        )
    for test in tests:
        check_test_is_other(test, paths)


def choose_features(paths: Sequence[Path], datasets: Sequence[Dataset], pre_projection: bool) -> list[ModelInfo]:
    """What the probes of each directory learn from.

    Raises:
        UsageError: Features before the projection are asked for, and no directory has any.
    """
    if not pre_projection:
        return [dataset.model for dataset in datasets]
    found = [dataset.before_projection() for dataset in datasets]
    if not any(found):
        raise UsageError(
            "no directory holds features before a projection; embed with --features both, or leave --pre-projection out"
        )
    for folder, dataset, model in zip(paths, datasets, found, strict=True):
        if model is None and dataset.model.features == "projected":
            log.warning("%s holds no features before a projection: its projected ones are probed", folder)
    return [model or dataset.model for dataset, model in zip(datasets, found, strict=True)]


def embed_names(
    paths: Sequence[Path],
    infos: Sequence[ModelInfo],
    names: Sequence[str] | None,
    labels: Sequence[int],
    prompts: Sequence[str],
    models: Mapping[str | Path, str | ModelSpec],
    precision: str,
    device: torch.device,
    on_note: Callable[[str], None],
) -> list[Linear | str]:
    """For each directory its zero-shot classifier, or why there is none: first of all, since a model may be missing.

    Args:
        paths: The directories.
        infos: Their models.
        names: Class names, if there are any.
        labels: As in `zero_shot_linear`, as the next.
        prompts: Templates.
        models: As in `compare.compare_encoders`.
        precision: Of the text towers.
        device: Where the classifiers go.
        on_note: Called with what is being done.

    Raises:
        UsageError: A model is given for what has no use for it.
        ModelError: A model cannot be loaded.
    """
    given = {Path(folder): model for folder, model in models.items()}
    for folder in given:
        if folder not in paths:
            raise UsageError(f"a model is given for {folder}, which is none of the directories to compare")
        if not infos[paths.index(folder)].has_texts:
            raise UsageError(
                f"a model is given for {folder}, whose embeddings lie in no space with texts: leave it out"
            )
    texts: list[Linear | str] = []
    for folder, info in zip(paths, infos, strict=True):
        if names is None:
            texts.append("no class names were given")
        elif not info.has_texts:
            texts.append("its embeddings lie in no space with texts")
        else:
            on_note(f"embedding class names for {folder}")
            model = given.get(folder)
            spec = _found_at(info.spec, model) if isinstance(model, str) else model
            try:
                texts.append(zero_shot_linear(folder, info, names, labels, prompts, spec, precision, device))
            except ModelError as error:
                raise ModelError(
                    f"{folder}: zero-shot needs its model, {info.spec.name}, which cannot be loaded here: {error}."
                    f" Say where it is with --model {folder} MODEL, or leave --classes out"
                ) from error
    return texts


def _found_at(spec: ModelSpec, place: str) -> ModelSpec:
    """The recorded model with weights from a file, or another one by its name."""
    return replace(spec, pretrained=place, random_init=None) if Path(place).is_file() else ModelSpec(name=place)
