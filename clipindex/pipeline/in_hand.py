"""What a run has in hand, in a file that outlives its process: the shards it embeds, the images it decodes.

    DIR/.run.HOST.PID.TOKEN.hand    cells of 24 bytes: kind (8), digest (16); zeros where nothing is in hand

While the run lives, others leave its shards to it. Had it died, the images are suspects: one of them may have taken the
process with it. Runs that find the file decode those in processes of their own, so that no image ends a night twice.
A file that is locked while its run lives needs nobody to remove it; where the file system has no locks, runs do each
other's shards again, and the first to publish wins.
"""

import contextlib
import hashlib
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from clipindex.atomic import create_temporary, read_temporaries
from clipindex.errors import StoreError
from clipindex.types import Shard

SHARDS_IN_FLIGHT = 8
"""Of a pipeline: one is read while what came before waits to be published."""

_NAME, _SUFFIX = "run", ".hand"
_SHARD, _IMAGE = b"shard\0\0\0", b"image\0\0\0"
_DIGEST_BYTES = 16
_CELL_BYTES = len(_SHARD) + _DIGEST_BYTES
_NOTHING = bytes(_CELL_BYTES)

log = logging.getLogger(__name__)

Hold = Callable[[Sequence[tuple[str, str]]], list[bool]]
"""Called with shards' names and keys before those images are decoded; forgets those before; says which are suspects."""


class InHand:
    """This run's file; `close` ends it. Its methods may be called by any thread.

    Args:
        folder: The embedding directory.
        num_pipelines: That take shards.
        num_decoders: Threads that decode.
        num_images: That a thread may have in hand at once.
    """

    def __init__(self, folder: Path, num_pipelines: int, num_decoders: int, num_images: int = 1) -> None:
        self._folder = folder
        self._num_images = num_images
        self._lock = threading.Lock()
        self._suspects: set[bytes] = set()
        num_shards = num_pipelines * SHARDS_IN_FLIGHT
        self._shard_cells: dict[str, int] = {}
        self._free_shard_cells = list(range(num_shards))
        self._decoder_cells = itertools.count(num_shards, num_images)
        self._thread = threading.local()
        try:
            self._path, self._file = create_temporary(folder / _NAME, _SUFFIX)
            # Allocated now, so that no write of a cell finds the disk full.
            self._file.write(_NOTHING * (num_shards + num_decoders * num_images))
            self._file.flush()
            self._look_around()
        except OSError as error:
            raise StoreError(f"{folder}: {error.strerror or error}; embeddings cannot be written there") from error

    def take_shard(self, shard: Shard) -> None:
        """Say that this run embeds a shard now."""
        with self._lock:
            if self._free_shard_cells:  # else so many are so small that doing one twice costs little
                cell = self._shard_cells[shard.name] = self._free_shard_cells.pop()
                self._write(cell, _SHARD + _digest(shard.name))

    def let_go(self, shard: Shard) -> None:
        """Say that it is done with."""
        with self._lock:
            cell = self._shard_cells.pop(shard.name, None)
            if cell is not None:
                self._write(cell, _NOTHING)
                self._free_shard_cells.append(cell)

    def is_in_other_hands(self, shard: Shard) -> bool:
        """Whether another run that lives has said so. Learns of suspects, if one has died meanwhile."""
        return _digest(shard.name) in self._look_around()

    @contextlib.contextmanager
    def decoding(self) -> Iterator[Hold]:
        """For a decode thread: tell it the images that the thread takes up; the last ones are let go with the block."""
        cell = getattr(self._thread, "cell", None)
        if cell is None:
            cell = self._thread.cell = next(self._decoder_cells)

        held = 0

        def hold(images: Sequence[tuple[str, str]]) -> list[bool]:
            nonlocal held
            digests = [_digest(f"{shard_name}\0{key}") for shard_name, key in images]
            self._write(cell, b"".join(_IMAGE + digest for digest in digests) + _NOTHING * (held - len(digests)))
            held = len(digests)
            return [digest in self._suspects for digest in digests]

        try:
            yield hold
        finally:
            hold([])

    def close(self, *, finished: bool) -> None:
        """Remove the file; a run that did not do all it was given leaves its suspects to the next."""
        if finished or not self._suspects:
            self._path.unlink(missing_ok=True)
        self._file.close()

    def _look_around(self) -> set[bytes]:
        """Shards in the hands of others that may live; images of those that may be dead become suspects."""
        shards: set[bytes] = set()
        with self._lock:
            for other in read_temporaries(self._folder, _NAME, _SUFFIX):
                if other.path == self._path:
                    continue
                if not other.is_dead:
                    shards.update(_digests(other.content, _SHARD))
                if not other.is_locked:
                    self._suspect(set(_digests(other.content, _IMAGE)) - self._suspects)
                if other.is_dead:  # and what it held is in this run's file by now
                    other.path.unlink(missing_ok=True)
        return shards

    def _suspect(self, images: set[bytes]) -> None:
        if images:
            log.info("a run died with %d images in hand; they are decoded in processes of their own", len(images))
            self._suspects |= images
            self._file.seek(0, os.SEEK_END)
            self._file.write(b"".join(_IMAGE + digest for digest in sorted(images)))
            self._file.flush()

    def _write(self, cell: int, content: bytes) -> None:
        os.pwrite(self._file.fileno(), content, cell * _CELL_BYTES)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=_DIGEST_BYTES).digest()


def _digests(state: bytes, kind: bytes) -> Iterator[bytes]:
    for at in range(0, len(state), _CELL_BYTES):
        if state.startswith(kind, at):
            yield state[at + len(kind) : at + _CELL_BYTES]
