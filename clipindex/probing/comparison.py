"""What a comparison of encoders finds."""

from dataclasses import dataclass

from clipindex.probing.few_shot import FewShotPoint
from clipindex.probing.join import Side
from clipindex.types import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """Of a classifier on the test rows, which are the same for all."""

    acc1: float
    interval: tuple[float, float]
    """95 % of acc1, Wilson 1927."""
    acc5: float | None
    """None below five classes."""
    mean_per_class_recall: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FullProbe:
    """A probe of all training rows."""

    accuracy: Accuracy
    c: float
    passes: int
    """Over the training rows, of the last fit."""
    converged: bool
    in_memory: bool
    """Whether the rows were held; otherwise they were read in each pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """The full probes of one encoder and of the best, on the same test rows."""

    only_best: int
    """Test rows that only the best gets right."""
    only_this: int
    p: float
    """Exact, two-sided, McNemar 1947 (`metrics.mcnemar`); not corrected for how many encoders are compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderResult:
    """What one directory's embeddings are good for."""

    folder: str
    name: str
    """In tables and pictures: the model's, with what tells it from others of that name."""
    model: ModelSpec
    fingerprint: str
    """Of what the probes learned from."""
    dim: int
    vectors: str
    """What the probes learned from: 'projected', 'pre-projection' or 'pooled' features."""
    zero_shot: Accuracy | None
    no_zero_shot: str | None
    """Why there is none."""
    few_shot: tuple[FewShotPoint, ...]
    probe: FullProbe
    against_best: Paired | None
    """None of the best itself."""
    seconds: float
    """Of training and testing; the text tower's work apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What compare.json holds."""

    out: str
    joined_by: str
    """'key', or 'shard and key' where keys come twice."""
    sides: tuple[Side, ...]
    """What each directory has beside the common rows; of those to learn from, then of those to test on."""
    unlabelled: int
    """Common rows of which no directory has a label: they are left out."""
    classes: int
    training_rows: int
    test_rows: int
    test: str
    """Where the test rows are from."""
    unseen: dict[int, int]
    """Labels of test rows that there was nothing to learn of, and how many have them: they count as wrong."""
    features: str
    templates: int
    """Prompts a class, of zero-shot; 0 without class names."""
    seed: int
    """Of the held-out rows and of those to validate on."""
    seeds: tuple[int, ...]
    """Of the few-shot draws."""
    best: str
    """Folder of the encoder whose full probe has the highest acc1, of several the first; it has no `against_best`."""
    encoders: tuple[EncoderResult, ...]
    """In the order in which they were given; of a directory the projected features first, where both are probed."""
    seconds: float
