"""Members of a tar stream, read header by header.

The formats are POSIX.1-2001 ustar and pax interchange (IEEE Std 1003.1, utility `pax`) and GNU tar's extensions
(GNU tar manual, appendix "Tar Internals"). A general reader builds an object of twenty fields for each member; an image
corpus needs a name, an offset and the bytes, and reads ten times as fast without the rest. Nothing in a tar is
executed or unpickled, and no path in it is opened.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO, NamedTuple, NoReturn
from zlib import adler32

from clipindex.errors import ShardError

BLOCK_BYTES = 512
SMALL_BYTES = 4096
"""Members up to here are read together with the header that follows them."""
MAX_EXTENSION_BYTES = 1 << 20
"""Longest extended header (long name, pax records) that is believed."""
MAX_TAIL_BYTES = 1 << 20
"""Writers pad an archive to a record of 10 KiB, by option to 1 MiB; more zeros are a download cut short."""

MAX_SIZE = 1 << 42
"""Bytes of a member from which on its header is taken for damaged: four tebibytes."""

_ZERO_BLOCK = bytes(BLOCK_BYTES)
_EXTENSIONS = b"xXgLK"
_KINDS = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "device",
    b"4": "device",
    b"5": "directory",
    b"6": "pipe",
    b"S": "sparse file",
}
_PAX_KEYS = (b"path", b"size", b"GNU.sparse", b"GNU.sparse.name")
_WITHOUT_DATA = ("hard link", "symbolic link", "device", "directory", "pipe")


class Member(NamedTuple):
    """One member of a tar, directories left out; a tuple, for there is one every few microseconds."""

    name: str
    """As in the header; bytes that are no UTF-8 appear as backslash escapes."""
    offset: int
    """Where its data begins, in bytes from the start of the stream."""
    size: int
    """Bytes of data."""
    kind: str
    """'file', or what else it is: 'symbolic link', 'sparse file', …"""
    data: bytes | None
    """The data of a file that was asked for."""


def read_members(stream: BinaryIO, wants: Callable[[str, int], bool]) -> Iterator[Member]:
    """Yield the members of an uncompressed tar in order.

    Args:
        stream: Read forward only, from the first header on.
        wants: Called with a regular file's name and size; its data is passed over where this is false.

    Raises:
        ShardError: A header is damaged, the stream ends before the end-of-archive block, or data follows that block.
    """
    cursor = _Cursor(stream)
    shared: dict[str, str] = {}
    own: dict[str, str] = {}
    while True:
        header = cursor.read_header()
        at = cursor.offset - BLOCK_BYTES
        if header == _ZERO_BLOCK:
            cursor.check_tail()
            return
        size = _size(header, at)
        type_flag = header[156:157]
        if type_flag in _EXTENSIONS:
            records = _extension(type_flag, cursor.read_extension(size), at)
            (shared if type_flag == b"g" else own).update(records)
            continue
        name = _name(header)
        kind = _KINDS.get(type_flag, "member of unknown type")
        if own or shared:
            name, size, kind = _apply(shared | own, name, size, kind, at)
            own = {}
        if size >= MAX_SIZE:
            raise ShardError(f"damaged: a member of {size} bytes at offset {at}")
        if type_flag == b"S":
            cursor.skip_sparse_maps(header)
        offset = cursor.offset
        data = None
        if kind == "file" and wants(name, size):
            data = cursor.read_data(size)
        elif kind in _WITHOUT_DATA:
            size = 0
        else:
            cursor.skip_data(size)
        if kind != "directory" and name[-1:] != "/":
            yield Member(name, offset, size, kind, data)


class _Cursor:
    """A stream and how far it was read."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.offset = 0
        """Of the next byte that `read` would give."""
        self._ahead = b""
        self._padding = 0
        self._seekable = stream.seekable()

    def read_header(self) -> bytes:
        """The next header, with the padding before it passed over."""
        padding = self._padding
        block = self._ahead or self.stream.read(padding + BLOCK_BYTES)
        self.offset += len(block)
        self._padding, self._ahead = 0, b""
        if len(block) != padding + BLOCK_BYTES:
            self._raise_truncated()
        return block[padding:] if padding else block

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.offset += len(data)
        if len(data) != size:
            self._raise_truncated()
        return data

    def read_data(self, size: int) -> bytes:
        """A member's data; a small one's in one read with the header after it, since a call costs more than bytes."""
        self._padding = padding = -size % BLOCK_BYTES
        if size > SMALL_BYTES:
            return self.read(size)
        block = self.stream.read(size + padding + BLOCK_BYTES)
        data = block[:size]
        self.offset += len(data)
        if len(data) != size:
            self._raise_truncated()
        self._ahead = block[size:]
        return data

    def _raise_truncated(self) -> NoReturn:
        raise ShardError(f"truncated: ends at offset {self.offset} without an end-of-archive block")

    def read_extension(self, size: int) -> bytes:
        if size > MAX_EXTENSION_BYTES:
            raise ShardError(f"damaged: extended header of {size} bytes at offset {self.offset}")
        return self.read_data(size)

    def skip_data(self, size: int) -> None:
        remaining = size + -size % BLOCK_BYTES
        if self._seekable and remaining > BLOCK_BYTES:
            # One byte short of the end, so that a stream that ends within the data is noticed.
            self.stream.seek(remaining - 1, 1)
            self.offset += remaining - 1
            remaining = 1
        while remaining:
            remaining -= len(self.read(min(remaining, 1 << 20)))

    def skip_sparse_maps(self, header: bytes) -> None:
        more = header[482]
        while more:
            more = self.read(BLOCK_BYTES)[504]

    def check_tail(self) -> None:
        """After the first zero block nothing but padding may follow: tars glued together would lose the second."""
        end = self.offset
        while chunk := self.stream.read(1 << 16):
            if chunk.count(0) != len(chunk):
                raise ShardError(
                    f"data after the end-of-archive block at offset {end}: tars glued together or zeroed in the middle;"
                    " join tars with `tar --concatenate`"
                )
            self.offset += len(chunk)
            if self.offset - end > MAX_TAIL_BYTES:
                raise ShardError(f"more than {MAX_TAIL_BYTES} zero bytes from offset {end} on: a download cut short")


