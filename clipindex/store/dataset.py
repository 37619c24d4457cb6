"""What a directory is: its dataset.json, the schemas of its files, and the record that each shard carries."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from clipindex.atomic import create_exclusive, remove_stale_temporaries
from clipindex.errors import FingerprintError, StoreError, UsageError
from clipindex.types import ModelInfo, ModelSpec, Preprocess

FORMAT_VERSION = 1
ROW_GROUP_ROWS = 16_384
"""16 MiB of 512 float16: read back at 870k rows/s, where groups of 200k rows give 180k (page-faulting fresh memory)."""
DTYPES = ("float16", "float32")
FOOTER_KEY = b"clipindex"
PRE_PROJECTION = "pre_projection"
"""The column of features before the projection."""
NORM_COLUMNS = {"embedding": "norm", PRE_PROJECTION: "pre_projection_norm"}
"""What a vector's length was before it was brought to one, by the vector's column."""
IMPORTED = "imported"
"""The decoder of shards whose vectors another program made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """What all shards of an embedding directory share: the content of dataset.json."""

    format_version: int
    model: ModelInfo
    dtype: str
    """Of the embedding column: 'float16' or 'float32'."""
    created_by: str
    """Program and version."""
    pre_projection: ModelInfo | None = None
    """Of the column of that name: the model's features before its projection, where they were embedded as well."""

    def before_projection(self) -> ModelInfo | None:
        """Of the features before a projection, in whatever column; None where there are none."""
        return self.model if self.model.features == "pre-projection" else self.pre_projection


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """Where a published shard came from and what became of its samples."""

    name: str
    url: str
    size: int
    """Bytes of the tar, or of the imported file."""
    version: str
    """Of that file when it was read, as in `Shard`."""
    samples: int
    rows: int
    rejects: int
    fingerprint: str
    precision: str
    """Of the weights, when these rows were made; 'unknown' of imported ones."""
    decoder: str
    """'exact', 'fast', 'cuda' where nvJPEG decoded some of the images, or `IMPORTED`."""
    device: str
    """'unknown' for imported rows."""
    seconds: float
    """From the shard's first sample to its publication."""
    broken: str | None = None
    """Where and why the tar's stream breaks, of a shard whose samples before that were salvaged."""

    @property
    def is_imported(self) -> bool:
        """Whether the rows are another program's vectors, with no tar to look them up in."""
        return self.decoder == IMPORTED


LABELS_TYPE = pa.list_(pa.field("element", pa.int32(), nullable=False))


def embedding_schema(dataset: Dataset) -> pa.Schema:
    """Arrow schema of an embeddings file; no part of an embedding is nullable, which quintuples reading speed."""
    element = pa.field("element", pa.float16() if dataset.dtype == "float16" else pa.float32(), nullable=False)
    before = dataset.pre_projection
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("embedding", pa.list_(element, dataset.model.dim), nullable=False),
            pa.field("norm", pa.float32(), nullable=False),
            pa.field("label", pa.int32()),
            pa.field("labels", LABELS_TYPE),
            pa.field("caption", pa.string()),
            pa.field("meta", pa.string()),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("tar_offset", pa.int64()),
            pa.field("tar_size", pa.int64(), nullable=False),
        ]
        + (
            []
            if before is None
            else [
                pa.field(PRE_PROJECTION, pa.list_(element, before.dim), nullable=False),
                pa.field(NORM_COLUMNS[PRE_PROJECTION], pa.float32(), nullable=False),
            ]
        )
    )


REJECT_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("member", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("tar_offset", pa.int64()),
    ]
)


def open_dataset(
    folder: Path,
    model: ModelInfo,
    dtype: str,
    created_by: str,
    pre_projection: ModelInfo | None = None,
    *,
    create: bool = True,
) -> Dataset:
    """Make a directory the home of one model's embeddings, or check that it is already.

    Args:
        folder: The directory.
        model: Of the embeddings.
        dtype: Of the embedding column.
        created_by: Program and version.
        pre_projection: Of the features before the projection, where they are kept as well.
        create: Or only say what `claim_dataset` will make of it, where there is none yet.

    Raises:
        FingerprintError: It holds another model's embeddings; both are named.
        StoreError: It holds embeddings of another dtype, or other columns of them, or dataset.json is damaged.
    """
    wanted = Dataset(
        format_version=FORMAT_VERSION, model=model, dtype=dtype, created_by=created_by, pre_projection=pre_projection
    )
    found = claim_dataset(folder, wanted) if create or (folder / "dataset.json").exists() else wanted
    remove_stale_temporaries(folder)
    remove_stale_temporaries(folder / "embeddings")
    remove_stale_temporaries(folder / "rejects")
    return found


