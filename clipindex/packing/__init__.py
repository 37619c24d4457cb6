"""Real data into WebDataset shards: image folders, CIFAR pickles, CSV tables."""

from clipindex.packing.pack import Kind, PackSummary, pack
from clipindex.packing.sources import PackReject

__all__ = ["Kind", "PackReject", "PackSummary", "pack"]
