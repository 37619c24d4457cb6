"""What is wrong with a directory, where, and what to do about it."""

from dataclasses import dataclass
from pathlib import Path

REFRESH = "run embed with --refresh"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something that is not as it should be."""

    path: str
    """File or URL."""
    what: str
    remedy: str


def fault_of(path: Path, error: Exception, remedy: str) -> Fault:
    """An error as a fault: its advice and its path are said once."""
    what = str(error).partition("; ")[0].removeprefix(str(path)).lstrip(": ")
    return Fault(path=str(path), what=what, remedy=remedy)
