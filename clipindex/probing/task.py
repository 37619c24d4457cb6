"""What is to be learned and where it is tested: labelled rows, their classes, and which rows are held out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from clipindex.devices import choose_device, choose_precision
from clipindex.errors import ClassesError, UsageError
from clipindex.losses import ClassLists
from clipindex.probing.lists import LISTS_COLUMN, find_listed_classes, read_all_lists, split_rows, take_lists
from clipindex.probing.rows import FEATURES, Ids, Part, Streamed, find_classes, read_all_labels, split, take_part
from clipindex.prompts import read_classes
from clipindex.store import check_fingerprint, read_dataset
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Labelled rows to learn from, and to be tested on."""

    folder: Path
    model: ModelInfo
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
) -> Task:
    """Read the labels and decide which rows are for what.

    Raises:
        UsageError: Options contradict each other.
        ClassesError: Labels cannot define a probe.
        FingerprintError: The test rows are of another model.
        StoreError: A file is damaged.
    """
    if features not in FEATURES:
        raise UsageError(f"features {features!r}: give {' or '.join(FEATURES)}")
    if test is not None and held_out is not None:
        raise UsageError("rows to test on come from another directory or are held out of this one, not both")
    if held_out is not None and not 0 < held_out < 1:
        raise UsageError(f"{held_out:g} of the rows cannot be held out: give a fraction above 0 and below 1")
    folder = Path(folder)
    model = read_dataset(folder).model
    chosen_device = choose_device(device)
    part, classes, lists, _, left_out = _take(folder, label, None)
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
        model=model,
        features=features,
        classes=classes,
        names=_name_classes(classes, names),
        rows=rows,
        training=training,
        left_out=left_out,
        test=test_rows,
        device=chosen_device,
        low=torch.bfloat16 if choose_precision("auto", chosen_device) == "bf16" else None,
        lists=lists,
    )


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
    check_fingerprint(folder, read_dataset(folder).model, model)
    part, _, lists, unseen, left_out = _take(folder, label, classes)
    return TestRows(parts=(part,), chosen=None, unseen=unseen, left_out=left_out, source=str(folder), lists=lists)


def _name_classes(classes: Sequence[int], names: str | Path | Sequence[str] | None) -> tuple[str, ...] | None:
    """The names of the labels that occur, out of a list in which the place is the label."""
    if names is None:
        return None
    known = read_classes(names) if isinstance(names, str | Path) else list(names)
    beyond = [label for label in classes if not 0 <= label < len(known)]
    if beyond:
        raise ClassesError(
            f"label {beyond[0]} has no name: {len(known)} class names are for the labels 0 to {len(known) - 1};"
            " give the class file that the labels count in"
        )
    return tuple(known[label] for label in classes)
