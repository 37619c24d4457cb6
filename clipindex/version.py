"""The version, and the name under which files are signed."""

__version__ = "0.1.0"

CREATED_BY = f"clipindex {__version__}"
