"""One shard in the layouts of other tools; each file appears whole or not at all."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from clipindex.atomic import AtomicFile, atomic_write, write_json
from clipindex.store import AtomicParquet

_SHARED: dict[str, pa.DataType] = {
    "label": pa.int32(),
    "labels": pa.list_(pa.field("element", pa.int32())),
    "caption": pa.string(),
    "meta": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
    "norm": pa.float32(),
    "shard": pa.string(),
    "tar_url": pa.string(),
    "tar_offset": pa.int64(),
    "tar_size": pa.int64(),
}
_COMPRESSED = ["key", *(f"{name}.list.element" if pa.types.is_list(kind) else name for name, kind in _SHARED.items())]
_LEAST_DIGITS = 4
# A shard has one name and one URL.
_REPEATED = ["shard", "tar_url"]


class Block(NamedTuple):
    """Consecutive rows of a shard."""

    embedding: np.ndarray[Any, Any]
    """[n, D]."""
    columns: dict[str, pa.Array]
    """All columns but the embedding, by name; among them those of `_SHARED`, and `key`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One shard among those that are exported."""

    name: str
    number: int
    """From zero."""
    of: int
    rows: int
    dim: int
    dtype: str


def npy_paths(part: Part) -> tuple[Path, ...]:
    """As clip-retrieval names them: numbers as wide as the largest, since its readers sort by name."""
    number = str(part.number).zfill(max(_LEAST_DIGITS, len(str(part.of - 1))))
    return Path("img_emb", f"img_emb_{number}.npy"), Path("metadata", f"metadata_{number}.parquet")


def write_npy(folder: Path, part: Part, blocks: Iterable[Block]) -> None:
    """Vectors [N, D], and beside them whose they are, row by row."""
    vectors, rows = (folder / path for path in npy_paths(part))
    schema = pa.schema([("image_path", pa.string()), ("key", pa.string()), *_SHARED.items()])
    file = AtomicFile(vectors)
    parquet = None
    try:
        parquet = AtomicParquet(rows, schema, compression="zstd", use_dictionary=_REPEATED)
        header = {"descr": np.dtype(part.dtype).str, "fortran_order": False, "shape": (part.rows, part.dim)}
        np.lib.format.write_array_header_1_0(file.file, header)
        for block in blocks:
            file.file.write(np.ascontiguousarray(block.embedding, part.dtype).data)
            parquet.write(
                pa.table({"image_path": block.columns["key"], **block.columns}).select(schema.names).cast(schema)
            )
        file.commit()
    except BaseException:
        file.abort()
        if parquet is not None:
            parquet.abort()
        raise
    parquet.commit()


def parquet_paths(part: Part) -> tuple[Path, ...]:
    """Named for the shard."""
    return (Path(f"{part.name}.parquet"),)


def write_parquet(folder: Path, part: Part, blocks: Iterable[Block]) -> None:
    """One table whose vectors are lists of any length, by their type: all readers know those."""
    element = pa.field("element", pa.from_numpy_dtype(part.dtype))
    schema = _schema(pa.list_(element))
    options: dict[str, Any] = {
        "use_dictionary": _REPEATED,
        "write_statistics": ["key", "label"],
        "compression": {"embedding.list.element": "none", **dict.fromkeys(_COMPRESSED, "zstd")},
    }
    parquet = AtomicParquet(folder / parquet_paths(part)[0], schema, **options)
    try:
        for block in blocks:
            ends = np.arange(len(block.embedding) + 1, dtype=np.int32) * np.int32(part.dim)
            vectors = pa.ListArray.from_arrays(pa.array(ends), _flat(block, part), type=pa.list_(element))
            parquet.write(_table(vectors, block, schema))
    except BaseException:
        parquet.abort()
        raise
    parquet.commit()


def arrow_paths(part: Part) -> tuple[Path, ...]:
    """As Hugging Face datasets names them."""
    return (Path(f"data-{part.number:05}-of-{part.of:05}.arrow"),)


def write_arrow(folder: Path, part: Part, blocks: Iterable[Block]) -> None:
    """An Arrow stream, which Hugging Face datasets map into memory."""
    kind = pa.list_(pa.from_numpy_dtype(part.dtype), part.dim)
    schema = _schema(kind)
    with atomic_write(folder / arrow_paths(part)[0]) as file, pa.ipc.new_stream(file, schema) as stream:
        for block in blocks:
            vectors = pa.FixedSizeListArray.from_arrays(_flat(block, part), type=kind)
            stream.write_table(_table(vectors, block, schema))


def finish_arrow(folder: Path, parts: Sequence[Part]) -> None:
    """Write what `datasets.load_from_disk` asks for beside the data: what is in it, and which files it is."""
    features: dict[str, Any] = {
        "key": _feature(pa.string()),
        # Its earlier releases know no "List", its later ones take this for it.
        "embedding": {
            "feature": _feature(pa.from_numpy_dtype(parts[0].dtype)),
            "length": parts[0].dim,
            "_type": "Sequence",
        },
        **{name: _feature(kind) for name, kind in _SHARED.items()},
    }
    files = [str(path) for part in parts for path in arrow_paths(part)]
    state: dict[str, Any] = {
        "_data_files": [{"filename": file} for file in files],
        "_fingerprint": hashlib.sha256(str(parts).encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    for name, document in (("dataset_info.json", info), ("state.json", state)):
        write_json(folder / name, document)


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "Sequence"}
    name = {"halffloat": "float16", "float": "float32"}.get(str(kind), str(kind))
    return {"dtype": name, "_type": "Value"}


def _schema(vectors: pa.DataType) -> pa.Schema:
    return pa.schema([("key", pa.string()), ("embedding", vectors), *_SHARED.items()])


def _flat(block: Block, part: Part) -> pa.Array:
    return pa.array(block.embedding.astype(part.dtype, copy=False).reshape(-1))


def _table(vectors: pa.Array, block: Block, schema: pa.Schema) -> pa.Table:
    return pa.table({"embedding": vectors, **block.columns}).select(schema.names).cast(schema)
