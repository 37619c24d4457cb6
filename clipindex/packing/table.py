"""Images to pack that a table lists: CSV or tab-separated rows of path, label and caption.

The format is RFC 4180 (https://www.rfc-editor.org/rfc/rfc4180) in UTF-8, with or without a byte order mark.
"""

import csv
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from clipindex.errors import ClassesError, SourceError
from clipindex.packing.sources import (
    PackReject,
    Source,
    SourceImage,
    is_text,
    label_index,
    load_image,
    prompt_name,
    reject,
    some,
)

TAB_SUFFIXES = (".tsv", ".tab")
COLUMNS = ("path", "label", "caption")

_INTEGER = re.compile(r"-?\d+(\.0+)?", re.ASCII)  # "3.0" is how a column with gaps comes out of pandas
_LABEL_LIMIT = 2**31


def open_table(path: Path, class_names: Sequence[str] | None) -> Source:
    """Open a table of image paths; tabs separate its fields if it is called .tsv or .tab, else commas.

    Args:
        path: UTF-8 with a header naming the columns `path` (relative to the table's folder, or absolute),
            `label` and `caption` (both optional). Others are ignored, and noted. A label column that is empty
            throughout counts as none.
        class_names: C names in the order of their labels. Labels may then be these names or their indices.

    Raises:
        SourceError: The file cannot be read, is not UTF-8, breaks the quoting rules or has no `path` column.
        ClassesError: Labels that are negative, or not among the classes.
    """
    rows = _read_rows(path)
    header = _header(path, next(rows, None))
    num_rows, texts = 0, set[str]()
    for _, row in rows:
        num_rows += 1
        texts.add(_cell(header, row, "label") if len(row) == len(header) else "")
    texts.discard("")
    classes, labels = _column_classes(path, texts, class_names) if texts else (None, {})
    others = [name or "(no name)" for name in header if name not in COLUMNS]
    return Source(
        items=_table_items(path, header, labels),
        count=lambda: num_rows,
        classes=classes,
        num_labels=max(labels.values()) + 1 if labels else 0,
        has_captions="caption" in header,
        notes=(f"columns ignored: {', '.join(others)}",) if others else (),
    )


def _read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, with the number of their last line; the header first."""
    delimiter = "\t" if path.suffix.lower() in TAB_SUFFIXES else ","
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            # lenient reading would swallow all rows up to the next quote as one caption
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            yield from ((reader.line_num, row) for row in reader if row)
    except csv.Error as error:
        raise SourceError(f"{path}: line {reader.line_num}: {error}; mend the quoting there") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}; check the path and its permissions") from error


def _header(path: Path, first: tuple[int, list[str]] | None) -> list[str]:
    names = [name.strip().lower() for name in first[1]] if first else []
    twice = [name for name in COLUMNS if names.count(name) > 1]
    if "path" not in names or twice:
        raise SourceError(
            f"{path}: {f'two columns {twice[0]!r}' if twice else 'no column path'} in its header {names}; "
            f"name the columns {', '.join(COLUMNS)}, separated by commas, or by tabs in a {TAB_SUFFIXES[0]}"
        )
    return names


def _cell(header: Sequence[str], row: Sequence[str], column: str) -> str:
    text = row[header.index(column)] if column in header else ""
    return text.strip() if column == "label" else text


def _table_items(path: Path, header: Sequence[str], labels: dict[str, int]) -> Iterator[SourceImage | PackReject]:
    rows = _read_rows(path)
    next(rows)
    for line, row in rows:
        item = _table_item(path.parent, header, row, labels)
        if isinstance(item, PackReject):
            item = PackReject(name=item.name, reason=f"line {line}: {item.reason}")
        yield item


def _table_item(
    folder: Path, header: Sequence[str], row: Sequence[str], labels: dict[str, int]
) -> SourceImage | PackReject:
    if len(row) != len(header):
        return reject(",".join(row[:1]), f"{len(row)} fields under {len(header)} columns")
    name, label = _cell(header, row, "path"), _cell(header, row, "label")
    if not name:
        return reject(name, "no path")
    if labels and not label:
        return reject(name, "no label, where other rows have one")
    return load_image(folder / name, name, labels.get(label), _cell(header, row, "caption") or None)


def _column_classes(
    path: Path, texts: Collection[str], given: Sequence[str] | None
) -> tuple[tuple[str, ...] | None, dict[str, int]]:
    """Class names, where they are known, and the label that each text of the column stands for."""
    index = label_index(given or ())
    unknown = sorted(text for text in texts if prompt_name(text) not in index)
    if given is not None and unknown and not _are_integers(texts):
        raise ClassesError(
            f"{path}: labels {some(unknown)} are not, or not once, among the {len(given)} class names; add "
            "them there, or correct the table"
        )
    if unknown and _are_integers(texts):
        return None if given is None else tuple(given), _integer_labels(path, texts, given)
    names = given or tuple(dict.fromkeys(prompt_name(text) for text in sorted(texts)))
    if not all(name and is_text(name) for name in names):
        raise ClassesError(f"{path}: a label of underscores alone is no class name; rename it")
    index = label_index(names)
    return tuple(names), {text: index[prompt_name(text)] for text in texts}


def _are_integers(texts: Collection[str]) -> bool:
    return all(_INTEGER.fullmatch(text) for text in texts)


def _integer_labels(path: Path, texts: Collection[str], given: Sequence[str] | None) -> dict[str, int]:
    labels = {text: int(text.partition(".")[0]) for text in texts}
    limit = _LABEL_LIMIT if given is None else len(given)
    outside = sorted({label for label in labels.values() if not 0 <= label < limit})
    if outside:
        raise ClassesError(
            f"{path}: label {outside[0]} is outside 0..{limit - 1}; count labels from zero, and leave the "
            "cell of an image that has none empty"
        )
    return labels
