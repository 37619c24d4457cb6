import contextlib
import signal
import threading
import time

import numpy as np  # noqa: F401 - its BLAS is counted
import pytest
import torch
from threadpoolctl import threadpool_info

from clipindex.threads import apart, map_in_order, prefetch


def test_results_come_in_order_and_few_items_are_drawn_ahead():
    drawn = []

    def items():
        for at in range(12):
            drawn.append(at)
            yield at

    def slow_for_even(at):
        time.sleep(0.05 if at % 2 == 0 else 0)
        return at * at

    results = map_in_order(slow_for_even, items(), 2)
    assert next(results) == 0
    assert len(drawn) == 3
    assert list(results) == [at * at for at in range(1, 12)]


def test_libraries_are_single_threaded_in_the_map_and_as_before_after_it():
    before = torch.get_num_threads(), numpy_threads()
    torch.set_num_threads(3)
    with contextlib.closing(map_in_order(lambda _: (torch.get_num_threads(), numpy_threads()), "ab", 2)) as inside:
        assert next(inside) == (1, 1)
    assert (torch.get_num_threads(), numpy_threads()) == (3, before[1])
    torch.set_num_threads(before[0])


def numpy_threads():
    return next(
        library["num_threads"]
        for library in threadpool_info()
        if library["user_api"] == "blas" and "numpy" in library["filepath"]
    )


def test_an_error_in_the_map_arrives_in_its_place_and_ends_it():
    results = map_in_order(lambda at: 1 // at, [2, 1, 0, 3], 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert not any(thread.name.startswith("ThreadPoolExecutor") for thread in threading.enumerate())


def test_order_and_bound():
    produced = []

    def items():
        for at in range(20):
            produced.append(at)
            yield at

    ahead = prefetch(items(), 3)
    assert next(ahead) == 0
    time.sleep(0.3)
    assert len(produced) <= 1 + 3 + 1  # handed over, waiting, in the producer's hand
    assert list(ahead) == list(range(1, 20))


def test_an_error_arrives_in_its_place():
    def items():
        yield 1
        raise KeyError("two")

    ahead = prefetch(items(), 4)
    assert next(ahead) == 1
    with pytest.raises(KeyError, match="two"):
        next(ahead)


def test_closing_stops_the_thread_and_closes_the_source():
    closed = threading.Event()

    def items():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    before = threading.active_count()
    ahead = prefetch(items(), 1)
    next(ahead)
    ahead.close()
    assert closed.is_set()
    assert threading.active_count() == before


def test_what_is_called_apart_has_a_thread_that_is_gone_afterwards():
    seen = []
    assert apart(lambda: seen.append(threading.current_thread()) or 7) == 7
    assert seen[0] is not threading.main_thread() and not seen[0].is_alive()

    def fail():
        raise ValueError("not this one")

    with pytest.raises(ValueError, match="not this one"):
        apart(fail)


def test_an_interrupted_call_apart_is_not_waited_for():
    def interrupt(number, frame):
        raise KeyboardInterrupt

    done = threading.Event()
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            apart(lambda: done.wait(60))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not done.is_set()
    done.set()
