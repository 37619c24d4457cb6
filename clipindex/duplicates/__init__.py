"""Near-duplicates: rows whose cosine is above a threshold, joined into groups, with the one of each to keep.

Which rows are compared goes by the index's lists (`reach`); they are multiplied list by list, in 16 bits where the
device is faster at that, and what that leaves open is computed again in float32 (`pairs`).
"""

from clipindex.duplicates.job import DuplicateSummary, find_duplicates

__all__ = ["DuplicateSummary", "find_duplicates"]
