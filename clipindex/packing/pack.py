"""The `pack` verb: images on disk into WebDataset shards, laid out as CLIP_benchmark's data sets are.

The layout (https://github.com/LAION-AI/CLIP_benchmark, "build_wds_dataset" and "webdataset_builder")::

    OUT/classnames.txt                         a class a line, in the order of the labels
    OUT/zeroshot_classification_templates.txt  a prompt a line, {c} for the class name
    OUT/<split>/0.tar, 1.tar, …                <key>.<image extension>, <key>.cls, <key>.txt
    OUT/<split>/rejects.jsonl                  files that became no sample, and why; only if there are any
    OUT/<split>/nshards.txt                    number of tars; written last: where it is, the pack is complete

Its retrieval task wants an ``OUT/dataset_type.txt`` saying ``retrieval`` besides, which is left to the user.
"""

import contextlib
import fcntl
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from clipindex.atomic import atomic_write, remove_stale_temporaries
from clipindex.errors import ClassesError, SourceError, UsageError
from clipindex.packing.cifar import find_cifar
from clipindex.packing.sources import PackReject, Source, SourceImage, open_cifar, open_folder
from clipindex.packing.table import TAB_SUFFIXES, open_table
from clipindex.packing.tars import UniqueKeys, sample_key, write_shards
from clipindex.prompts import PLACEHOLDER, check_templates, read_classes

Kind = Literal["folder", "cifar", "csv"]
Progress = Callable[[int, int | None], None]

DEFAULT_TEMPLATES = (f"a photo of a {PLACEHOLDER}.",)
CLASS_NAMES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
NUM_SHARDS_FILE = "nshards.txt"
REJECTS_FILE = "rejects.jsonl"
NUM_FIRST_REJECTS = 10
"""Rejects that the summary repeats."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackSummary:
    """What a pack wrote; `num_samples` + `num_rejects` is the number of files or rows in the source."""

    kind: Kind
    """How the source was read."""
    split_dir: Path
    """Folder of the shards."""
    num_shards: int
    """Tars written."""
    num_samples: int
    """Samples in them."""
    num_rejects: int
    """Files or rows that became no sample."""
    num_bytes: int
    """Size of the tars together."""
    classes: tuple[str, ...]
    """Class names in the order of the labels; empty where none are known."""
    first_rejects: tuple[PackReject, ...]
    """The first few rejects."""
    rejects_path: Path | None
    """JSON lines of every reject's `name` and `reason`; None if there are none."""
    notes: tuple[str, ...]
    """What the user should know of how the source was understood."""


