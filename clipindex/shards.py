"""Shards of a corpus, and the samples in a shard.

A sample is all neighbouring members of a tar that share a key, as WebDataset defines it
(https://github.com/webdataset/webdataset#the-webdataset-format). Every sample comes out once: as a `Sample`, or as a
`Reject` that says why it cannot be one. Members called ``__…__`` are a shard's own notes by that format, no samples.
"""

import glob
import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import BinaryIO, cast
from urllib.parse import urlsplit

from clipindex.errors import ShardError, SourceError
from clipindex.labels import parse_label, parse_list, parse_multi_hot
from clipindex.tar import Member, read_members
from clipindex.types import Reject, Sample, Shard
from clipindex.urls import is_remote, list_files, list_matches, local_path, open_source, stat_source

IMAGE_EXTENSIONS = tuple("webp png jpg jpeg jfif bmp gif tif tiff jp2 j2k avif heic heif ppm pgm pbm pnm tga".split())
"""Looked up in this order; the first four, in theirs, are those of CLIP_benchmark's data sets."""
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
COUNT_FILE = "nshards.txt"
MAX_BYTES = 256 << 20
"""Largest sample that is taken into memory; camera originals stay below a quarter of it."""
MAX_TEXT_BYTES = 16 << 20
"""Largest caption, metadata or array of labels."""
MAX_NAME_CHARACTERS = 4096
"""Longest name of a member, as long as the longest path of Linux."""
LONG_KEY_CHARACTERS = 64
"""Longer keys are remembered by their hash: a tar may have millions."""
MAX_SAMPLE_MEMBERS = 256
"""More members of one key are a tar that was named wrongly."""

_IMAGE_RANK = {extension: rank for rank, extension in enumerate(IMAGE_EXTENSIONS)}
_TEXTS = {"cls", "npy", "txt", "json"}
_NOTE = re.compile(r"__[^/]*__($|/)")


def list_shards(sources: str | Iterable[str]) -> list[Shard]:
    """Find the tars that the sources name, each once, in a stable order.

    Args:
        sources: One or several: paths, folders (every tar below), globs, brace ranges (``{000..999}.tar``), URLs, or
            ``@FILE`` with one of these a line.

    Raises:
        SourceError: A source names nothing, cannot be reached or is of a refused kind; or a folder holds fewer or more
            tars than its ``nshards.txt`` says.
    """
    each = [sources] if isinstance(sources, str) else sources
    urls = list(dict.fromkeys(url for source in each for url in _expand(str(source))))
    with ThreadPoolExecutor(16) as pool:  # a remote source answers one question a round trip
        return list(pool.map(_describe, urls))


def shard_name(url: str) -> str:
    """Stem of a shard's output files: readable, and unique through a hash of the whole URL."""
    parts = re.split(r"[/\\]", re.sub(r"(\.tar|\.tar\.gz|\.tgz)$", "", url))
    readable = "-".join(re.sub(r"[^A-Za-z0-9_.]+", "_", part) for part in parts[-2:] if part)
    # A name with a dot in front would be a hidden file, which readers pass over.
    return f"{readable[-80:].lstrip('.')}-{hashlib.sha256(url.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def read_samples(shard: Shard, *, max_bytes: int = MAX_BYTES) -> Iterator[Sample | Reject]:
    """Stream a shard's samples, in tar order; memory holds one sample at a time, and the keys so far.

    Args:
        shard: The tar.
        max_bytes: Samples with a larger image are rejects.

    Raises:
        ShardError: The stream breaks; what came before is not the whole shard. The sample in hand was the last reject.
        SourceError: The tar cannot be opened, or its file system fails.
    """
    try:
        with open_source(shard.url) as file:
            compressed = file.peek(2)[:2] == b"\x1f\x8b"  # type: ignore[attr-defined]
            stream = cast("BinaryIO", gzip.open(file)) if compressed else file
            yield from _group(read_members(stream, _wants(max_bytes)), not compressed, max_bytes)
    except ShardError as error:
        raise ShardError(f"{shard.url}: {error}") from error
    except SourceError:
        raise
    except OSError as error:
        raise SourceError(f"{shard.url}: {error.strerror or error}; run again once it can be read") from error


def _describe(url: str) -> Shard:
    size, version = stat_source(url)
    return Shard(url=url, name=shard_name(url), size=size, version=version)


def _expand(source: str) -> list[str]:
    if source.startswith("@"):
        return [url for line in _list_lines(source[1:]) for url in _expand(line)]
    if "{" in source and not os.path.exists(local_path(source)):
        from braceexpand import braceexpand

        try:
            expanded = list(braceexpand(source))
        except ValueError as error:
            raise SourceError(f"{source}: a brace is opened and not closed, or closed and not opened") from error
        return [url for one in expanded for url in _expand_globs(one)]
    return _expand_globs(source)


