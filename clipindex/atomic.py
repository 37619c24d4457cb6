"""How files appear: whole or not at all, though runs are killed, disks are full, and several write beside each other.

Until then a file has a temporary name, which says whose it is, and is locked while its writer lives.
"""

import atexit
import contextlib
import fcntl
import json
import os
import re
import secrets
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from clipindex.errors import StoreError

STALE_AFTER_S = 86_400
"""Age at which another host's temporary file is taken for the remains of a dead run."""
STATE_BYTES = 1 << 20
"""As much is read of what other runs left or hold."""


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


def write_json(path: Path, document: object) -> None:
    """Write a document for programs and people to read, whole or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(document, indent=2).encode() + b"\n")


def check_folder(folder: Path) -> None:
    """Refuse, before the work is done, a folder in which nothing can be written.

    Raises:
        StoreError: It is a file, or below one, or the system does not let this process write there.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise StoreError(f"{folder}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StoreError(f"{folder}: nothing may be written in {existing}; name another folder")
