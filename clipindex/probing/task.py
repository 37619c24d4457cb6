"""What is to be learned and where it is tested: labelled rows, their classes, and which rows are held out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from clipindex.allocator import share_one_arena
from clipindex.atomic import check_folder
from clipindex.devices import choose_device, choose_precision
from clipindex.errors import ClassesError, UsageError
from clipindex.logistic import ClassLists
from clipindex.probing.lists import LISTS_COLUMN, find_listed_classes, read_all_lists, split_rows, take_lists
from clipindex.probing.rows import FEATURES, Ids, Part, Streamed, find_classes, read_all_labels, split, take_part
from clipindex.prompts import read_classes
from clipindex.store import find_vectors, model_before_projection, read_dataset
from clipindex.types import ModelInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class TestRows:
    """Rows that nothing is learned from."""

    __test__ = False

    parts: tuple[Part, ...]
    chosen: Ids | None
    """Numbers among the labelled rows of `parts`; None for all."""
    unseen: dict[int, int]
    """Rows of each label that is none of the classes."""
    left_out: int
    """Rows without a label."""
    source: str
    """Where they are from, for the record."""
    lists: ClassLists | None = None
    """Of `parts`, where rows have any number of classes."""

    def rows(self, features: str, device: torch.device) -> Streamed:
        """The rows, with features of a kind."""
        return Streamed(self.parts, features, device)

    def embeddings(self, device: torch.device) -> Streamed:
        """The same rows as unit vectors in the space that texts share, whatever a probe learns from."""
        return Streamed([replace(part, vectors="embedding") for part in self.parts], "normalized", device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Labelled rows to learn from, and to be tested on."""

    folder: Path
    out: Path
    """Where what is learned goes."""
    model: ModelInfo
    """Of the vectors that are learned from."""
    features: str
    classes: tuple[int, ...]
    names: tuple[str, ...] | None
    rows: Streamed
    """All labelled rows of the directory."""
    training: Ids
    """Numbers of those to learn from."""
    left_out: int
    """Rows of the directory without a label."""
    test: TestRows | None
    device: torch.device
    low: torch.dtype | None
    """Type of the products of the first passes."""
    lists: ClassLists | None = None
    """Of all rows with one, where rows have any number of classes."""


def pose_task(
    folder: str | Path,
    *,
    label: str,
    features: str,
    test: str | Path | None,
    held_out: float | None,
    seed: int,
    names: str | Path | Sequence[str] | None,
    device: str,
    pre_projection: bool,
    out: str | Path | None,
) -> Task:
    """Read the labels and decide which rows are for what; `train.train_probe` says what the arguments mean.

    Raises:
        UsageError: Options contradict each other.
        ClassesError: Labels cannot define a probe.
        FingerprintError: The test rows are of another model.
        StoreError: A file is damaged, or nothing can be written to `out`.
    """
    check_choices(features, held_out, is_tested_elsewhere=test is not None)
    folder = Path(folder)
    target = Path(out) if out is not None else folder / "probe"
    if test is not None:
        check_test_is_other(Path(test), [folder])
    dataset = read_dataset(folder)
    check_folder(target)
    model = model_before_projection(folder, dataset) if pre_projection else dataset.model
    chosen_device = choose_device(device)
    share_one_arena()
    part, classes, lists, _, left_out = _take(folder, label, None)
    part = replace(part, vectors=find_vectors(folder, dataset, model))
    rows = Streamed([part], features, chosen_device)
    training = torch.arange(len(rows.class_ids)).numpy()
    test_rows = None
    if held_out is not None:
        training, chosen = (
            split(rows.class_ids, held_out, seed) if lists is None else split_rows(len(training), held_out, seed)
        )
        source = f"{held_out:g} of {folder}, held out"
        test_rows = TestRows(parts=(part,), chosen=chosen, unseen={}, left_out=0, source=source, lists=lists)
    elif test is not None:
        test_rows = _other_directory(Path(test), model, classes, label)
    return Task(
        folder=folder,
        out=target,
        model=model,
        features=features,
        classes=classes,
        names=name_classes(classes, names),
        rows=rows,
        training=training,
        left_out=left_out,
        test=test_rows,
        device=chosen_device,
        low=low_precision(chosen_device),
        lists=lists,
    )


def check_choices(features: str, held_out: float | None, *, is_tested_elsewhere: bool) -> None:
    """Refuse options that contradict each other.

    Raises:
        UsageError: They do.
    """
    if features not in FEATURES:
        raise UsageError(f"features {features!r}: give {' or '.join(FEATURES)}")
    if is_tested_elsewhere and held_out is not None:
        raise UsageError("rows to test on come from another directory or are held out of this one, not both")
    if held_out is not None and not 0 < held_out < 1:
        raise UsageError(f"{held_out:g} of the rows cannot be held out: give a fraction above 0 and below 1")


def check_test_is_other(test: Path, learned: Sequence[Path]) -> None:
    """Refuse to test on the rows that are learned from.

    Raises:
        UsageError: It is one of those directories.
    """
    if test.resolve() in [folder.resolve() for folder in learned]:
        raise UsageError(
            f"{test} is learned from, so testing on it says nothing: name another directory, or hold rows out (--split)"
        )


def low_precision(device: torch.device) -> torch.dtype | None:
    """The type of the products of a fit's first passes on a device; None where none is faster than float32."""
    return torch.bfloat16 if choose_precision("auto", device) == "bf16" else None


def _take(
    folder: Path, label: str, classes: Sequence[int] | None
) -> tuple[Part, tuple[int, ...], ClassLists | None, dict[int, int], int]:
    """Labelled rows, classes (those that occur, unless they are given), lists, unseen labels, rows left out."""
    if label == LISTS_COLUMN:
        listed = read_all_lists(folder)
        found = find_listed_classes(listed) if classes is None else tuple(classes)
        part, lists, unseen = take_lists(listed, found)
        return part, found, lists, unseen, listed.left_out
    labels = read_all_labels(folder, label)
    found = find_classes(labels) if classes is None else tuple(classes)
    part, unseen = take_part(labels, found)
    return part, found, None, unseen, labels.left_out


def _other_directory(folder: Path, model: ModelInfo, classes: Sequence[int], label: str) -> TestRows:
    vectors = find_vectors(folder, read_dataset(folder), model)
    part, _, lists, unseen, left_out = _take(folder, label, classes)
    part = replace(part, vectors=vectors)
    return TestRows(parts=(part,), chosen=None, unseen=unseen, left_out=left_out, source=str(folder), lists=lists)


def read_names(names: str | Path | Sequence[str]) -> list[str]:
    """Class names, out of a file unless they are given."""
    return read_classes(names) if isinstance(names, str | Path) else list(names)


def name_classes(classes: Sequence[int], names: str | Path | Sequence[str] | None) -> tuple[str, ...] | None:
    """The names of the labels that occur, out of a list in which the place is the label.

    Raises:
        ClassesError: A label has none.
    """
    if names is None:
        return None
    known = read_names(names)
    beyond = [label for label in classes if not 0 <= label < len(known)]
    if beyond:
        raise ClassesError(
            f"label {beyond[0]} has no name: {len(known)} class names are for the labels 0 to {len(known) - 1};"
            " give the class file that the labels count in"
        )
    return tuple(known[label] for label in classes)
