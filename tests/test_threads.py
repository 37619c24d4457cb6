import contextlib
import subprocess
import sys
import threading
import time

import numpy as np  # noqa: F401 - its BLAS is counted
import pytest
import torch
from threadpoolctl import threadpool_info

from clipindex.threads import map_in_order, prefetch


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


def test_openmp_lets_go_of_its_threads_and_gets_them_again():
    program = """
import os, torch
from clipindex.threads import drop_openmp_threads

def count():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(4)
matrix = torch.rand(1 << 20)
before = count()
for _ in range(2):
    (matrix + matrix).sum()
    print(count() - before)
    drop_openmp_threads()
    print(count() - before)
print(torch.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "0", "3", "0", "4"]
