"""Where bytes come from and how files appear: URLs in, atomic publishing out.

Reading goes through fsspec for remote schemes and the operating system for local paths. No URL runs a program:
``pipe:`` and every scheme outside `REMOTE_SCHEMES` is refused.
"""

import atexit
import contextlib
import fcntl
import io
import os
import re
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from clipindex.errors import SourceError

REMOTE_SCHEMES = ("s3", "http", "https", "hf", "gs", "gcs", "az", "abfs")
READ_BUFFER_BYTES = 1 << 20
"""One system call (or range request, times eight) for many tar members."""
STALE_AFTER_S = 86_400
"""Age at which another host's temporary file is taken for the remains of a dead run."""
STATE_BYTES = 1 << 20
"""As much is read of what other runs left or hold."""

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


class AtomicFile:
    """A file that appears under its name whole and synced to disk, or not at all."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.temporary = _temporary_beside(self.path, ".tmp")
        _unfinished.add(self.temporary)
        self.file = _create_locked(self.temporary)

    def commit(self) -> None:
        """Sync, rename into place, sync the folder; on any failure nothing is left behind."""
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            os.replace(self.temporary, self.path)  # before its lock goes, lest it be taken for a dead run's
            self.file.close()
        except BaseException:
            self.abort()
            raise
        _unfinished.discard(self.temporary)
        sync_folder(self.path.parent)

    def abort(self) -> None:
        """Drop what was written; safe to call twice."""
        with contextlib.suppress(OSError):  # a full disk fails the flush in close, and the bytes go anyway
            self.file.close()
        self.temporary.unlink(missing_ok=True)
        _unfinished.discard(self.temporary)


_unfinished: set[Path] = set()


@atexit.register
def _remove_unfinished() -> None:
    """Remove what a signal left between a file's creation and the handler that would have aborted it."""
    for path in _unfinished:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Write a file that appears under its name only when the block ends without an error."""
    atomic = AtomicFile(path)
    try:
        yield atomic.file
    except BaseException:
        atomic.abort()
        raise
    atomic.commit()


def create_exclusive(path: Path, data: bytes) -> bool:
    """Publish a whole file only if none has that name; False if one has. Two runs agree on one winner.

    A hard link is atomic and fails if the name is taken, on local file systems and NFS alike. Where a mount knows no
    links (object stores, mostly), exclusive creation has to do.
    """
    if path.exists():
        return False
    atomic = AtomicFile(path)
    try:
        atomic.file.write(data)
        atomic.file.flush()
        os.fsync(atomic.file.fileno())
        _link(atomic.temporary, path, data)
    except FileExistsError:
        return False
    finally:
        atomic.abort()
    sync_folder(path.parent)
    return True


def _link(temporary: Path, path: Path, data: bytes) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        with open(path, "xb") as file:
            try:
                file.write(data)
                file.flush()
            except BaseException:
                path.unlink()
                raise


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_stale_temporaries(folder: Path) -> int:
    """Remove temporary files of runs that are dead: this host's if nobody holds their lock, other hosts' by age."""
    dead = [one.path for one in read_temporaries(folder, "*", ".tmp") if one.is_dead]
    for path in dead:
        path.unlink(missing_ok=True)
    return len(dead)


class Temporary(NamedTuple):
    """What a run left or holds."""

    path: Path
    content: bytes
    """At most `STATE_BYTES` of it."""
    is_locked: bool
    """By a run that lives."""
    is_dead: bool
    """For certain: another host's lock may not show here, so that its files are given a day."""


def read_temporaries(folder: Path, name: str, suffix: str) -> Iterator[Temporary]:
    """All temporary files of that name, which may be ``*``; those that may not be read are left alone."""
    for path in folder.glob(f".{name}.*{suffix}") if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError, PermissionError), open(path, "rb") as file:
            is_locked, is_dead = _state(path, file)
            yield Temporary(path, file.read(STATE_BYTES), is_locked, is_dead)


def create_temporary(path: Path, suffix: str) -> tuple[Path, BinaryIO]:
    """A new file whose name says beside which path, on which host and by which process; locked while it is open."""
    temporary = _temporary_beside(path, suffix)
    return temporary, _create_locked(temporary)


@contextlib.contextmanager
def exclusively(path: Path) -> Iterator[None]:
    """Hold a file's lock; where the file system has none, nobody waits for anybody."""
    # NFS locks exclusively only what may be written.
    with open(path, "r+b" if os.access(path, os.W_OK) else "rb") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _temporary_beside(path: Path, suffix: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f".{path.name}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}{suffix}"


def _state(path: Path, file: BinaryIO) -> tuple[bool, bool]:
    """Whether a temporary file is locked, and whether its run is dead."""
    parts = path.name.split(".")  # …NAME, HOST, PID, TOKEN, suffix
    if len(parts) < 6 or not parts[-3].isdecimal():
        return False, False
    lock_tells = parts[-4] == _host()
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True, False
    except OSError:  # a file system without locks
        lock_tells = False
    return False, lock_tells or _age(path) > STALE_AFTER_S


def _age(path: Path) -> float:
    """By the clock that stamps this folder's files: that of another machine, or one that jumps, proves nothing."""
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:
            return os.fstat(file.fileno()).st_mtime - path.stat().st_mtime
    except OSError:  # a full disk, a missing right: then nothing can be said of it
        return 0.0


def _create_locked(path: Path) -> BinaryIO:
    """Create a file and hold its lock, by which others see that its writer lives."""
    while True:
        file = open(path, "xb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks; age decides there
            return file
        if path.exists():
            return file
        file.close()  # taken for a dead run's in the instant before it was locked


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())


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