def _size(header: bytes, at: int) -> int:
    """Data size of a header whose checksum holds.

    A tar checksum is the plain sum of the bytes with the checksum field as spaces. Adler-32 (RFC 1950) carries that sum
    in its low half, at C speed, where it is below 65521, as a header's mostly is.
    """
    field = header[148:156]
    stored = _octal(field, at)
    differs = (adler32(header) - adler32(field) + 8 * 32 - stored) & 0xFFFF
    if (differs or stored > 0xFFFF) and stored not in _sums(header):
        raise ShardError(f"damaged: header checksum at offset {at} does not hold")
    size = header[124:136]
    if size[0] & 0x80:  # GNU base-256, for members from 8 GiB on
        return int.from_bytes(size, "big") & ~(0xFF << 88)
    return _octal(size, at)


def _sums(header: bytes) -> tuple[int, int]:
    """The checksum, and as old tars took it, over signed characters."""
    counted = header[:148] + b" " * 8 + header[156:]
    return sum(counted), sum(byte - 256 if byte > 127 else byte for byte in counted)


def _octal(field: bytes, at: int) -> int:
    digits = field.rstrip(b"\0 ")
    if not digits.isdigit():
        digits = field.partition(b"\0")[0].strip()
    if not digits:
        return 0
    try:
        if digits.isdigit():  # int() would take signs and underscores as well
            return int(digits, 8)
    except ValueError:
        pass
    raise ShardError(f"damaged: no tar header at offset {at}")


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "backslashreplace")


def _extension(type_flag: bytes, payload: bytes, at: int) -> dict[str, str]:
    if type_flag == b"L":
        return {"path": payload.partition(b"\0")[0].decode("utf-8", "backslashreplace")}
    if type_flag == b"K":
        return {}
    return _pax_records(payload, at)


def _pax_records(payload: bytes, at: int) -> dict[str, str]:
    """Lines of "LENGTH KEY=VALUE" and a newline, LENGTH counting the whole line."""
    records: dict[str, str] = {}
    position = 0
    while position < len(payload) and payload[position]:
        digits, space, _ = payload[position : position + 20].partition(b" ")
        end = position + int(digits) if space and digits.isdigit() else 0
        key, equals, value = payload[position + len(digits) + 1 : end - 1].partition(b"=")
        if not equals or end > len(payload) or payload[end - 1 : end] != b"\n":
            raise ShardError(f"damaged: pax record in the extended header at offset {at}")
        position = end
        if key.startswith(b"GNU.sparse.") and key != b"GNU.sparse.name":
            key = b"GNU.sparse"  # that there are any is all that counts; of these an archive may hold millions
        if key in _PAX_KEYS:
            records[key.decode()] = value.decode("utf-8", "backslashreplace")
    return records


def _apply(records: Mapping[str, str], name: str, size: int, kind: str, at: int) -> tuple[str, int, str]:
    """Name, stored size and kind of a member whose extended headers override its header."""
    if "GNU.sparse" in records or "GNU.sparse.name" in records:
        kind = "sparse file"
    name = records.get("GNU.sparse.name") or records.get("path") or name
    if "size" in records:
        if not records["size"].isdecimal() or len(records["size"]) > 20:
            raise ShardError(f"damaged: pax size {records['size']!r} at offset {at}")
        size = int(records["size"])
    return name, size, kind
