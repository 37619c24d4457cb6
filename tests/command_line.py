"""The program, run in the test's own process or in one of its own.

A new process takes five seconds of a core to import PyTorch and what comes with it. What a command prints, writes and
answers does not depend on them, so most tests do without; those of signals, crashes, memory and rights do not.
"""

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from clipindex.cli import main

COMMAND = Path(sys.executable).with_name("clipindex")


def with_modules(folder):
    """An environment in which Python finds the modules of a folder first."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


def run_process(*arguments, **options):
    """The installed command in a process of its own."""
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, **options)


def run_cli(*arguments):
    """The same in this process. What would end that one with a traceback is raised here."""
    command = ["clipindex", *map(str, arguments)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with _going_to(out, 1, "stdout"), _going_to(err, 2, "stderr", "backslashreplace", buffering=1), _put_back():
            sys.argv = command
            try:
                main()
            except SystemExit as end:
                status = end.code
        printed = [file.seek(0) or file.read().decode() for file in (out, err)]
    return subprocess.CompletedProcess(command, status, *printed)


@contextlib.contextmanager
def _going_to(file, number, name, errors="strict", buffering=-1):
    """Let what Python and libraries below it write to one of the standard streams go to a file."""
    before, kept = getattr(sys, name), os.dup(number)
    flush_c = ctypes.CDLL(None).fflush
    before.flush()
    flush_c(None)
    os.dup2(file.fileno(), number)
    try:
        with open(number, "w", buffering, "utf-8", errors, closefd=False) as stream:
            setattr(sys, name, stream)
            yield
        flush_c(None)
    finally:
        setattr(sys, name, before)
        os.dup2(kept, number)
        os.close(kept)


@contextlib.contextmanager
def _put_back():
    """Undo what a command sets for its process: logging, signals, warnings, threads."""
    import torch

    root, own = logging.getLogger(), logging.getLogger("clipindex")
    handlers, root.handlers = root.handlers, []  # or the command would close pytest's
    levels = root.level, own.level
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    arguments, threads = sys.argv, torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        sys.argv = arguments
        torch.set_num_threads(threads)
        for number, handler in signals.items():
            signal.signal(number, handler)
        root.handlers = handlers
        root.setLevel(levels[0])
        own.setLevel(levels[1])
