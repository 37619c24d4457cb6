import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading
import numpy as np
from clipindex.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        np.ones(48 << 20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def report():
    faults(1)
    print(faults(5))

thread = threading.Thread(target=report)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_memory_is_used_again_without_faulting_it_in():
    found = {
        how: int(
            subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True).stdout
        )
        for how in ("keep", "default")
    }
    # 24 pages of 2 MiB an array at least, 12,288 where there are no huge ones; five arrays.
    assert found["keep"] < 10
    assert found["default"] >= 100


THREADS = """
import resource, sys, threading
from clipindex.cli.main import run

if sys.argv[1] == "program":
    run(["--version"])

import numpy as np
from clipindex.allocator import keep_freed_memory

def together(work):
    barrier = threading.Barrier(3)
    def begin():
        barrier.wait()
        work()
        barrier.wait()
    threads = [threading.Thread(target=begin) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

found = []
lock = threading.Lock()

def faults():
    with lock:
        for _ in range(4):
            np.ones(96 << 20, np.uint8)
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        for _ in range(4):
            np.ones(96 << 20, np.uint8)
        found.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

together(lambda: np.ones(1 << 16))  # as libraries do that begin threads
keep_freed_memory()
together(faults)
print(max(found))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_the_programs_threads_keep_large_blocks_too():
    """A thread's own arena, once there is one, holds none above 64 MiB, however the allocator is told."""
    found = {}
    for how in ("program", "package"):
        command = [sys.executable, "-c", THREADS, how]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[how] = int(said.split()[-1])
    # 48 pages of 2 MiB an array at least, 24,576 where there are no huge ones; four arrays.
    assert found["program"] < 10
    assert found["package"] >= 150