def pack(
    source: str | Path,
    out: str | Path,
    *,
    split: str = "train",
    kind: Kind | None = None,
    max_samples: int = 10_000,
    max_bytes: int = 1_000_000_000,
    templates: Sequence[str] | None = None,
    classnames: str | Path | None = None,
    coarse: bool = False,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> PackSummary:
    """Pack a source into one split of a data set; the same source gives the same bytes.

    Sources, told apart by what is there unless `kind` says:

    - 'folder': subfolders are classes, in sorted order, with images at any depth below; or images directly
      inside and no subfolder, packed without labels. Files keep their bytes. No link to a folder is followed.
    - 'cifar': CIFAR-10 or CIFAR-100 for Python, unpacked or as downloaded; becomes PNG. Nothing in it is
      executed.
    - 'csv': a table with a header: `path`, and optionally `label` (zero-based integers, or class names) and
      `caption`; tab-separated if it is called .tsv or .tab. Line breaks in a caption are kept; to
      CLIP_benchmark's retrieval reader each line is a caption of its own.

    Class names feed prompts, so underscores in names of folders, CIFAR's classes and textual labels become
    spaces; names from a `classnames` file stay as they are. Keys are the source's names without extension,
    with '_' for dots, control characters and undecodable bytes; one that came before gets '-2', '-3', ….

    Memory holds one image and the keys so far (of CIFAR, the split). A killed pack leaves whole tars and no
    nshards.txt. Only one pack at a time writes a split.

    Args:
        source: Folder, archive or table to read.
        out: Folder of the data set; other splits may be there.
        split: Name of the split's folder; for CIFAR also which split to read.
        kind: What the source is.
        max_samples: Most samples in a shard.
        max_bytes: Largest tar; only a sample that is larger by itself exceeds it, alone in its shard.
        templates: Prompts with {c} for the class name; by default those already in `out`, else one.
        classnames: UTF-8 file of class names in the order of the labels, for folders and tables. Folders and
            textual labels are then matched by name; folders none of which bears such a name, in sorted order.
        coarse: Label CIFAR-100 by its 20 superclasses.
        overwrite: Replace the split that is there, and class names that no other split depends on.
        on_progress: Called after each file or row with the number done and their total.

    Raises:
        UsageError: Arguments that do not fit each other, or a split that is already there or being written.
        SourceError: The source cannot be read, or nothing in it became a sample.
        ClassesError: Class names, labels or templates that do not work, or other names than those in `out`.
    """
    source, out = Path(source), Path(out)
    split_dir = out / split
    _check_arguments(split, max_samples, max_bytes, templates)
    kind, opened = _open(source, out, split, kind, classnames, coarse)
    with _locked(split_dir):
        _check_split(split_dir, overwrite)
        shared = _shared_files(out, split, opened, templates, overwrite)
        _clear_split(split_dir)
        with contextlib.ExitStack() as stack:
            ledger = _Ledger(split_dir / REJECTS_FILE, stack)
            sizes = list(write_shards(split_dir, ledger.samples(opened, on_progress), max_samples, max_bytes))
            ledger.check(source)
        for path, lines in shared.items():
            _write_lines(path, lines)
        _write_lines(split_dir / NUM_SHARDS_FILE, [str(len(sizes))])
    return PackSummary(
        kind=kind,
        split_dir=split_dir,
        num_shards=len(sizes),
        num_samples=ledger.num_samples,
        num_rejects=ledger.num_rejects,
        num_bytes=sum(sizes),
        classes=opened.classes or (),
        first_rejects=tuple(ledger.first_rejects),
        rejects_path=ledger.path if ledger.num_rejects else None,
        notes=opened.notes,
    )


class _Ledger:
    """Counts what a source gives, keeps its rejects, and hands on its samples under unique keys."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self.path = path
        self.num_samples = 0
        self.num_rejects = 0
        self.first_rejects: list[PackReject] = []
        self._stack = stack
        self._file: BinaryIO | None = None

    def samples(self, source: Source, on_progress: Progress | None) -> Iterator[tuple[str, SourceImage]]:
        """Keys and images, in the source's order."""
        keys = UniqueKeys()
        total = source.count() if on_progress else None
        for item in source.items:
            if isinstance(item, PackReject):
                self._keep(item)
            else:
                yield keys.take(sample_key(item.name)), item
                self.num_samples += 1
            if on_progress:
                on_progress(self.num_samples + self.num_rejects, total)

    def check(self, source: Path) -> None:
        """Refuse a pack of nothing."""
        if not self.num_samples:
            told = "; ".join(f"{reject.name}: {reject.reason}" for reject in self.first_rejects[:3])
            raise SourceError(f"{source}: no image to pack, {self.num_rejects} rejects ({told}); check it")

    def _keep(self, reject: PackReject) -> None:
        if self._file is None:
            self._file = self._stack.enter_context(atomic_write(self.path))
        self._file.write(json.dumps({"name": reject.name, "reason": reject.reason}).encode() + b"\n")
        self.num_rejects += 1
        if len(self.first_rejects) < NUM_FIRST_REJECTS:
            self.first_rejects.append(reject)


def _check_arguments(split: str, max_samples: int, max_bytes: int, templates: Sequence[str] | None) -> None:
    if not re.fullmatch(r"\w[\w.-]*", split):
        raise UsageError(f"split {split!r}: name a folder, in letters, digits, '_', '-' and '.'")
    if max_samples < 1 or max_bytes < 1:
        raise UsageError(f"max_samples {max_samples}, max_bytes {max_bytes}: give at least 1")
    if templates is None:
        return
    check_templates(templates, "templates")
    for template in templates:
        # CLIP_benchmark fills templates in with str.format, to which other braces mean something
        if len(template.splitlines()) != 1 or set("{}").intersection(template.replace(PLACEHOLDER, "")):
            raise ClassesError(f"template {template!r}: give one line, without braces but for {PLACEHOLDER}")


def _open(
    source: Path, out: Path, split: str, kind: Kind | None, classnames: str | Path | None, coarse: bool
) -> tuple[Kind, Source]:
    chosen = kind or _kind_of(source)
    if coarse and chosen != "cifar":
        raise UsageError(f"{source}: coarse labels are CIFAR-100's; leave `coarse` out")
    if classnames is not None and chosen == "cifar":
        raise UsageError(f"{source}: CIFAR brings its class names; leave `classnames` out")
    given = None if classnames is None else read_classes(classnames)
    if chosen == "cifar":
        return chosen, open_cifar(source, split, coarse=coarse)
    if chosen == "csv":
        return chosen, open_table(source, given)
    if chosen != "folder":
        raise UsageError(f"kind {kind!r}: give 'folder', 'cifar' or 'csv'")
    if out.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{out}: inside the folder to pack, {source}; choose a place outside it")
    return chosen, open_folder(source, given, may_be_splits=kind is not None)


def _kind_of(source: Path) -> Kind:
    if source.is_dir():
        return "cifar" if find_cifar(source) else "folder"
    if not source.exists():
        raise SourceError(f"{source}: no such file or folder; check the path")
    name = source.name.lower()
    if name.endswith((".csv", *TAB_SUFFIXES)):
        return "csv"
    if name.endswith((".tar.gz", ".tgz", ".tar")):
        return "cifar"
    raise UsageError(f"{source}: give a folder, CIFAR's .tar.gz or a table (.csv, .tsv), or say its kind")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make a folder and hold it against other packs, at most until the process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be made ({error.strerror}); choose another place") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{folder}: another pack is writing it; wait, or name another split") from None
        except OSError as error:  # some network file systems lock no folders
            _log.debug("%s: packing without a lock (%s)", folder, error)
        yield
    finally:
        os.close(descriptor)


