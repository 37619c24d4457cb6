"""Where images to pack come from: folders of files, CIFAR's pickles, and (in `pack_table`) tables of paths.

Each file or row comes out once, as an image or as a reject. Nothing here writes. A source is opened and its
labels are settled before its first item is asked for, so that a mistake costs seconds and no output.
"""

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipindex.errors import ClassesError, SourceError, UsageError
from clipindex.packing.cifar import png_images, read_cifar
from clipindex.shards import IMAGE_EXTENSIONS, MAX_BYTES

SPLIT_NAMES = frozenset("train training val valid validation dev test testing".split())
"""Subfolders that are splits of a data set rather than classes, if all of them are called so."""

_EXTENSIONS = {name: name for name in IMAGE_EXTENSIONS} | dict.fromkeys(("jpeg", "jpe", "jfif"), "jpg")
# CLIP_benchmark's writer says jpg for every JPEG as well, and its reader knows jpg, jpeg, png and webp


@dataclass(frozen=True, kw_only=True, slots=True)
class PackReject:
    """A file or row that did not become a sample."""

    name: str
    """Path as the source has it; bytes that are no UTF-8 appear as backslash escapes."""
    reason: str
    """Why, for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceImage:
    """A file or row that becomes a sample."""

    name: str
    """Path as the source has it, '/' between its parts; the key is made from it."""
    extension: str
    """Lower case, without a dot; 'jpg' for every JPEG."""
    image: bytes
    """The encoded image."""
    label: int | None = None
    """Zero-based class index."""
    caption: str | None = None
    """As in the source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A source that was opened; C classes."""

    items: Iterator[SourceImage | PackReject]
    """One for each file or row, in a stable order; to be read once."""
    count: Callable[[], int]
    """How many items there are; may take a pass over the source."""
    classes: tuple[str, ...] | None = None
    """C names to put into prompts, where they are known."""
    num_labels: int = 0
    """One more than the largest label; 0 if there are none."""
    has_captions: bool = False
    """Whether there is a caption column."""
    notes: tuple[str, ...] = ()
    """What the user should know of how the source was understood."""


def open_cifar(root: Path, split: str, *, coarse: bool) -> Source:
    """Open one split of CIFAR-10 or CIFAR-100 (`clipindex.packing.cifar.read_cifar`), as PNG images.

    Raises:
        UsageError: No such split, or coarse labels of CIFAR-10.
        SourceError: The files are not what CIFAR's are.
    """
    data = read_cifar(root, split, coarse=coarse)
    images = zip(data.filenames, data.labels, png_images(data), strict=True)
    return Source(
        items=(SourceImage(name=n, extension="png", image=png, label=label) for n, label, png in images),
        count=lambda: len(data.labels),
        classes=distinct_names(root, data.classes),
        num_labels=len(data.classes),
    )


def open_folder(root: Path, class_names: Sequence[str] | None, *, may_be_splits: bool) -> Source:
    """Open a folder whose subfolders are classes, or one of images that have none.

    Args:
        root: Subfolders are classes, at any depth below; hidden ones and links to folders are not entered.
        class_names: C names in the order of their labels. If the folders bear such names they are labelled by
            name; if none does, by position among the sorted folders (WordNet ids and the like).
        may_be_splits: Accept subfolders that are all called like splits.

    Raises:
        SourceError: The folder cannot be listed, or holds no image and no subfolder.
        UsageError: The subfolders look like splits.
        ClassesError: Two folders give one class name, or they do not fit `class_names`.
    """
    entries = _list_folder(str(root))
    folders = [entry.name for entry in entries if _is_class_folder(entry)]
    if folders and not may_be_splits and SPLIT_NAMES.issuperset(name.lower() for name in folders):
        raise UsageError(
            f"{root}: {', '.join(folders)} look like splits, not classes; pack {root / folders[0]} with "
            f"split={folders[0]!r}, or give kind='folder' if they are classes"
        )
    if not folders and not any(_extension(entry.name) for entry in entries):
        raise SourceError(f"{root}: neither images nor class folders among its {len(entries)} entries")
    classes, labels = _folder_classes(root, folders, class_names) if folders else (None, None)
    empty = [name for name in folders if not _has_image(root / name)]
    return Source(
        items=(_folder_item(root, name, reason, labels) for name, reason in _walk(str(root), "")),
        count=lambda: sum(1 for _ in _walk(str(root), "")),
        classes=classes,
        num_labels=max(labels.values()) + 1 if labels else 0,
        notes=(f"class folders without an image: {', '.join(empty)}",) if empty else (),
    )


def load_image(path: Path, name: str, label: int | None, caption: str | None) -> SourceImage | PackReject:
    """Read one image file, its bytes untouched, or say why it cannot be a sample.

    Args:
        path: Where the file is.
        name: What to call it in the output.
        label: Zero-based class index, if it has one.
        caption: Its caption, if it has one.
    """
    extension = _extension(name)
    if extension is None:
        return reject(name, "not the extension of an image that can be read")
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return reject(name, "not a regular file")
        if not 0 < status.st_size <= MAX_BYTES:
            return reject(name, f"{status.st_size} bytes; an image has 1 to {MAX_BYTES}")
        image = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return reject(name, getattr(error, "strerror", None) or str(error))
    return SourceImage(name=name, extension=extension, image=image, label=label, caption=caption)


def reject(name: str, reason: str) -> PackReject:
    """A reject whose name can be written as UTF-8, whatever bytes the file system gave."""
    readable = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return PackReject(name=readable, reason=reason)


def prompt_name(name: str) -> str:
    """A folder's or label's name as a prompt has it: underscores and runs of blanks become one space."""
    return " ".join(name.replace("_", " ").split())


def distinct_names(root: Path, raw: Sequence[str]) -> tuple[str, ...]:
    """Prompt names of the given ones, in their order.

    Raises:
        ClassesError: One has no text, or two become the same.
    """
    names: dict[str, str] = {}
    for text in raw:
        name = prompt_name(text)
        if not name or not is_text(name):
            raise ClassesError(f"{root}: {text!r} cannot be a class name; rename it")
        if name in names:
            raise ClassesError(f"{root}: {names[name]!r} and {text!r} are both class {name!r}; rename one")
        names[name] = text
    return tuple(names)


def label_index(names: Sequence[str]) -> dict[str, int]:
    """Label of each prompt name; a name that two labels share stands for neither."""
    prompt_names = [prompt_name(name) for name in names]
    counts = Counter(prompt_names)
    return {name: label for label, name in enumerate(prompt_names) if counts[name] == 1}


def is_text(name: str) -> bool:
    """Whether a name from the file system was UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def some(values: Sequence[str], num_shown: int = 5) -> str:
    """The first few of many values, for a message."""
    shown = ", ".join(repr(value) for value in values[:num_shown])
    return f"{shown} and {len(values) - num_shown} more" if len(values) > num_shown else shown


