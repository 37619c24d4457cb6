"""A batch: an ordered list of events beside one buffer of pixels.

The order of a tar is the order of the events (a shard begins, a sample, a reject, a shard ends), so it is never lost
and never has to be restored. Batches span shards.
"""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from clipindex.types import Reject, Sample, Shard, UInt8Array, Vectors

EVENTS_PER_SLOT = 4
"""A batch is sent on when it has this many events a slot, so that a tar full of rejects cannot fill memory."""
BATCH_BYTES = 128 << 20
"""And when its encoded images and texts have this size, of which 512 ordinary images have a quarter."""

_LABEL_BYTES = 36
"""Of an integer and its place in a tuple."""


class Slot(NamedTuple):
    """A sample on its way to a row; a tuple, as samples are."""

    sample: Sample
    place: int
    """Where its pixels are in the batch's buffer."""


@dataclass(frozen=True, slots=True)
class ShardEnd:
    """A shard's stream is over."""

    shard: Shard
    samples: int
    """That came."""
    error: str | None
    """Why it cannot be published."""
    broken: str | None
    """Where its stream breaks, if what came before is to be published."""


Event = Shard | Slot | Reject | ShardEnd
Outcome = tuple[int, int] | Reject
"""Of decoding: the source's (width, height), or why there are no pixels."""


class Decoded(NamedTuple):
    """What became of some neighbouring slots."""

    outcomes: list[Outcome]
    seconds: float
    """That it took to compute."""
    device_seconds: float
    """That a device decoded, if one did."""


@dataclass(slots=True)
class Batch:
    """What the reader lays out and the decode threads fill."""

    images: UInt8Array
    """[B, H, W, 3]; slots from `used` on are left over from an earlier batch."""
    events: list[Event] = field(default_factory=list)
    decoding: list["Future[Decoded]"] = field(default_factory=list)
    """In slot order."""
    used: int = 0
    num_bytes: int = 0

    def lay(self, sample: Sample) -> None:
        """Give a sample the next slot."""
        self.events.append(Slot(sample, self.used))
        self.used += 1
        self.num_bytes += len(sample.image) + len(sample.caption or "") + len(sample.meta or "")
        if sample.labels:
            self.num_bytes += _LABEL_BYTES * len(sample.labels)

    def is_full(self) -> bool:
        """Whether it is to be sent on."""
        return (
            self.used == len(self.images)
            or len(self.events) >= EVENTS_PER_SLOT * len(self.images)
            or self.num_bytes >= BATCH_BYTES
        )


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """A batch on its way home."""

    events: list[Event]
    outcomes: list[Outcome]
    """For each slot, as the next; a slot without pixels has an embedding of whatever lay there."""
    vectors: Vectors | None
    """None where no slot has pixels."""


def sample_reject(sample: Sample, stage: str, reason: str) -> Reject:
    """A reject for a sample that had an image."""
    return Reject(key=sample.key, member=sample.member, stage=stage, reason=reason, tar_offset=sample.tar_offset)
