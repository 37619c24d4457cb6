"""Commands of their own process: how long they take, and how much memory."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_POLL_S = 0.02


class Finished(NamedTuple):
    """What a command took."""

    seconds: float
    peak_memory_bytes: int
    """Resident, mapped files among it."""
    said: str
    """On standard output."""


def run_command(command: Sequence[str], limit: float) -> Finished:
    """Run a command to its end.

    Raises:
        SystemExit: It failed or ran past the limit, in seconds; its last words are said.
    """
    environment = os.environ | {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as words:
        started = time.perf_counter()
        # A session of its own, so that its workers can be ended with it.
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=words, start_new_session=True)
        try:
            peak = 0
            while process.poll() is None:
                peak = max(peak, _peak_memory_bytes(process.pid))
                if time.perf_counter() - started > limit:
                    os.killpg(process.pid, signal.SIGKILL)
                time.sleep(_POLL_S)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        seconds = time.perf_counter() - started
        for file in (said, words):
            file.seek(0)
        if process.returncode:
            last = words.read().decode(errors="replace")[-4000:]
            why = f"ended with status {process.returncode}" if seconds < limit else "ran past --limit"
            raise SystemExit(f"{last}\n{' '.join(command[:2])} {why} after {seconds:.0f} s")
        return Finished(seconds, peak, said.read().decode(errors="replace"))


def _peak_memory_bytes(pid: int) -> int:
    """By the kernel's high-water mark; what `wait4` tells begins with the memory of the parent."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next((line.split()[1] for line in lines if line.startswith("VmHWM")), "0")) << 10
    return 0


def install(venv: Path, wanted: Sequence[str], python: str, limit: float, needed_bytes: int) -> Path:
    """The Python of a virtual environment with these packages, built where it is not there already."""
    venv = venv.absolute()
    done = venv / "installed.txt"  # written last: an installation that was stopped is taken up again
    if not done.exists() or done.read_text().split() != list(wanted):
        venv.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(venv).free < needed_bytes:
            raise SystemExit(
                f"{venv}: less than {needed_bytes >> 30} GiB free; name a folder on a larger disk with --venv"
            )
        print(f"installing {wanted[0]}: some minutes", file=sys.stderr)
        run_command([python, "-m", "venv", str(venv)], limit)
        run_command([str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", *wanted], limit)
        done.write_text("\n".join(wanted))
    return venv / "bin" / "python"
