"""A few seconds of the fuzzer, from seeds that are what it should break; CONTRIBUTING.md says how to run it longer."""

import io
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from corpus import encoded, picture

pytest.importorskip("atheris", reason="has no build for this Python")

SECONDS = 8
FUZZ = Path(__file__).with_name("fuzz.py")


def tar_seeds():
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            long = "d" * (60 if form == tarfile.USTAR_FORMAT else 150)
            for name in ("a.jpg", "a.cls", f"{long}/b.v1.png", "ü.txt"):
                info = tarfile.TarInfo(name)
                info.size = 3
                tar.addfile(info, io.BytesIO(b"123"))
            link = tarfile.TarInfo("l.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
            tar.addfile(link)
        yield buffer.getvalue()[:-8000]


def image_seeds():
    small = picture(24, 20)
    yield encoded(small, "JPEG", progressive=True)
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "TGA"):
        yield encoded(small, form)
    yield encoded(small.convert("CMYK"))


@pytest.mark.slow
@pytest.mark.parametrize(("target", "seeds"), [("tar", tar_seeds), ("image", image_seeds)])
def test_the_fuzzer_finds_nothing(tmp_path, target, seeds):
    folder = tmp_path / "seeds"
    folder.mkdir()
    for at, seed in enumerate(seeds()):
        (folder / str(at)).write_bytes(seed)
    command = [sys.executable, FUZZ, target, folder, f"-max_total_time={SECONDS}", "-max_len=20000", "-timeout=20"]
    # By way of a shell, since a process's peak memory begins with that of the one it comes from.
    done = subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = int(re.search(r"Done (\d+) runs", done.stderr)[1])
    assert runs > 500  # thousands a second on an idle machine