def _extension(name: str) -> str | None:
    return _EXTENSIONS.get(os.path.splitext(name)[1][1:].lower())


def _list_folder(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise SourceError(f"{folder}: {error.strerror}; check the path and its permissions") from error


def _is_class_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")


def _walk(folder: str, prefix: str, reason: str | None = None) -> Iterator[tuple[str, str | None]]:
    """Relative path of every file below, in order, with why it cannot be a sample."""
    for entry in _list_folder(folder):
        name = prefix + entry.name
        is_hidden = entry.name.startswith(".")
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, f"{name}/", reason or ("in a hidden folder" if is_hidden else None))
        elif entry.is_symlink() and entry.is_dir():
            yield name, reason or "a link to a folder; links are followed to files only"
        else:
            yield name, reason or ("a hidden file" if is_hidden else None)


def _has_image(folder: Path) -> bool:
    return any(reason is None and _extension(name) for name, reason in _walk(str(folder), ""))


def _folder_item(root: Path, name: str, reason: str | None, labels: dict[str, int] | None) -> SourceImage | PackReject:
    folder, slash, _ = name.partition("/")
    if reason is None and labels is not None and not slash:
        reason = "outside the class folders"
    if reason is not None:
        return reject(name, reason)
    return load_image(root / name, name, None if labels is None else labels[folder], None)


def _folder_classes(
    root: Path, folders: Sequence[str], given: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, int]]:
    names = distinct_names(root, folders)
    by_position = {folder: label for label, folder in enumerate(folders)}
    if given is None:
        return names, by_position
    index = label_index(given)
    unknown = [folder for folder in folders if prompt_name(folder) not in index]
    if not unknown:
        return tuple(given), {folder: index[prompt_name(folder)] for folder in folders}
    if len(unknown) == len(given) == len(folders):
        return tuple(given), by_position
    raise ClassesError(
        f"{root}: {len(unknown)} of {len(folders)} class folders ({some(unknown)}) are not, or not once, "
        f"among the {len(given)} class names; name each folder's class once, or, where no folder bears its "
        "class's name, give one name for each folder in sorted order"
    )
