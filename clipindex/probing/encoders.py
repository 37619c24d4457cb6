"""What is compared: of which directories what features, how each is called, and its zero-shot classifier."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from clipindex.errors import ModelError, UsageError
from clipindex.logistic import Linear
from clipindex.probing.task import check_test_is_other
from clipindex.probing.zero_shot import zero_shot_linear
from clipindex.store import Dataset, check_fingerprint, find_vectors, read_dataset
from clipindex.types import ModelInfo, ModelSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """One of those that are compared: the features of one kind that a directory holds."""

    at: int
    """Which of the directories."""
    name: str
    """As in `comparison.EncoderResult`."""
    model: ModelInfo
    """Of these features."""
    vectors: str
    """The column of them."""


def check_directories(paths: Sequence[Path], tests: Sequence[Path]) -> None:
    """Refuse directories that cannot be compared, or tested on.

    Raises:
        UsageError: One is named twice, or there are not as many of both.
    """
    for what in (paths, tests):
        twice = [path for at, path in enumerate(what) if path.resolve() in [other.resolve() for other in what[:at]]]
        if twice:
            raise UsageError(
                f"{twice[0]} is given twice: give each directory once; --pre-projection --projected compares what one"
                " holds before and after the projection"
            )
    if tests and len(tests) != len(paths):
        raise UsageError(
            f"{len(paths)} directories to compare and {len(tests)} to test on: give one test directory for each, in the"
            " same order"
        )
    for test in tests:
        check_test_is_other(test, paths)


def choose_encoders(
    paths: Sequence[Path], datasets: Sequence[Dataset], *, projected: bool, pre_projection: bool
) -> list[Encoder]:
    """What is compared of each directory; see `compare.compare_encoders` for what the flags mean.

    Raises:
        UsageError: That is less than two, or features before the projection are asked for, and no directory has any.
    """
    if projected and not pre_projection:
        raise UsageError("--projected goes with --pre-projection: without that, projected features are all there is")
    if pre_projection and not any(dataset.before_projection() for dataset in datasets):
        raise UsageError(
            "no directory holds features before a projection; embed with --features both, or leave --pre-projection out"
        )
    names = _name_models(paths, [dataset.model for dataset in datasets])
    encoders = []
    for at, (folder, dataset, name) in enumerate(zip(paths, datasets, names, strict=True)):
        models = [dataset.model]
        if pre_projection and dataset.pre_projection is not None:
            models = [dataset.model, dataset.pre_projection] if projected else [dataset.pre_projection]
        elif pre_projection and dataset.model.features == "projected":
            log.warning("%s holds no features before a projection: its projected ones are probed", folder)
        for model in models:
            full = f"{name} {model.features}" if len(models) > 1 else name
            encoders.append(Encoder(at=at, name=full, model=model, vectors=find_vectors(folder, dataset, model)))
    if len(encoders) < 2:
        raise UsageError(
            "give two or more embedding directories to compare, or --pre-projection --projected for one that was"
            " embedded with --features both; probe train measures a single one"
        )
    return encoders


def _name_models(folders: Sequence[Path], models: Sequence[ModelInfo]) -> list[str]:
    """What to call each: its model; with the weights, or the directory, where others have the same name.

    A model of a path or a repository goes by the last part of it.
    """
    short = [model.spec.name.rstrip("/").rpartition("/")[2] for model in models]
    weighted = [f"{name} {_weights(model.spec)}".rstrip() for name, model in zip(short, models, strict=True)]
    placed = [f"{name} ({folder})" for name, folder in zip(short, folders, strict=True)]
    return [
        name if short.count(name) == 1 else longer if weighted.count(longer) == 1 else longest
        for name, longer, longest in zip(short, weighted, placed, strict=True)
    ]


def _weights(spec: ModelSpec) -> str:
    if spec.random_init is not None:
        return f"random {spec.random_init}"
    return Path(spec.pretrained).name if spec.pretrained else ""


def check_tests(tests: Sequence[Path], datasets: Sequence[Dataset], encoders: Sequence[Encoder]) -> None:
    """Refuse directories to test on that do not hold what is compared.

    Raises:
        FingerprintError: One is of another model than that which is learned from.
        StoreError: One is no embedding directory.
    """
    for at, (folder, learned) in enumerate(zip(tests, datasets, strict=False)):
        dataset = read_dataset(folder)
        check_fingerprint(folder, dataset.model, learned.model)
        for encoder in encoders:
            if encoder.at == at:
                find_vectors(folder, dataset, encoder.model)


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
