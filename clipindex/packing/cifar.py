"""CIFAR-10 and CIFAR-100 as their author publishes them: Python 2 pickles of uint8 pixels.

The format is that of "CIFAR-10 / CIFAR-100 python version" at https://www.cs.toronto.edu/~kriz/cifar.html: a
folder (or the ``.tar.gz`` of it) whose batches hold a dict of bytes keys: ``data`` uint8 [N, 3072], a row
being the red, then the green, then the blue plane of 32 x 32 pixels; ``labels``, or ``fine_labels`` and
``coarse_labels``; and ``filenames``.

A pickle is a program. Here it is run by an unpickler that knows five names and gives inert stand-ins for each
of them, so that neither numpy's constructors nor anything else is reachable from the file.
"""

import io
import pickle
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

import numpy as np
from PIL import Image

from clipindex.errors import SourceError, UsageError
from clipindex.types import UInt8Array

SIDE_PIXELS = 32
ROW_BYTES = 3 * SIDE_PIXELS * SIDE_PIXELS
FOLDERS = ("cifar-10-batches-py", "cifar-100-python")
"""Names that the published archives unpack to."""
MAX_MEMBER_BYTES = 1 << 30
"""The largest published file has 155 MB; more is a decompression bomb or another data set."""

_CIFAR10_META = "batches.meta"
_CIFAR100_META = "meta"
_BATCHES = {
    (_CIFAR10_META, "train"): tuple(f"data_batch_{number}" for number in range(1, 6)),
    (_CIFAR10_META, "test"): ("test_batch",),
    (_CIFAR100_META, "train"): ("train",),
    (_CIFAR100_META, "test"): ("test",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CifarSplit:
    """One split, in the order of its batches; N images, C classes."""

    classes: tuple[str, ...]
    """C names as in the meta file, underscores included."""
    filenames: tuple[str, ...]
    """N names that the images had; not promised to be unique."""
    labels: tuple[int, ...]
    """N indices into `classes`."""
    batches: tuple[UInt8Array, ...]
    """Pixels, uint8 [N_b, 3072] for each batch b; the N_b sum to N."""


def find_cifar(folder: Path) -> Path | None:
    """The folder of CIFAR batches that `folder` is or, under the published name, holds; None if neither.

    Raises:
        UsageError: It holds CIFAR-10 and CIFAR-100, so that one must be named.
    """
    if _is_cifar(folder):
        return folder
    found = [folder / name for name in FOLDERS if _is_cifar(folder / name)]
    if len(found) > 1:
        raise UsageError(f"{folder}: holds both {FOLDERS[0]} and {FOLDERS[1]}; name the one to read")
    return found[0] if found else None


def _is_cifar(folder: Path) -> bool:
    if (folder / _CIFAR10_META).is_file():
        return True
    return all((folder / name).is_file() for name in (_CIFAR100_META, "train", "test"))


def read_cifar(source: Path, split: str, *, coarse: bool = False) -> CifarSplit:
    """Read one split of CIFAR-10 or CIFAR-100 into memory (CIFAR's largest has 154 MB).

    Args:
        source: The extracted folder, a folder that holds it, or the archive as downloaded.
        split: 'train' or 'test'.
        coarse: Label CIFAR-100 by its 20 superclasses.

    Raises:
        UsageError: Another split, or coarse labels of CIFAR-10.
        SourceError: A file is missing, is no CIFAR batch, or asks for code to be run.
    """
    if split not in ("train", "test"):
        raise UsageError(f"split {split!r}: CIFAR has 'train' and 'test'; use one of them")
    files = _read_archive(source, split) if source.is_file() else _read_folder(source, split)
    meta_name = _only_meta(source, files)
    if coarse and meta_name == _CIFAR10_META:
        raise UsageError(f"{source}: CIFAR-10 has no coarse labels; leave `coarse` out")
    names = _BATCHES[meta_name, split]
    missing = [name for name in names if name not in files]
    if missing:
        raise SourceError(f"{source}: {', '.join(missing)} missing; download or unpack it again")
    kind = "" if meta_name == _CIFAR10_META else "coarse_" if coarse else "fine_"
    classes = _strings(f"{source}: {meta_name}", _load(source, meta_name, files), f"{kind}label_names")
    parts = [_batch(f"{source}: {name}", _load(source, name, files), kind, len(classes)) for name in names]
    return CifarSplit(
        classes=classes,
        filenames=tuple(name for part in parts for name in part[0]),
        labels=tuple(label for part in parts for label in part[1]),
        batches=tuple(part[2] for part in parts),
    )


def png_images(split: CifarSplit) -> Iterator[bytes]:
    """Encode the images of a split as PNG, which loses nothing, one at a time and in order."""
    for batch in split.batches:
        for row in batch:
            pixels = row.reshape(3, SIDE_PIXELS, SIDE_PIXELS).transpose(1, 2, 0)
            buffer = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG")
            yield buffer.getvalue()


def _wanted(split: str) -> set[str]:
    return {name for (meta, of), names in _BATCHES.items() if of == split for name in (meta, *names)}


def _read_folder(source: Path, split: str) -> dict[str, bytes]:
    folder = find_cifar(source) or source
    try:
        return {name: (folder / name).read_bytes() for name in _wanted(split) if (folder / name).is_file()}
    except OSError as error:
        raise SourceError(f"{error.filename}: {error.strerror}; check its permissions") from error


def _read_archive(source: Path, split: str) -> dict[str, bytes]:
    wanted, files = _wanted(split), dict[str, bytes]()
    try:
        with tarfile.open(source, "r:*") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name not in wanted or not member.isreg():
                    continue
                if name in files:
                    raise SourceError(f"{source}: two files are named {name}; unpack it, name one folder")
                if member.size > MAX_MEMBER_BYTES:
                    raise SourceError(f"{source}: {name} has {member.size} bytes, too many for a CIFAR batch")
                stream = archive.extractfile(member)
                assert stream is not None, member.name  # only links and folders have none
                files[name] = stream.read()
    except SourceError:
        raise
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise SourceError(f"{source}: no readable tar archive ({error}); download it again") from error
    return files


def _only_meta(source: Path, files: Mapping[str, bytes]) -> str:
    found = [name for name in (_CIFAR10_META, _CIFAR100_META) if name in files]
    if len(found) != 1:
        what = f"holds {' and '.join(found)}" if found else f"no {_CIFAR10_META} or {_CIFAR100_META}"
        raise SourceError(f"{source}: {what}; give one data set, in its 'python version'")
    return found[0]


def _batch(
    where: str, content: Mapping[str, object], kind: str, num_classes: int
) -> tuple[tuple[str, ...], tuple[int, ...], UInt8Array]:
    pixels, labels = content.get("data"), content.get(f"{kind}labels")
    if not isinstance(pixels, _Array) or pixels.value is None or pixels.value.shape[1:] != (ROW_BYTES,):
        raise SourceError(f"{where}: no uint8 array 'data' of shape [N, {ROW_BYTES}]; no CIFAR batch")
    names = _strings(where, content, "filenames")
    if not isinstance(labels, list) or any(type(label) is not int for label in labels):
        raise SourceError(f"{where}: '{kind}labels' is no list of integers; is it a CIFAR batch?")
    if not len(names) == len(labels) == len(pixels.value):
        raise SourceError(
            f"{where}: {len(pixels.value)} images, {len(labels)} labels, {len(names)} filenames; download it again"
        )
    outside = next((label for label in labels if not 0 <= label < num_classes), None)
    if outside is not None:
        raise SourceError(f"{where}: label {outside} is none of the {num_classes} classes; download it again")
    return names, tuple(labels), pixels.value


def _strings(where: str, content: Mapping[str, object], key: str) -> tuple[str, ...]:
    values = content.get(key)
    if not isinstance(values, list) or any(not isinstance(value, bytes | str) for value in values):
        raise SourceError(f"{where}: '{key}' is no list of names; is it a file of this CIFAR?")
    return tuple(_text(value) for value in values)


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _load(source: Path, name: str, files: dict[str, bytes]) -> dict[str, object]:
    try:
        content = _CifarUnpickler(io.BytesIO(files.pop(name)), encoding="bytes").load()
    except Exception as error:  # damaged pickles raise nearly anything, says the pickle module
        raise SourceError(f"{source}: {name} is no CIFAR file ({error}); get it from its publisher") from error
    if not isinstance(content, dict):
        raise SourceError(f"{source}: {name} is no CIFAR file: a {type(content).__name__}, not a dict")
    return {_text(key): value for key, value in content.items() if isinstance(key, bytes | str)}


class _StandIn:
    """What a file may name; its `__setstate__` keeps pickle's BUILD from setting attributes of a class."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError(f"{type(self).__name__} takes no state")


class _ArrayType(_StandIn):
    """In place of numpy.ndarray, which files only name."""


class _Encode(_StandIn):
    """In place of _codecs.encode, by which Python 3 writes bytes in protocol 2."""

    def __new__(cls, text: object, encoding: object = "latin1") -> bytes:  # type: ignore[misc]
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1", b"latin1"):
            raise pickle.UnpicklingError("_codecs.encode of something but latin1 text")
        return text.encode("latin-1")


class _Dtype(_StandIn):
    """In place of numpy.dtype: the type's code; the byte order in its state says nothing of single bytes."""

    def __init__(self, code: object = None, *args: object) -> None:
        self.is_uint8 = code in (b"u1", "u1")

    def __setstate__(self, state: object) -> None:
        pass


class _Array(_StandIn):
    """In place of numpy's _reconstruct; its state is (version, shape, dtype, Fortran order, bytes)."""

    value: UInt8Array | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("an array of unknown layout")
        _, shape, dtype, is_fortran, data = state
        if not isinstance(dtype, _Dtype) or not dtype.is_uint8 or not isinstance(data, bytes):
            raise pickle.UnpicklingError("an array of other than uint8")
        self.value = _reshaped(data, shape, is_fortran=bool(is_fortran))


def _reshaped(data: bytes, shape: Sequence[int], *, is_fortran: bool) -> UInt8Array:
    return np.frombuffer(data, np.uint8).reshape(tuple(shape), order="F" if is_fortran else "C")


_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,  # its name since numpy 2
    ("numpy", "ndarray"): _ArrayType,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Encode,
}


class _CifarUnpickler(pickle.Unpickler):
    """Runs a pickle with nothing in reach but the stand-ins above."""

    def find_class(self, module_name: str, global_name: str) -> type[_StandIn]:
        """Look a name up among those that CIFAR's files hold."""
        admitted = _ADMITTED.get((module_name, global_name))
        if admitted is None:
            raise pickle.UnpicklingError(f"refused: it asks for {module_name}.{global_name}")
        return admitted

    def persistent_load(self, pid: object) -> NoReturn:
        """Refuse what the base class would refuse, in the words of this one."""
        raise pickle.UnpicklingError("refused: it refers to objects outside the file")
