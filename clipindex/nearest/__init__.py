"""The rows of a directory nearest to vectors: of all rows, or of those that its index leads to."""

from clipindex.nearest.by_index import nearest, through_index, widened
from clipindex.nearest.found import Filter, Nearest
from clipindex.nearest.ids import check_model, compare_shards, ids_of, locate
from clipindex.nearest.rounded import Arithmetic, Limits, full_sums, limits, nonzero
from clipindex.nearest.scan import scan
from clipindex.nearest.vectors import row_cosines, unit_cosines, vectors_at

__all__ = [
    "Arithmetic",
    "Filter",
    "Limits",
    "Nearest",
    "check_model",
    "compare_shards",
    "full_sums",
    "ids_of",
    "limits",
    "locate",
    "nearest",
    "nonzero",
    "row_cosines",
    "scan",
    "through_index",
    "unit_cosines",
    "vectors_at",
    "widened",
]
