"""Peak memory on corpora made to fill it, beside that on ordinary images: each in a process of its own.

Physics: at once in memory are five batches of pixels, their encoded bytes (at most 128 MiB a batch), an ordinary image
a decode thread, and one large image: 3 bytes a pixel and what the resize needs. Everything else has a bound as well:
members of a sample, names, captions, rows before they are written out. Expected: no corpus takes more than about 1 GiB
above the ordinary one, whatever its size.
"""

import io
import json
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from PIL import Image
from reporting import Row, arguments, finish

from clipindex.bench.corpus import write_corpus

ORDINARY_IMAGES = 2_000
LARGE_SIDE = 12_000

Member = tuple[str, bytes]

# The kernel's own high-water mark of this process; that of wait4 counts the memory of the parent before the exec.
_RUN = """
import sys
from clipindex.cli import run
status = run(sys.argv[1:])
print(*[line for line in open("/proc/self/status") if line.startswith("VmHWM")], file=sys.stderr)
sys.exit(status)
"""


def main() -> None:
    """Measure, print and, with --save, keep."""
    options = arguments(__doc__).parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder) / "corpus.tar"
        (drawn,) = write_corpus(Path(folder) / "drawn", ORDINARY_IMAGES, shard_images=ORDINARY_IMAGES)
        rows.append(_embed("ordinary images", Path(drawn), Path(folder) / "out-ordinary"))
        for at, (what, members) in enumerate(CORPORA.items()):
            _write(tar, members())
            rows.append(_embed(what, tar, Path(folder) / f"out-{at}"))
            tar.unlink()
    for row in rows:
        row["above ordinary, mib"] = int(row["peak_memory_mib"]) - int(rows[0]["peak_memory_mib"])
    finish("hostile", rows, options.save)


def _encoded(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def _large_images() -> Iterator[Member]:
    data = _encoded((LARGE_SIDE, LARGE_SIDE))
    return ((f"{at}.jpg", data) for at in range(24))


def _bombs() -> Iterator[Member]:
    head = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    data = png + struct.pack(">I", 1000) + b"IDAT" + bytes(1000)
    return ((f"{at}.png", data) for at in range(5_000))


def _large_files() -> Iterator[Member]:
    data = _encoded((500, 375)) + bytes(40 << 20)
    return ((f"{at}.jpg", data) for at in range(60))


def _long_captions() -> Iterator[Member]:
    image, text = _encoded((64, 64)), b"word " * (3 << 20)
    return (member for at in range(120) for member in [(f"{at}.jpg", image), (f"{at}.txt", text)])


def _many_members() -> Iterator[Member]:
    return ((f"one.{at}.txt", b"text" * 250) for at in range(300_000))


def _many_rejects() -> Iterator[Member]:
    return ((f"{at}.jpg", b"") for at in range(300_000))


def _long_names() -> Iterator[Member]:
    return ((f"{at:06}{'x' * 100_000}.jpg", b"") for at in range(3_000))


CORPORA: dict[str, Callable[[], Iterator[Member]]] = {
    f"24 images of {LARGE_SIDE} x {LARGE_SIDE}": _large_images,
    "5,000 headers of 30,000 x 30,000": _bombs,
    "60 files of 40 MiB": _large_files,
    "120 captions of 15 MiB": _long_captions,
    "300,000 members of one key": _many_members,
    "300,000 rejects": _many_rejects,
    "3,000 names of 100,000 characters": _long_names,
}


def _write(path: Path, members: Iterator[Member]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            cast("Any", tar).members = []  # or the writer would remember them all


def _embed(what: str, tar: Path, out: Path) -> Row:
    command = [sys.executable, "-c", _RUN, "embed", str(tar), "--out", str(out), "--model", "demo", "--json"]
    command += ["--batch-size", "64", "--max-reject-rate", "1"]
    done = subprocess.run(command, capture_output=True, check=True)
    summary = json.loads(done.stdout)
    assert summary["rows"] + summary["rejects"] == summary["samples"], summary
    peak = next(line for line in reversed(done.stderr.splitlines()) if line.startswith(b"VmHWM"))
    return {
        "corpus": what,
        "tar_mib": tar.stat().st_size >> 20,
        "rows": summary["rows"],
        "rejects": summary["rejects"],
        "seconds": summary["seconds"],
        "peak_memory_mib": int(peak.split()[1]) // 1024,
    }


if __name__ == "__main__":
    main()
