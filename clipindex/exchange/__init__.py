"""Coming from other tools, and going to them.

`sources` finds files of vectors and the rows that belong to them, `rows` and `vectors` read them, `checked` says which
are taken, `twins` knows those that are there already, `importing` makes shards of the others. `layouts` has one shard
in the files of another tool, `exporting` all shards of a directory, `note` what they are an export of.
"""

from clipindex.exchange.exporting import FORMATS, ExportSummary, export_embeddings
from clipindex.exchange.importing import ImportSummary, import_embeddings

__all__ = ["FORMATS", "ExportSummary", "ImportSummary", "export_embeddings", "import_embeddings"]
