import threading
import time

import pytest

from clipindex.threads import prefetch


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
