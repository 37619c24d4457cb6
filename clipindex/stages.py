"""What each stage of a run took, and which of them bound it."""

import contextlib
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")

STAGES = ("read", "decode", "encode", "write")
DEVICE_DECODE = "device decode"
"""A stage of runs in which a CUDA device decodes as well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTimes:
    """How busy the stages of a run were."""

    busy: dict[str, float]
    """For each stage, the share of the run's time in which its threads were at work, 0 to 1."""
    bound_by: str
    """The busiest stage: a faster run begins there."""
    device_waited_s: float
    """In which an encoder had nothing to work on; summed over devices."""


class StageClock:
    """Adds up seconds by stage for one pipeline; each stage is one thread's, so that nothing need be locked."""

    def __init__(self, decode_threads: int) -> None:
        self.decode_threads = decode_threads
        self.started = time.perf_counter()
        self.seconds = dict.fromkeys((*STAGES, DEVICE_DECODE), 0.0)
        """Thread-seconds; of decoding, which has many threads, what they computed rather than what passed; of encoding,
        what the device was at work."""

    @contextlib.contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Count what passes within the block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started

    def timed(self, stage: str, items: Iterable[Item]) -> Generator[Item, None, None]:
        """Hand on `items` and count what passes until each is there; closing this closes them."""
        iterator = iter(items)
        try:
            while True:
                with self.timing(stage):
                    item = next(iterator, _END)
                if item is _END:
                    return
                yield item  # type: ignore[misc]
        finally:
            if isinstance(iterator, Generator):
                iterator.close()


_END = object()


def stage_times(clocks: Sequence[StageClock]) -> StageTimes:
    """The stages of one run that had several pipelines, each with a clock."""
    now = time.perf_counter()
    passed = sum(now - clock.started for clock in clocks)
    decoded = sum((now - clock.started) * clock.decode_threads for clock in clocks)
    busy = {
        stage: round(
            sum(clock.seconds[stage] for clock in clocks) / max(decoded if stage == "decode" else passed, 1e-9), 3
        )
        for stage in (*STAGES, DEVICE_DECODE)
    }
    if not busy[DEVICE_DECODE]:
        del busy[DEVICE_DECODE]
    return StageTimes(
        busy=busy,
        bound_by=max(busy, key=lambda stage: busy[stage]),
        device_waited_s=round(max(passed - sum(clock.seconds["encode"] for clock in clocks), 0.0), 3),
    )
