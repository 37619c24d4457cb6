"""What lies beside vectors: tables and lists of ids of other tools, as the fields of our rows."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from clipindex.errors import ShardError
from clipindex.exchange.vectors import open_array
from clipindex.labels import class_set
from clipindex.shards import MAX_NAME_CHARACTERS

AT_ONCE = 4096
"""Rows: 16 MiB of 512 numbers in double precision."""

_LEAST_INT32, _MOST_INT32 = -(2**31), 2**31 - 1
_PANDAS_INDEX = re.compile(r"__index_level_\d+__$")


class Rows(NamedTuple):
    """Consecutive rows; each list has one entry a row."""

    keys: list[str]
    """Empty where there is none."""
    labels: list[int | None]
    label_lists: list[tuple[int, ...] | None]
    """Of rows with any number of classes."""
    captions: list[str | None]
    metas: list[str | None]
    """All that is left, as JSON."""
    sizes: list[tuple[int, int]]
    """Width and height of the image, 0 where nobody says."""
    norms: list[float | None]
    """The vector's length before somebody normalised it, where that is said."""
    faults: dict[int, tuple[str, str]]
    """Stage and reason, by place, of rows that cannot be taken."""


class RowFile(NamedTuple):
    """A file of rows that has been opened."""

    num_rows: int
    blocks: Iterator[Rows]
    """Of as many rows at most as were asked for."""


def open_rows(path: Path, at_once: int = AT_ONCE) -> RowFile:
    """Open a file that says whose vectors they are: Parquet, a .npy of strings or numbers, or a text with an id a line.

    Raises:
        ShardError: It cannot be understood; also raised by its blocks.
    """
    if path.suffix == ".parquet":
        return _open_parquet(path, at_once)
    if path.suffix == ".npy":
        return _open_npy(path, at_once)
    return _open_text(path, at_once)


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ShardError(f"{path}: cannot be read ({error}); restore it") from error


def _open_parquet(path: Path, at_once: int) -> RowFile:
    with _errors_of(path):
        file = pq.ParquetFile(path, memory_map=True)
        names = file.schema_arrow.names
        count = file.metadata.num_rows
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ShardError(f"{path}: column {twice[0]!r} comes twice; rename one")
    key = _key_column(path, [name for name in names if not _PANDAS_INDEX.match(name)], file.schema_arrow)

    def blocks() -> Iterator[Rows]:
        with file, _errors_of(path):
            for batch in file.iter_batches(at_once):
                batch.validate(full=True)
                yield _rows(batch, key)

    return RowFile(count, blocks())


def _key_column(path: Path, names: Sequence[str], schema: pa.Schema) -> str:
    only = names if len(names) == 1 and names[0] not in _TAKERS else []
    key = next((name for name in ("key", "image_path", *only) if name in names), None)
    if key is None:
        raise ShardError(f"{path}: none of its columns ({', '.join(names)}) is called key or image_path; rename one")
    kind = schema.field(key).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (_is_text(kind) or pa.types.is_integer(kind)):
        raise ShardError(f"{path}: column {key!r} is {kind}; keys are strings or integers")
    return key


def _open_npy(path: Path, at_once: int) -> RowFile:
    ids = open_array(path)
    if ids.ndim != 1 or ids.dtype.kind not in "USiu":
        raise ShardError(f"{path}: holds {ids.dtype} {list(ids.shape)}; ids are strings or integers [N]")

    def blocks() -> Iterator[Rows]:
        with _errors_of(path):
            for first in range(0, len(ids), at_once):
                block = ids[first : first + at_once].tolist()
                yield _only_keys([one.decode() if isinstance(one, bytes) else str(one) for one in block])

    return RowFile(len(ids), blocks())


def _open_text(path: Path, at_once: int) -> RowFile:
    with _errors_of(path), open(path, encoding="utf-8-sig") as file:
        count = sum(1 for _ in file)

    def blocks() -> Iterator[Rows]:
        with _errors_of(path), open(path, encoding="utf-8-sig") as file:
            while lines := list(islice(file, at_once)):
                yield _only_keys([line.removesuffix("\n") for line in lines])

    return RowFile(count, blocks())


def _only_keys(keys: Sequence[str]) -> Rows:
    return _rows(pa.record_batch({"key": pa.array(keys, pa.string())}), "key")


