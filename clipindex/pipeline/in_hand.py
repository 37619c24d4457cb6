"""What a run has in hand, in a file that outlives its process: the shards it embeds, the images it decodes.

    DIR/.run.HOST.PID.TOKEN.hand    cells of 24 bytes: kind (8), digest (16); zeros where nothing is in hand

While the run lives, others leave its shards to it. Had it died, the images are suspects: one of them may have taken the
process with it. The run that finds the file decodes those in processes of their own, so that no image ends a night
twice. A file that is locked while its run lives needs nobody to remove it; where the file system has no locks, runs do
each other's shards again, and the first to publish wins.
"""

import contextlib
import hashlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from clipindex.errors import StoreError
from clipindex.fileio import create_temporary, read_from_the_living, take_from_the_dead
from clipindex.types import Shard

_NAME, _SUFFIX = "run", ".hand"
_SHARD, _IMAGE = b"shard\0\0\0", b"image\0\0\0"
_DIGEST_BYTES = 16
_CELL_BYTES = len(_SHARD) + _DIGEST_BYTES
_NOTHING = bytes(_CELL_BYTES)

Hold = Callable[[str, str], bool]
"""Called with a shard's name and a key before that image is decoded; says whether it is a suspect."""


class InHand:
    """This run's file; `close` ends it."""

    def __init__(self, folder: Path, num_pipelines: int, num_decoders: int) -> None:
        self._folder = folder
        dead = take_from_the_dead(folder, _NAME, _SUFFIX)
        self._suspects = frozenset(digest for state in dead for digest in _digests(state, _IMAGE))
        try:
            self._path, self._file = create_temporary(folder / _NAME, _SUFFIX)
            # Allocated now, so that no write can find the disk full; suspects stay until the run ends well.
            inherited = b"".join(_IMAGE + digest for digest in sorted(self._suspects))
            self._file.write(_NOTHING * (num_pipelines + num_decoders) + inherited)
            self._file.flush()
        except OSError as error:
            raise StoreError(f"{folder}: {error.strerror or error}; embeddings cannot be written there") from error
        self._free_cells = itertools.count(num_pipelines)
        self._thread = threading.local()

    def take_shard(self, pipeline: int, shard: Shard) -> None:
        """Say that a pipeline embeds this shard now, and none of its earlier ones."""
        self._write(pipeline, _SHARD, _digest(shard.name))

    def is_in_other_hands(self, shard: Shard) -> bool:
        """Whether a run that lives, other than this one, has said so."""
        wanted = _digest(shard.name)
        others = (state for path, state in read_from_the_living(self._folder, _NAME, _SUFFIX) if path != self._path)
        return any(wanted in _digests(state, _SHARD) for state in others)

    @contextlib.contextmanager
    def decoding(self) -> Iterator[Hold]:
        """For a decode thread: tell it each image that the thread takes up; the last one is let go with the block."""
        cell = getattr(self._thread, "cell", None)
        if cell is None:
            cell = self._thread.cell = next(self._free_cells)

        def hold(shard_name: str, key: str) -> bool:
            digest = _digest(f"{shard_name}\0{key}")
            self._write(cell, _IMAGE, digest)
            return digest in self._suspects

        try:
            yield hold
        finally:
            os.pwrite(self._file.fileno(), _NOTHING, cell * _CELL_BYTES)

    def close(self, *, finished: bool) -> None:
        """Remove the file; a run that did not get to the end leaves its suspects to the next."""
        if finished or not self._suspects:
            self._path.unlink(missing_ok=True)
        self._file.close()

    def _write(self, cell: int, kind: bytes, digest: bytes) -> None:
        os.pwrite(self._file.fileno(), kind + digest, cell * _CELL_BYTES)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=_DIGEST_BYTES).digest()


def _digests(state: bytes, kind: bytes) -> Iterator[bytes]:
    for at in range(0, len(state), _CELL_BYTES):
        if state.startswith(kind, at):
            yield state[at + len(kind) : at + _CELL_BYTES]
