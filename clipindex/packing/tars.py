"""Samples into WebDataset tars: keys, members, sizes, and one atomic file after the other.

A key is what stands before the first dot of a member's last component
(https://github.com/webdataset/webdataset#the-webdataset-format). webdataset's own writers are not used: they
put a sample's members in alphabetical order, labels before images, they name a file before it is whole,
and they load torch.
"""

import io
import itertools
import os
import re
import tarfile
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

from clipindex.atomic import atomic_write
from clipindex.packing.sources import SourceImage

MAX_PART_BYTES = 200
"""Of a key's component: leaves room below the 255 of common file systems for a number and an extension."""

Member = tuple[tarfile.TarInfo, bytes]

_UNSAFE = re.compile("[\x00-\x1f\x7f\\\\.\ud800-\udfff]")


def sample_key(name: str) -> str:
    """Key for a source's path: readable, without dots, with '/' between its parts.

    webdataset passes over members in a first folder called ``__…__``, hence the single underscore there.
    """
    stem = os.path.splitext(name)[0]
    parts = [_key_part(part) for part in stem.split("/") if part not in ("", ".")]
    return re.sub("^__+", "_", "/".join(parts)) or "_"


class UniqueKeys:
    """Gives each key once: the first as it is, the next with '-2', '-3', …."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def take(self, key: str) -> str:
        """The key, or the first numbered form of it that is free."""
        unique = key
        while unique in self._counts:
            self._counts[key] += 1
            unique = f"{key}-{self._counts[key]}"
        self._counts[unique] = 1
        return unique


def write_shards(
    folder: Path, samples: Iterator[tuple[str, SourceImage]], max_samples: int, max_bytes: int
) -> Iterator[int]:
    """Publish `0.tar`, `1.tar`, … in a folder, and yield the size of each in bytes.

    Args:
        folder: Where to; tars of these names are replaced.
        samples: Keys, which must be unique, and images; one is held at a time.
        max_samples: Most samples in a tar.
        max_bytes: Largest tar, unless one sample alone is larger.
    """
    members = (_members(key, sample) for key, sample in samples)
    numbered = _number(members, max_samples, max_bytes)
    for number, group in itertools.groupby(numbered, key=itemgetter(0)):
        path = folder / f"{number}.tar"
        with (
            atomic_write(path) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for info, data in itertools.chain.from_iterable(sample for _, sample in group):
                tar.addfile(info, io.BytesIO(data))
        yield path.stat().st_size


def _key_part(part: str) -> str:
    encoded = _UNSAFE.sub("_", part).encode()
    return encoded[:MAX_PART_BYTES].decode(errors="ignore")


def _number(samples: Iterator[list[Member]], max_samples: int, max_bytes: int) -> Iterator[tuple[int, list[Member]]]:
    """Put beside each sample the number of its shard."""
    number, count, size = 0, 0, 0
    for sample in samples:
        added = sum(_stored_bytes(info) for info, _ in sample)
        if count and (count == max_samples or _tar_bytes(size + added) > max_bytes):
            number, count, size = number + 1, 0, 0
        count, size = count + 1, size + added
        yield number, sample


def _members(key: str, sample: SourceImage) -> list[Member]:
    """The image first, so that a streaming reader knows early what the rest belongs to."""
    contents = {sample.extension: sample.image}
    if sample.label is not None:
        contents["cls"] = str(sample.label).encode("ascii")  # no line end, as CLIP_benchmark and webdataset write it
    if sample.caption is not None:
        contents["txt"] = sample.caption.encode()
    return [(_info(f"{key}.{extension}", len(data)), data) for extension, data in contents.items()]


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)  # time, owner and group stay 0: equal sources give equal tars
    info.size = size
    info.mode = 0o644
    return info


def _stored_bytes(info: tarfile.TarInfo) -> int:
    header = info.tobuf(tarfile.PAX_FORMAT, tarfile.ENCODING, "surrogateescape")
    return len(header) + _round_up(info.size, tarfile.BLOCKSIZE)


def _tar_bytes(content_bytes: int) -> int:
    return _round_up(content_bytes + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)


def _round_up(num_bytes: int, unit: int) -> int:
    return (num_bytes + unit - 1) // unit * unit
