"""Names to loaded open_clip models: found, checked, filled with exactly their weights, fingerprinted."""

from clipindex.models.load import LoadedModel, Tokenize, fingerprint, load_model

__all__ = ["LoadedModel", "Tokenize", "fingerprint", "load_model"]
