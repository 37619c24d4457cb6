"""Coming from other tools, and going to them.

`sources` finds files of vectors and the rows that belong to them, `rows` and `vectors` read them, `importing` makes
shards of them. `layouts` has one shard in the files of another tool, `exporting` all shards of a directory.
"""

from clipindex.exchange.exporting import FORMATS, ExportSummary, export_embeddings
from clipindex.exchange.importing import ImportSummary, import_embeddings

__all__ = ["FORMATS", "ExportSummary", "ImportSummary", "export_embeddings", "import_embeddings"]
