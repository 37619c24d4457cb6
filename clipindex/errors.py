"""The exceptions a user of clipindex meets; each message names the thing at fault and the remedy."""


class ClipindexError(Exception):
    """Root of every error that is the caller's to mend; the CLI prints it without a traceback."""


class UsageError(ClipindexError, ValueError):
    """Arguments that contradict each other or do not parse; exit status 2."""


class ModelError(ClipindexError, ValueError):
    """A model that cannot be found, loaded or trusted, or weights that do not fit their architecture."""


class SourceError(ClipindexError, OSError):
    """An input that cannot be listed or opened: a missing path, an empty glob, a refused URL."""


class ShardError(ClipindexError, ValueError):
    """A tar whose stream breaks, or vectors that do not fit their rows; the shard is not published."""


class SampleError(ClipindexError, ValueError):
    """One sample that cannot become a row; it ends as a reject with this message as its reason."""


class StoreError(ClipindexError, ValueError):
    """An embedding directory or file that is not what it should be."""


class FingerprintError(StoreError):
    """Embeddings of one model met with another model; both are named."""


class ClassesError(ClipindexError, ValueError):
    """Class names, templates or labels that cannot define a zero-shot classifier."""


class IndexingError(ClipindexError, ValueError):
    """An index that cannot be built as asked, or finds too little."""


def first_line(error: BaseException) -> str:
    """What an error says, without the stack of C++ that PyTorch appends; its kind where it says nothing."""
    return str(error).partition("\n")[0] or type(error).__name__