def _is_pack_file(path: Path) -> bool:
    return path.name == NUM_SHARDS_FILE or path.suffix == ".tar"


def _check_split(split_dir: Path, overwrite: bool) -> None:
    found = sorted(path.name for path in split_dir.iterdir() if _is_pack_file(path))
    if found and not overwrite:
        done = "a finished pack" if NUM_SHARDS_FILE in found else f"an unfinished pack (no {NUM_SHARDS_FILE})"
        raise UsageError(
            f"{split_dir}: holds {done}; --overwrite (overwrite=True) replaces it, or name another split or folder"
        )
    foreign = [name for name in found if name != NUM_SHARDS_FILE and not re.fullmatch(r"\d+\.tar", name)]
    if foreign:
        raise UsageError(f"{split_dir}: {foreign[0]} is not pack's to replace; move it, or name another split")


def _clear_split(split_dir: Path) -> None:
    remove_stale_temporaries(split_dir)
    (split_dir / NUM_SHARDS_FILE).unlink(missing_ok=True)  # first, lest a kill leave half a pack that says whole
    (split_dir / REJECTS_FILE).unlink(missing_ok=True)
    for path in split_dir.glob("*.tar"):
        path.unlink()


def _shared_files(
    out: Path, split: str, source: Source, templates: Sequence[str] | None, overwrite: bool
) -> dict[Path, Sequence[str]]:
    """Files of the data set as a whole that are to be written, checked against those there."""
    others = (folder for folder in out.iterdir() if folder.is_dir() and folder.name != split)
    may_replace = overwrite and not any(_is_pack_file(path) for folder in others for path in folder.iterdir())
    class_names, prompts = out / CLASS_NAMES_FILE, out / TEMPLATES_FILE
    files: dict[Path, Sequence[str]] = {}
    if class_names.exists() and not (may_replace and source.classes):
        _check_classes(class_names, source)
    elif source.classes:
        files[class_names] = source.classes
    if templates is not None:
        if prompts.exists() and not may_replace and _lines(prompts) != list(templates):
            raise UsageError(f"{prompts}: holds other templates; give none, or edit that file")
        files[prompts] = templates
    elif source.classes and not prompts.exists():
        files[prompts] = DEFAULT_TEMPLATES
    return files


def _check_classes(path: Path, source: Source) -> None:
    there = read_classes(path)
    if source.classes is None:
        if source.num_labels > len(there):
            raise ClassesError(
                f"{path}: has {len(there)} classes, the source a label {source.num_labels - 1}; correct one"
            )
        return
    lines = enumerate(itertools.zip_longest(there, source.classes), 1)
    differing = next((f"line {at} is {old!r}, not {new!r}" for at, (old, new) in lines if old != new), None)
    if differing:
        raise ClassesError(
            f"{path}: its {len(there)} classes are not the source's {len(source.classes)}: {differing}; "
            f"use its names (classnames={str(path)!r}), or pack into another folder"
        )


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    with atomic_write(path) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
