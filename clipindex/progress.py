"""What a person sees of a job while it runs: a bar on a terminal, a log line every few seconds elsewhere."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

LOG_EVERY_S = 5.0

Report = Callable[[float, float, str], None]
"""Called with work done, work in all (any unit, 0 if unknown), and a note; cheap to call often."""


@contextlib.contextmanager
def reporting(title: str) -> Iterator[Report]:
    """Show the progress of a job on standard error until the block ends."""
    if sys.stderr.isatty():
        with _bar(title) as report:
            yield report
    else:
        yield _log_lines(title)


def by_steps(report: Report) -> Callable[[str, int, int], None]:
    """What a job of several steps calls: with the step, how much of it is done, and of how much (0 if unknown)."""
    started: dict[str, float] = {}

    def on_progress(step: str, done: int, total: int) -> None:
        now = time.monotonic()
        seconds = now - started.setdefault(step, now)
        rate = f", {done / seconds:,.0f}/s" if done and seconds else ""
        report(done, total, f"{step}: {done:,} of {total:,}{rate}" if total else step)

    return on_progress


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}", style="cyan"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=60) as bar:
        task = bar.add_task(title, total=None, note="")

        def report(done: float, total: float, note: str) -> None:
            bar.update(task, completed=done, total=total or None, note=note)

        yield report


def _log_lines(title: str) -> Report:
    started = last = time.monotonic()

    def report(done: float, total: float, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LOG_EVERY_S:
            return
        last = now
        share = f"{100 * done / total:.0f} %, " if total else ""
        left = f", ETA {_clock((now - started) * (total / done - 1))}" if 0 < done <= total else ""
        log.info("%s: %s%s%s", title, share, note, left)

    return report


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
