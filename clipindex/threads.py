"""Threads: how many the machine has cores for, and work done in them whose results come in order."""

import contextlib
import ctypes
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from threadpoolctl import threadpool_info, threadpool_limits

Item = TypeVar("Item")
Result = TypeVar("Result")

_OMP_PAUSE_SOFT = 1
_POLL_S = 0.1
"""How soon a producer notices that its consumer has gone; costs nothing while items flow."""


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _End:
    """Last thing in the queue: the producer is done, or died of `error`."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int
) -> Generator[Result, None, None]:
    """Yield `function(item)` in the order of `items`, computed in threads, at most one more item in hand than those.

    The consumer's thread draws the items. An exception of `function` reaches the consumer at its result's place.
    Meanwhile PyTorch and BLAS have one thread a caller: teams of them that wait for each other waste a busy machine.
    """
    with one_thread():
        pool = ThreadPoolExecutor(num_threads)
        try:
            yield from _map_in_order(pool, num_threads, function, items)
        finally:
            pool.shutdown(cancel_futures=True)


def _map_in_order(
    pool: ThreadPoolExecutor, num_threads: int, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    running: deque[Future[Result]] = deque()
    for item in items:
        running.append(pool.submit(function, item))
        if len(running) > num_threads:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def drop_openmp_threads() -> None:
    """Let go of the threads that OpenMP keeps for the calling thread; it gets others when it needs some.

    On a CPU, PyTorch has such threads for each thread that called it. When all of them are more than cores, they sleep
    at the ends of parallel regions instead of spinning, hundreds of times a batch: 3 to 5 % of an encoder's time. By
    `omp_pause_resource_all` (OpenMP 5.0, 3.2.44), where the library has that.
    """
    for library in threadpool_info():
        if library["user_api"] == "openmp":
            with contextlib.suppress(AttributeError):
                ctypes.CDLL(library["filepath"]).omp_pause_resource_all(_OMP_PAUSE_SOFT)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For many small computations, at which a team of threads is slower, and much so on a busy machine.

    PyTorch has one in the caller's thread, and in threads that begin meanwhile. BLAS, which NumPy multiplies by, has
    one for each thread that calls it, in all of the process. PyTorch's come back in the order of nesting: what begins
    within has to end within.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _one_blas_thread:
            yield
    finally:
        torch.set_num_threads(threads)


class _OneBlasThread:
    """The first who wants it limits the process's BLAS, the last one ends that, in whatever order they come and go.

    Finding the libraries takes a millisecond, which a pass over the data within a descent should not pay each time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._limits: threadpool_limits | None = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._limits = threadpool_limits(1, user_api="blas")
            self._users += 1

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users and self._limits is not None:
                self._limits.restore_original_limits()


_one_blas_thread = _OneBlasThread()


def prefetch(items: Iterable[Item], size: int) -> Generator[Item, None, None]:
    """Yield `items` in order while a thread of their own produces up to `size` of them ahead; see `merge`."""
    return merge([items], size)


def merge(sources: Sequence[Iterable[Item]], size: int) -> Generator[Item, None, None]:
    """Yield the items of several sources as they come, each source produced by a thread of its own, in its order.

    Together the threads run up to `size` items ahead and then wait. Only a source's own thread touches it. An exception
    in one reaches the consumer at the place where its next item would have been, and ends all. Closing this generator
    (or leaving it by an exception) stops each thread after the item in hand, closes its source in it, and joins it.
    """
    ahead: queue.Queue[Item | _End] = queue.Queue(size)
    stop = threading.Event()
    threads = [
        threading.Thread(target=_produce, args=(items, ahead, stop), daemon=True, name="produce") for items in sources
    ]
    for thread in threads:
        thread.start()
    try:
        running = len(threads)
        while running:
            item = ahead.get()
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                running -= 1
    finally:
        stop.set()
        for thread in threads:
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
