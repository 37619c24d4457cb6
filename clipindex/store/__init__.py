"""Embedding directories: what is written for each shard, and how it is read back.

    DIR/dataset.json               format version, model, dim, dtype
    DIR/embeddings/<name>.parquet  one per tar, or per imported file of vectors; it is there whole, or not at all
    DIR/rejects/<name>.parquet     samples of it that did not become rows; only where there are any

Row id = (shard, row). The footer of each embeddings file carries, under the key `clipindex`, a `ShardRecord` as JSON.
"""

from clipindex.store.dataset import (
    DTYPES,
    IMPORTED,
    LABELS_TYPE,
    NORM_COLUMNS,
    PRE_PROJECTION,
    ROW_GROUP_ROWS,
    Dataset,
    ShardRecord,
    check_fingerprint,
    claim_dataset,
    describe_model,
    embedding_schema,
    find_vectors,
    model_before_projection,
    open_dataset,
    parse_model_info,
    read_dataset,
)
from clipindex.store.plan import Plan, plan_shards
from clipindex.store.read import (
    EmbeddingBatch,
    VectorReader,
    check_cosines,
    published_record,
    published_shards,
    read_columns,
    read_embeddings,
    read_record,
    read_rejects,
    read_rows,
    shard_states,
)
from clipindex.store.write import AtomicParquet, ShardWriter

__all__ = [
    "DTYPES",
    "IMPORTED",
    "LABELS_TYPE",
    "NORM_COLUMNS",
    "PRE_PROJECTION",
    "ROW_GROUP_ROWS",
    "AtomicParquet",
    "Dataset",
    "EmbeddingBatch",
    "Plan",
    "ShardRecord",
    "ShardWriter",
    "VectorReader",
    "check_cosines",
    "check_fingerprint",
    "claim_dataset",
    "describe_model",
    "embedding_schema",
    "find_vectors",
    "model_before_projection",
    "open_dataset",
    "parse_model_info",
    "plan_shards",
    "published_record",
    "published_shards",
    "read_dataset",
    "read_embeddings",
    "read_columns",
    "read_record",
    "read_rejects",
    "read_rows",
    "shard_states",
]
