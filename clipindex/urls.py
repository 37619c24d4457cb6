"""Where bytes come from: paths and URLs, listed, opened and read.

Remote schemes go through fsspec, local paths through the operating system. No URL runs a program: ``pipe:`` and every
scheme outside `REMOTE_SCHEMES` is refused.
"""

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from clipindex.errors import SourceError

REMOTE_SCHEMES = ("s3", "http", "https", "hf", "gs", "gcs", "az", "abfs")
READ_BUFFER_BYTES = 1 << 20
"""One system call (or range request, times eight) for many tar members."""

# Each back end spells it its own way.
_VERSION_FIELDS = "ETag etag blob_id Content-MD5 Digest LastModified last_modified Last-Modified mtime".split()
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):")


def is_remote(url: str) -> bool:
    """Say whether a source is reached through fsspec.

    Raises:
        SourceError: The scheme is not one of `REMOTE_SCHEMES`.
    """
    match = _SCHEME.match(url)
    if match is None or (os.path.exists(url) and "://" not in url):
        return False
    scheme = match.group(1).lower()
    if scheme == "file":
        return False
    if scheme not in REMOTE_SCHEMES or "::" in url:
        raise SourceError(
            f"{url}: sources of this kind are refused; give a path or one of {', '.join(REMOTE_SCHEMES)}://…"
        )
    return True


def local_path(url: str) -> str:
    """Absolute path of a local source, without ``file://``."""
    return os.path.abspath(os.path.expanduser(url.removeprefix("file://")))


def remote_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system that serves a URL, and the URL's path in it.

    Raises:
        SourceError: The package that speaks the scheme is not installed, or it refuses its settings.
    """
    import fsspec

    try:
        return cast("tuple[Any, str]", fsspec.core.url_to_fs(url))
    except (ImportError, ValueError) as error:
        raise SourceError(f"{url}: {error}") from error


def stat_source(url: str) -> tuple[int, str]:
    """Size in bytes, and a version that changes with the content: ``mtime:NS`` or ``etag:…``.

    Raises:
        SourceError: The source cannot be reached.
    """
    if not is_remote(url):
        try:
            stat = os.stat(local_path(url))
        except OSError as error:
            raise SourceError(f"{url}: {error.strerror}; check the path") from error
        return stat.st_size, f"mtime:{stat.st_mtime_ns}"
    filesystem, path = remote_filesystem(url)
    with _remote_errors(url):
        info = filesystem.info(path)
    for field in _VERSION_FIELDS:
        if info.get(field):
            return int(info.get("size") or 0), f"{field.lower()}:{info[field]}"
    return int(info.get("size") or 0), ""


def open_source(url: str) -> BinaryIO:
    """Open a source for sequential reading, buffered.

    Raises:
        SourceError: The source cannot be opened.
    """
    if not is_remote(url):
        try:
            return open(local_path(url), "rb", buffering=READ_BUFFER_BYTES)
        except OSError as error:
            raise SourceError(f"{url}: {error.strerror}; check the path and its permissions") from error
    filesystem, path = remote_filesystem(url)
    with _remote_errors(url):
        raw = filesystem.open(path, "rb", block_size=8 * READ_BUFFER_BYTES, cache_type="readahead")
    return io.BufferedReader(_Raw(raw, url), READ_BUFFER_BYTES)


def read_range(url: str, offset: int, size: int) -> bytes:
    """Read ``[offset, offset + size)`` of a source: one seek, or one range request.

    Raises:
        SourceError: The source cannot be opened or is shorter than that.
    """
    if is_remote(url):
        filesystem, path = remote_filesystem(url)
        with _remote_errors(url):
            data: bytes = filesystem.cat_file(path, start=offset, end=offset + size)
    else:
        with open_source(url) as file:
            file.seek(offset)
            data = file.read(size)
    if len(data) != size:
        raise SourceError(f"{url}: no {size} bytes at offset {offset}; the file was cut or replaced")
    return data


@contextlib.contextmanager
def _remote_errors(url: str) -> Iterator[None]:
    try:
        yield
    except SourceError:
        raise
    except Exception as error:  # every fsspec back end raises a family of its own
        raise SourceError(f"{url}: {type(error).__name__}: {error}") from error


class _Raw(io.RawIOBase):
    """An fsspec file as a raw stream, so that BufferedReader serves small reads without Python in between."""

    def __init__(self, file: Any, url: str) -> None:  # noqa: ANN401 - fsspec is untyped
        self._file = file
        self._url = url

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - a writable buffer has no public type before 3.12
        with _remote_errors(self._url):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def list_files(url: str, keep: Callable[[str], bool]) -> list[str]:
    """Files below a local or remote folder whose name passes `keep`, sorted by path; hidden ones left out.

    Raises:
        SourceError: A remote folder cannot be listed.
    """
    if not is_remote(url):
        found = (os.path.join(folder, name) for folder, names in _walk(local_path(url)) for name in names)
        return sorted(path for path in found if keep(os.path.basename(path)))
    filesystem, path = remote_filesystem(url)
    with _remote_errors(url):
        return sorted(filesystem.unstrip_protocol(name) for name in filesystem.find(path) if keep(name))


def list_matches(url: str) -> list[str]:
    """URLs of a remote file system that match a glob.

    Raises:
        SourceError: It cannot be asked.
    """
    filesystem, path = remote_filesystem(url)
    with _remote_errors(url):
        return [filesystem.unstrip_protocol(match) for match in filesystem.glob(path)]


def _walk(top: str) -> Iterator[tuple[str, list[str]]]:
    """Folders and the names of their files, hidden ones left out; through links, but into each folder once."""
    entered: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(top, followlinks=True):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in entered:
            folders.clear()
            continue
        entered.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield folder, [name for name in names if not name.startswith(".")]
