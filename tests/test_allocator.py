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
