"""FAISS: exact inner-product search of class vectors, and indexes of image embeddings of any number.

An image index is a set of files that `files` makes appear at once:

    DIR/index/metadata.json         what the index is, how to search it, and the recall that was measured
    DIR/index/index-TOKEN.faiss     for `faiss.read_index`, with `IO_FLAG_ONDISK_SAME_DIR`
    DIR/index/lists-TOKEN.bin       its inverted lists, mapped while they are searched; only of the IVF kinds
    DIR/index/shards-TOKEN.parquet  which rows its ids are

Id = `first_id` of a shard + row within the shard.
"""
