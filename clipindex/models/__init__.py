"""Names to loaded models of open_clip and timm: found, checked, filled with exactly their weights, fingerprinted."""

from clipindex.models.load import LoadedModel, Tokenize, load_model, load_model_of
from clipindex.models.projection import Project, cut_projection

__all__ = ["LoadedModel", "Project", "Tokenize", "cut_projection", "load_model", "load_model_of"]
