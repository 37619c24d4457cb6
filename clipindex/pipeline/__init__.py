"""The way from tar bytes to Parquet rows; the only place where the stages meet."""

from clipindex.pipeline.home import ShardResult
from clipindex.pipeline.run import Progress, embed_shards

__all__ = ["Progress", "ShardResult", "embed_shards"]
