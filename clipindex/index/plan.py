"""Which kind of index suits so many rows in so much memory.

| kind | bytes a row (D = 512) | what FAISS calls it |
| --- | --- | --- |
| flat | 4 D (2,048) | IndexFlatIP: exact |
| hnsw | 2 D + 272 (1,296) | IndexHNSWSQ, 32 neighbours, float16 |
| ivf | 2 D + 8 (1,032) | IVF, float16 |
| ivfsq | D + 8 (520) | IVF, 8 bits a dimension |
| ivfpq | M + 8 (136 to 40) | IVF, product quantizer of M bytes after a rotation |

`auto` takes flat up to 100,000 rows (exact, and a few milliseconds a query), else the first of ivf, ivfsq and ivfpq
with M = D/4, D/8, D/16 that fits; where none does, the smallest, read from disk as it is searched. It never takes hnsw:
that takes many times longer to build, forgets no row, and has to be in memory.

Lists: 4 sqrt(rows), the lower end of FAISS's guideline ("Guidelines to choose an index" in its wiki), since the time to
assign rows grows with them; and no more than a 39th of the rows, below which FAISS warns that k-means has too few.
"""

import math
from dataclasses import dataclass

from clipindex.devices import machine_memory_bytes
from clipindex.errors import UsageError

KINDS = ("flat", "hnsw", "ivf", "ivfsq", "ivfpq")
FLAT_ROWS = 100_000
HNSW_NEIGHBOURS = 32
MIN_ROWS_A_LIST = 39
CENTROIDS_A_CODE = 256

_ID_BYTES = 8
_LINK_BYTES = 272
"""Twice the neighbours on the ground floor of the graph and a thirty-second of as many above it, 4 bytes each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is to be built."""

    kind: str
    dim: int
    num_lists: int
    """0 of the kinds that have none."""
    code_bytes: int
    """Of a vector as it is stored."""

    @property
    def row_bytes(self) -> int:
        """With what finds it."""
        return self.code_bytes + {"flat": 0, "hnsw": _LINK_BYTES}.get(self.kind, _ID_BYTES)

    def num_bytes(self, rows: int) -> int:
        """Of the whole index."""
        return rows * self.row_bytes + self.num_lists * self.dim * 4

    @property
    def is_lossless(self) -> bool:
        """Whether its own scores are cosines of float16 vectors, in place of approximations."""
        return self.kind not in ("ivfsq", "ivfpq")


def make_plan(kind: str, rows: int, dim: int, memory_bytes: int) -> Plan:
    """The index to build.

    Args:
        kind: One of `KINDS`, or 'auto'.
        rows: To be indexed.
        dim: D.
        memory_bytes: What the index may take.

    Raises:
        UsageError: A flat or hnsw index, which must be held in memory, does not fit; or too few rows for ivfpq.
    """
    lists = max(1, min(round(4 * math.sqrt(rows)), rows // MIN_ROWS_A_LIST))
    exact = Plan(kind="flat", dim=dim, num_lists=0, code_bytes=4 * dim)
    graph = Plan(kind="hnsw", dim=dim, num_lists=0, code_bytes=2 * dim)
    sizes = [dim // part for part in (4, 8, 16) if dim % part == 0] or [dim]
    learns_codes = rows >= CENTROIDS_A_CODE
    on_disk = [
        Plan(kind="ivf", dim=dim, num_lists=lists, code_bytes=2 * dim),
        Plan(kind="ivfsq", dim=dim, num_lists=lists, code_bytes=dim),
        *(Plan(kind="ivfpq", dim=dim, num_lists=lists, code_bytes=size) for size in sizes if learns_codes),
    ]
    if kind == "auto" and rows <= FLAT_ROWS and exact.num_bytes(rows) <= memory_bytes:
        return exact
    if kind in ("flat", "hnsw"):
        plan = exact if kind == "flat" else graph
        if plan.num_bytes(rows) > memory_bytes:
            raise UsageError(
                f"{kind} takes {plan.num_bytes(rows) / 1e9:,.1f} GB of memory for {rows:,} rows, and"
                f" {memory_bytes / 1e9:,.1f} GB are allowed: raise --memory, or take an ivf kind"
            )
        return plan
    if kind == "ivfpq" and not learns_codes:
        raise UsageError(
            f"ivfpq needs {CENTROIDS_A_CODE} rows to learn its codes from, and there are {rows}; give auto"
        )
    plans = [plan for plan in on_disk if kind in ("auto", plan.kind)]
    return next((plan for plan in plans if plan.num_bytes(rows) <= memory_bytes), plans[-1])


def default_memory_bytes() -> int:
    """Half of what this machine, or the container, has."""
    return machine_memory_bytes() // 2