def _rows(batch: pa.RecordBatch, key: str) -> Rows:
    """Some rows of a table, each column where it belongs."""
    columns = {name: _plain_column(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    keys = ["" if value is None else str(value) for value in columns.pop(key).to_pylist()]
    faults = {at: ("tar", why) for at, one in enumerate(keys) if (why := _key_fault(one))}
    keys = [one[:MAX_NAME_CHARACTERS] for one in keys]
    taken: dict[str, list[Any]] = {}
    for name, takes in _TAKERS.items():
        if name in columns and takes(columns[name].type):
            taken[name] = columns.pop(name).to_pylist()
    nothing: list[None] = [None] * len(keys)
    labels: list[int | None] = []
    for at, value in enumerate(taken.get("label", nothing)):
        label, why = _label(value)
        labels.append(label)
        if why:
            faults.setdefault(at, ("label", why))
    label_lists: list[tuple[int, ...] | None] = []
    for at, values in enumerate(taken.get("labels", nothing)):
        classes, why = _classes(values)
        label_lists.append(classes)
        if why:
            faults.setdefault(at, ("label", why))
    sizes = zip(taken.get("width", nothing), taken.get("height", nothing), strict=True)
    return Rows(
        keys,
        labels,
        label_lists,
        taken.get("caption", nothing),
        _metas(keys, taken.get("meta", nothing), columns),
        [(_pixels(width), _pixels(height)) for width, height in sizes],
        taken.get("norm", nothing),
        faults,
    )


def _plain_column(column: pa.Array) -> pa.Array:
    """Categories of pandas as what they stand for, and times as text: Python knows no nanoseconds."""
    if pa.types.is_dictionary(column.type):
        return column.dictionary_decode()
    return column.cast(pa.string()) if pa.types.is_timestamp(column.type) else column


def _is_text(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _is_float(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind))


def _is_number(kind: pa.DataType) -> bool:
    # pandas makes floats of integers as soon as one is missing.
    return bool(pa.types.is_integer(kind)) or _is_float(kind)


def _is_list_of_integers(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return bool(is_list and pa.types.is_integer(kind.value_type))


_TAKERS: dict[str, Callable[[pa.DataType], bool]] = {
    "label": _is_number,
    "labels": _is_list_of_integers,
    "caption": _is_text,
    "meta": _is_text,
    "width": _is_number,
    "height": _is_number,
    "norm": _is_float,
}
"""Columns that have a place of their own, where they are of such a type; all others become JSON."""


def _key_fault(key: str) -> str | None:
    if not key:
        return "no key"
    too_long = len(key) > MAX_NAME_CHARACTERS
    return f"a key of {len(key)} characters, more than {MAX_NAME_CHARACTERS}" if too_long else None


def _label(value: float | None) -> tuple[int | None, str | None]:
    if value is None or value != value:
        return None, None
    if not _LEAST_INT32 <= value <= _MOST_INT32 or value != int(value):
        return None, f"label {value:.10g} is no integer of 32 bits"
    return int(value), None


def _classes(values: Sequence[int | None] | None) -> tuple[tuple[int, ...] | None, str | None]:
    if values is None:
        return None, None
    present = [value for value in values if value is not None]
    if len(present) < len(values):
        return None, "labels: one of them is missing"
    try:
        return class_set(present, "labels"), None
    except ValueError as error:
        return None, str(error)


def _pixels(value: float | None) -> int:
    return int(value) if value is not None and 0 < value <= _MOST_INT32 else 0


def _metas(keys: Sequence[str], metas: Sequence[str | None], columns: dict[str, pa.Array]) -> list[str | None]:
    """Columns without a place of their own as one JSON object a row; a text of `meta` goes in and has the last word."""
    names = [name for name in columns if not _PANDAS_INDEX.match(name)]
    if not names:
        return list(metas)
    rows = zip(*(columns[name].to_pylist() for name in names), strict=True)
    fields = (dict(zip(names, row, strict=True)) for row in rows)
    return [_meta(key, meta, row) for key, meta, row in zip(keys, metas, fields, strict=True)]


def _meta(key: str, meta: str | None, row: dict[str, Any]) -> str | None:
    found = {
        name: value
        for name, value in row.items()
        if value is not None and value == value and not (name == "image_path" and value == key)
    }
    if not found:
        return meta
    if meta is not None:
        found |= _object(meta)
    try:
        return json.dumps(found, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:
        return json.dumps(_without_nan(found), ensure_ascii=False, default=_plain)


def _object(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        parsed = json.loads(text)
        if isinstance(parsed, dict):
            return parsed
    return {"meta": text}


def _plain(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def _without_nan(value: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
    """JSON knows no NaN and no infinity."""
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