def _list_lines(path: str) -> list[str]:
    with open_source(path) as file:
        try:
            lines = [line.strip() for line in file.read().decode("utf-8-sig").splitlines()]
        except UnicodeDecodeError as error:
            raise SourceError(f"@{path}: not a text file in UTF-8; write one source a line") from error
    sources = [line for line in lines if line and not line.startswith("#")]
    if not sources:
        raise SourceError(f"@{path}: names no source; write one a line")
    if any(line.startswith("@") for line in sources):
        raise SourceError(f"@{path}: names another list; give that on the command line")
    return sources


def _expand_globs(source: str) -> list[str]:
    if is_remote(source):
        return _expand_remote(source)
    path = local_path(source)
    if os.path.isdir(path):
        return _tars_below(path)
    if os.path.exists(path):
        return [path]
    found = sorted(glob.glob(path, recursive=True), key=_natural)
    if not found:
        raise SourceError(f"{source}: no such file, folder or glob match")
    return [url for match in found for url in (_tars_below(match) if os.path.isdir(match) else [match])]


def _expand_remote(source: str) -> list[str]:
    # A signed URL ends in a query, and a star in a query is no glob.
    if urlsplit(source).path.lower().endswith(TAR_SUFFIXES) and "*" not in urlsplit(source).path:
        return [source]
    if "*" not in source:
        return _tars_below(source)
    found = sorted(list_matches(source), key=_natural)
    if not found:
        raise SourceError(f"{source}: no match")
    return found


def _tars_below(folder: str) -> list[str]:
    files = list_files(folder, lambda name: name.lower().endswith(TAR_SUFFIXES) or name.endswith(COUNT_FILE))
    tars = sorted((file for file in files if not file.endswith(COUNT_FILE)), key=_natural)
    if not tars:
        raise SourceError(
            f"{folder}: no {' or '.join(TAR_SUFFIXES)} file below this folder; clipindex pack makes tars of images"
        )
    for note in files:
        if note.rsplit("/", 1)[-1] == COUNT_FILE:
            _check_count(note, [tar for tar in tars if os.path.dirname(tar) == os.path.dirname(note)])
    return tars


def _check_count(note: str, tars: Sequence[str]) -> None:
    """A split that says how many shards it has must have them: a lost tar is lost rows."""
    with open_source(note) as file:
        said = file.read().decode("utf-8", "replace").strip()
    if said != str(len(tars)):
        raise SourceError(
            f"{note} says {said}, but there are {len(tars)} tars beside it; fetch the rest, or correct that file"
        )


