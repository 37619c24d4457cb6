"""The index of an embedding directory: built, kept up to date, and measured before it appears."""

from clipindex.indexing.job import IndexSummary, build_index

__all__ = ["IndexSummary", "build_index"]
