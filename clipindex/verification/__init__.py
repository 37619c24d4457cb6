"""Whether an embedding directory is what it says it is: its files, the law, and on wish the tars it was made of."""

from clipindex.verification.faults import Fault
from clipindex.verification.job import VerifySummary, verify

__all__ = ["Fault", "VerifySummary", "verify"]