def _natural(text: str) -> list[tuple[int, str]]:
    """Sort key under which 2.tar comes before 10.tar."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _split_name(name: str) -> tuple[str, str]:
    """Key and extension: cut at the first dot of the last component, a leading dot apart."""
    dot = name.find(".", name.rfind("/") + 2)
    return (name, "") if dot < 0 else (name[:dot], name[dot + 1 :])


def remembered_key(key: str) -> str:
    """What stands for a key in a set of all those that came before: itself, or its hash where it is long."""
    return key if len(key) <= LONG_KEY_CHARACTERS else hashlib.sha256(key.encode()).hexdigest()


def _wants(max_bytes: int) -> Callable[[str, int], bool]:
    """Which members are taken into memory."""

    @lru_cache(256)
    def most(suffix: str) -> int:
        if suffix in _TEXTS:
            return MAX_TEXT_BYTES
        return -1 if _image_rank(suffix) is None else max_bytes

    def wants(name: str, size: int) -> bool:
        # Found in half the time of an extension; that x.more.json is taken as well does no harm.
        return size <= most(name.rpartition(".")[2].lower()) and len(name) <= MAX_NAME_CHARACTERS

    return wants


@lru_cache(256)  # a corpus has a handful of extensions and asks for each of millions
def _image_rank(extension: str) -> int | None:
    """Place in the look-up order; for ``x.jpg`` and the like after every plain extension."""
    if extension in _IMAGE_RANK:
        return _IMAGE_RANK[extension]
    rank = _IMAGE_RANK.get(extension.rpartition(".")[2])
    return None if rank is None else rank + len(_IMAGE_RANK)


def _group(members: Iterable[Member], seekable: bool, max_bytes: int) -> Iterator[Sample | Reject]:
    seen: set[str] = set()
    group: list[tuple[str, Member]] = []
    current: str | None = None
    excess: str | None = None
    held = 0
    most = max_bytes + len(_TEXTS) * MAX_TEXT_BYTES
    try:
        for member in members:
            name = member.name
            if name.startswith("__") and _NOTE.match(name):
                continue
            key, extension = _split_name(name)
            if key != current:
                if current is not None:
                    yield _sample(current, group, excess, seen, seekable, max_bytes)
                current, group, excess, held = key, [], None, 0
            held += 0 if member.data is None else member.size
            if len(name) <= MAX_NAME_CHARACTERS and held <= most and len(group) < MAX_SAMPLE_MEMBERS:
                group.append((extension.lower(), member))
            elif excess is None:  # the first such member stays, as the one to name; memory for more is not spent
                excess = _excess(name, held > most)
                group.append((extension.lower(), member))
    except (ShardError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        if current is not None:
            reason = f"the tar breaks in or after this sample: {error}"
            yield _tar_reject(current, group, reason, seekable)
        raise ShardError(str(error)) from error
    if current is not None:
        yield _sample(current, group, excess, seen, seekable, max_bytes)


def _excess(name: str, too_large: bool) -> str:
    if too_large:
        return "more bytes than one image and its texts may have"
    if len(name) > MAX_NAME_CHARACTERS:
        return f"a name of {len(name)} characters, more than {MAX_NAME_CHARACTERS},"
    return f"more than {MAX_SAMPLE_MEMBERS}"


def _tar_reject(key: str, group: list[tuple[str, Member]], reason: str, seekable: bool) -> Reject:
    first = group[0][1]
    where = first.offset if seekable else None
    key, name = key[:MAX_NAME_CHARACTERS], first.name[:MAX_NAME_CHARACTERS]
    return Reject(key=key, member=name, stage="tar", reason=reason, tar_offset=where)


def _sample(
    key: str, group: list[tuple[str, Member]], excess: str | None, seen: set[str], seekable: bool, max_bytes: int
) -> Sample | Reject:
    """One row's worth of members, checked."""
    if len(key) <= MAX_NAME_CHARACTERS:
        remembered = remembered_key(key)
        if remembered in seen:
            reason = f"key {key!r} came before in this tar, apart from these members: {_names(group)}"
            return _tar_reject(key, group, reason, seekable)
        seen.add(remembered)
    if excess is not None:
        return _tar_reject(key, group, f"{excess} among the members: {_names(group)}", seekable)
    fields = dict(group)
    repeated = len(fields) != len(group)
    images = sorted([(rank, extension) for extension in fields if (rank := _image_rank(extension)) is not None])
    if repeated or not images or _ambiguous(images):
        what = "a member twice" if repeated else "several images" if images else "no image"
        return _tar_reject(key, group, f"{what} among the members: {_names(group)}", seekable)
    image = fields[images[0][1]]
    where = image.offset if seekable else None
    if image.data is None:
        odd = f"{image.size} bytes, more than {max_bytes}" if image.kind == "file" else f"a {image.kind}"
        return Reject(key=key, member=image.name, stage="tar", reason=f"the image is {odd}", tar_offset=where)
    try:
        label, labels = _labels(fields)
        return Sample(
            key=key,
            member=image.name,
            image=image.data,
            tar_offset=where,
            label=label,
            caption=_text(fields.get("txt")),
            meta=_text(fields.get("json")),
            labels=labels,
        )
    except ValueError as error:
        return Reject(key=key, member=image.name, stage="label", reason=str(error), tar_offset=where)


def _ambiguous(images: list[tuple[int, str]]) -> bool:
    """Whether the best-ranked image is a compound extension with a rival: left.jpg beside right.jpg."""
    return images[0][0] >= len(_IMAGE_RANK) and len(images) > 1


def _names(group: list[tuple[str, Member]]) -> str:
    names = [member.name[:200] for _, member in group[:4]]
    return ", ".join(names) + (f" and {len(group) - 4} more" if len(group) > 4 else "")


def _labels(fields: dict[str, Member]) -> tuple[int | None, tuple[int, ...] | None]:
    """The class, or the classes: of `.cls`; where there is none of `.npy`; where that is missing too of `.json`."""
    member = fields.get("cls")
    if member is not None:
        found = parse_label(member.name, _decoded(member))
        return (found, None) if isinstance(found, int) else (None, found)
    member = fields.get("npy")
    if member is not None and member.data is not None:  # what is too large to be taken into memory is no such list
        classes = parse_multi_hot(member.name, member.data)
        if classes is not None:
            return None, classes
    member = fields.get("json")
    return None, None if member is None else parse_list(member.name, _decoded(member))


def _text(member: Member | None) -> str | None:
    return None if member is None else _decoded(member)


def _decoded(member: Member) -> str:
    return _data(member).decode("utf-8", "backslashreplace")


def _data(member: Member) -> bytes:
    if member.data is None:
        odd = f"{member.size} bytes" if member.kind == "file" else f"a {member.kind}"
        raise ValueError(f"{member.name} is {odd}")
    return member.data