def claim_dataset(folder: Path, wanted: Dataset) -> Dataset:
    """Publish a directory's dataset.json, or check that the one that is there says the same.

    Raises:
        As `open_dataset`.
    """
    create_exclusive(folder / "dataset.json", json.dumps(asdict(wanted), indent=2).encode() + b"\n")
    found = read_dataset(folder)
    if found.model.features != wanted.model.features and found.model.spec == wanted.model.spec:
        raise FingerprintError(
            f"{folder} holds {found.model.features} features of {describe_model(found.model)}, not"
            f" {wanted.model.features} ones; name another --out, or where you embed pass --features"
            f" {found.model.features}"
        )
    check_fingerprint(folder, found.model, wanted.model)
    if found.dtype != wanted.dtype:
        raise StoreError(f"{folder} holds {found.dtype} embeddings; pass --dtype {found.dtype} or another --out")
    if (found.pre_projection is None) != (wanted.pre_projection is None):
        has = "also" if found.pre_projection else "no"
        option = "both" if found.pre_projection else "projected"
        raise StoreError(
            f"{folder} holds {has} features before the projection; name another --out, or where you embed pass"
            f" --features {option}"
        )
    return found


def read_dataset(folder: str | Path) -> Dataset:
    """What a directory's dataset.json says.

    Raises:
        StoreError: There is none, or it cannot be understood.
    """
    path = Path(folder) / "dataset.json"
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StoreError(f"{folder} is no embedding directory: it has no dataset.json") from None
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}); restore it, or embed into a new directory") from error
    if isinstance(document, dict) and document.get("format_version") != FORMAT_VERSION:
        found = document.get("format_version")
        if found is None:
            raise StoreError(f"{path} is damaged: it has no format version; restore it, or embed into a new directory")
        raise StoreError(f"{path}: format version {found}; this clipindex reads version {FORMAT_VERSION}")
    try:
        before = document.get("pre_projection")
        return replace(
            Dataset(**document),
            model=parse_model_info(document["model"]),
            pre_projection=None if before is None else parse_model_info(before),
        )
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise StoreError(f"{path} lacks what it should hold ({error}); restore it") from error


def parse_model_info(document: dict[str, Any]) -> ModelInfo:
    """What `dataclasses.asdict` made of a `ModelInfo`, after a way through JSON.

    Raises:
        TypeError, KeyError, ValueError, AttributeError: It is something else.
    """
    preprocess: dict[str, Any] = {
        field: tuple(value) if isinstance(value, list) else value for field, value in document["preprocess"].items()
    }
    return ModelInfo(**{**document, "spec": ModelSpec(**document["spec"]), "preprocess": Preprocess(**preprocess)})


def check_fingerprint(where: Path, found: ModelInfo, wanted: ModelInfo) -> None:
    """Refuse to mix models.

    Raises:
        FingerprintError: The fingerprints differ.
    """
    if found.fingerprint != wanted.fingerprint:
        raise FingerprintError(
            f"{where} holds embeddings of {describe_model(found)}, not of {describe_model(wanted)};"
            " use that model, or another directory"
        )


def find_vectors(where: Path, dataset: Dataset, wanted: ModelInfo) -> str:
    """The column of a directory that holds a model's vectors.

    Raises:
        FingerprintError: None does.
    """
    if dataset.pre_projection is not None and dataset.pre_projection.fingerprint == wanted.fingerprint:
        return PRE_PROJECTION
    check_fingerprint(where, dataset.model, wanted)
    return "embedding"


def model_before_projection(where: str | Path, dataset: Dataset) -> ModelInfo:
    """Of a directory's features before the projection.

    Raises:
        UsageError: It holds none.
    """
    model = dataset.before_projection()
    if model is None:
        raise UsageError(
            f"{where} holds no features before a projection; embed with --features both, or leave --pre-projection out"
        )
    return model


def describe_model(model: ModelInfo) -> str:
    """One phrase for a person: name, weights, dimensions, short fingerprint."""
    spec = model.spec
    weights = f"random weights, seed {spec.random_init}" if spec.random_init is not None else spec.pretrained
    features = ", before the projection" if model.features == "pre-projection" else ""
    return (
        f"{spec.name}{f' ({weights})' if weights else ''}"
        f" [{model.dim}-d{features}, fingerprint {model.fingerprint[:12]}]"
    )
