"""Which files there are to import: vectors, each with the rows that belong to them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from clipindex.errors import SourceError, UsageError
from clipindex.shards import shard_name
from clipindex.types import Shard
from clipindex.urls import is_remote, local_path, stat_source

VECTORS, ROWS = "img_emb", "metadata"
"""Folders of clip-retrieval's output, and what its files' names begin with."""


class Pair(NamedTuple):
    """A file of vectors and the file that says whose they are."""

    shard: Shard
    """The .npy file; its URL is an absolute path."""
    rows: Path


def list_pairs(source: str | Path, ids: str | Path | None = None) -> tuple[list[Pair], dict[str, str]]:
    """Find what a source holds.

    Args:
        source: A folder that clip-retrieval wrote, or a .npy file.
        ids: Whose vectors they are, for a .npy file.

    Returns:
        The pairs, in the order of their numbers; and files that have no counterpart, with what is wrong.

    Raises:
        SourceError: The source is missing, remote, or nothing that is known.
        UsageError: `ids` is missing, or there are several files it could belong to.
    """
    for each in (source, ids) if ids is not None else (source,):
        if is_remote(str(each)):
            raise SourceError(f"{each}: vectors are read where they lie; copy them to a local disk first")
    path = Path(local_path(str(source)))
    if path.is_dir():
        if ids is not None:
            raise UsageError(f"{source} is a folder: --ids belongs to one .npy file")
        return _pairs_in(path)
    if not path.exists():
        raise SourceError(f"{source}: no such file or folder")
    if ids is None:
        raise UsageError(f"{source}: give --ids, a file that says whose vectors these are")
    if not Path(local_path(str(ids))).is_file():
        raise SourceError(f"{ids}: no such file")
    return [Pair(_shard(path), Path(local_path(str(ids))))], {}


def _pairs_in(folder: Path) -> tuple[list[Pair], dict[str, str]]:
    vectors = _in_order(folder / VECTORS, ".npy")
    if not vectors:
        raise SourceError(
            f"{folder} is not what clip-retrieval writes: it has no {VECTORS}/{VECTORS}_0.npy or the like;"
            " a single .npy file can be imported with --ids"
        )
    rows = {path.name: path for path in _in_order(folder / ROWS, ".parquet")}
    pairs: list[Pair] = []
    alone: dict[str, str] = {}
    for path in vectors:
        # Other tools name both files alike.
        number = path.stem.removeprefix(f"{VECTORS}_")
        found = rows.pop(f"{ROWS}_{number}.parquet", None) or rows.pop(f"{path.stem}.parquet", None)
        if found is None:
            alone[str(path)] = (
                f"{folder / ROWS / f'{ROWS}_{number}.parquet'} is missing: nobody knows whose vectors these are"
            )
        else:
            pairs.append(Pair(_shard(path), found))
    alone |= {str(path): f"there is no .npy file in {folder / VECTORS} for it; fetch it" for path in rows.values()}
    return pairs, alone


def _in_order(folder: Path, suffix: str) -> Sequence[Path]:
    """2 comes before 10."""
    return sorted(folder.glob(f"[!.]*{suffix}"), key=lambda path: (len(path.name), path.name))


def _shard(path: Path) -> Shard:
    size, version = stat_source(str(path))
    return Shard(url=str(path), name=shard_name(str(path)), size=size, version=version)
