"""The vectors of an embeddings file where they lie in it, without Arrow's copy.

Embeddings are written plain and uncompressed, a page for each row group, and no part of them can be null: so the end of
such a page is the array itself (PLAIN encoding of the Parquet format, in whose data pages levels come first). Reading a
group is one copy in place of five, and a row alone is one seek.
"""

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

_PAGE_HEADER_BYTES = 128
"""More than a page header without statistics takes."""


class MappedVectors:
    """The vectors of each row group of an embeddings file; the file stays mapped while they are in use."""

    def __init__(self, path: Path, file: pq.ParquetFile, dtype: str, column: str = "embedding") -> None:
        self._file = file
        self._name = column
        self._dim: int = file.schema_arrow.field(column).type.list_size
        self._dtype = np.dtype(dtype)
        self._column = file.schema_arrow.names.index(column)
        with open(path, "rb") as opened:
            empty = not os.fstat(opened.fileno()).st_size
            # A copy on write, which nobody writes to: PyTorch takes no read-only memory.
            self._bytes = b"" if empty else mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        self._ends = np.cumsum(sizes, dtype=np.int64)

    @property
    def num_rows(self) -> int:
        """Of the file."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def group(self, group: int) -> np.ndarray[Any, Any]:
        """Vectors [n, D] of a row group, in the file's dtype."""
        found = self._in_place(group)
        if found is None:
            return self._decoded(group)
        return found if found.flags.aligned else found.copy()

    def take(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, Any]:
        """Vectors [n, D] of rows, by their number in the file."""
        out = np.empty((len(rows), self._dim), self._dtype)
        groups = np.searchsorted(self._ends, rows, "right")
        for group in np.unique(groups).tolist():
            wanted = groups == group
            found = self._in_place(group)
            values = self._decoded(group) if found is None else found
            out[wanted] = values[rows[wanted] - (self._ends[group] - len(values))]
        return out

    def _in_place(self, group: int) -> np.ndarray[Any, Any] | None:
        """A view into the file, perhaps not aligned; None where the values are not in one plain page."""
        metadata = self._file.metadata.row_group(group)
        chunk = metadata.column(self._column)
        size = metadata.num_rows * self._dim * self._dtype.itemsize
        begin, end = chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size
        plain = chunk.compression == "UNCOMPRESSED" and set(chunk.encodings) <= {"PLAIN", "RLE"}
        if not size or not plain or end > len(self._bytes) or end - size < begin:
            return None
        page = _page_size(self._bytes[begin : begin + 16])
        if page is None or not 0 < end - begin - page < _PAGE_HEADER_BYTES:
            return None
        values = np.frombuffer(self._bytes, self._dtype, metadata.num_rows * self._dim, end - size)
        return values.reshape(metadata.num_rows, self._dim)

    def _decoded(self, group: int) -> np.ndarray[Any, Any]:
        column = self._file.read_row_group(group, columns=[self._name], use_threads=False).column(0)
        flat = [chunk.flatten() for chunk in column.chunks]
        # Through the buffers, since Arrow's own views are read-only.
        parts = [np.frombuffer(each.buffers()[1], self._dtype)[each.offset : each.offset + len(each)] for each in flat]
        return np.concatenate([np.empty(0, self._dtype), *parts]).reshape(-1, self._dim)


def _page_size(header: bytes) -> int | None:
    """Bytes of a page without its header, by the header's second field.

    PageHeader of parquet.thrift in Thrift's compact protocol: field 1 is the page's type, field 2 its uncompressed
    size, both i32: a byte 0x15 (next field, i32) and a zigzag varint.
    """
    if len(header) < 4 or header[0] != 0x15 or header[2] != 0x15:
        return None
    value = 0
    for at, byte in enumerate(header[3:8]):
        value |= (byte & 0x7F) << 7 * at
        if byte < 0x80:
            return value >> 1
    return None
