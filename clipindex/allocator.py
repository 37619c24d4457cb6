"""The C library's allocator, told what kind of program this is."""

import ctypes
import platform

# malloc.h of glibc
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

_KEPT_BYTES = 1 << 30
_NEVER = -1


def share_one_arena() -> None:
    """Let all threads that begin from now on allocate from one arena, where the C library is glibc.

    By default each thread keeps what it freed for itself: threads that read, convert and multiply blocks by turns hold
    several times what is in use. Arenas that are there already stay, and new threads get one of all by turns; those
    but the first hold no block above 64 MiB. So the program calls this first of all, before NumPy and PyTorch begin
    threads; what uses the package from Python may do the same, or set MALLOC_ARENA_MAX=1.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def keep_freed_memory() -> None:
    """Let the C library keep memory that is freed, for all threads, instead of giving it back to the system at once.

    On a CPU, a model's activations are allocated anew for each batch. By default glibc maps and unmaps each of them,
    and faulting the pages in costs a third of the time of a ResNet-50. Nothing but glibc is touched.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    share_one_arena()  # those of other threads are too small to keep anything in
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
