"""Threads: how many the machine has cores for, and an iterator that runs ahead of its consumer in one."""

import contextlib
import os
import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

_POLL_S = 0.1
"""How soon a producer notices that its consumer has gone; costs nothing while items flow."""


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _End:
    """Last thing in the queue: the producer is done, or died of `error`."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetch(items: Iterable[Item], size: int) -> Generator[Item, None, None]:
    """Yield `items` in order while a thread of their own produces up to `size` of them ahead.

    The thread is the only one that touches `items`. It waits while the queue is full. An exception in it reaches the
    consumer at the place where the next item would have been. Closing this generator (or leaving it by an exception)
    stops the thread after the item in hand, closes `items` in it, and joins it.
    """
    ahead: queue.Queue[Item | _End] = queue.Queue(size)
    stop = threading.Event()
    thread = threading.Thread(target=_produce, args=(items, ahead, stop), daemon=True, name="prefetch")
    thread.start()
    try:
        while True:
            item = ahead.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stop.set()
        thread.join()


def _produce(items: Iterable[Item], ahead: "queue.Queue[Item | _End]", stop: threading.Event) -> None:
    error: BaseException | None = None
    try:
        with _closing(items) as iterator:
            for item in iterator:
                if not _put(ahead, item, stop):
                    return
    except BaseException as raised:  # noqa: BLE001 - it travels to the consumer
        error = raised
    _put(ahead, _End(error), stop)


@contextlib.contextmanager
def _closing(items: Iterable[Item]) -> Iterator[Iterator[Item]]:
    iterator = iter(items)
    try:
        yield iterator
    finally:
        if isinstance(iterator, Generator):
            iterator.close()


def _put(ahead: "queue.Queue[Item | _End]", item: "Item | _End", stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            ahead.put(item, timeout=_POLL_S)
        except queue.Full:
            continue
        return True
    return False
