"""What a folder says that it is an export of: written with the first file, and read when the files come back."""

import json
from pathlib import Path
from typing import Any

from clipindex.errors import StoreError

NOTE = "_export.json"
"""Readers of a folder of Parquet pass over names that begin like this."""


def read_note(folder: Path) -> Any:  # noqa: ANN401 - whatever JSON holds
    """A folder's note, as it was written; None where there is none.

    Raises:
        StoreError: It is damaged.
    """
    path = folder / NOTE
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}); export into a new folder") from error
