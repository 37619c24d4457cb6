import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

from command_line import with_modules
from corpus import CRASHING_PLUGIN, POISON, labelled, write_tar

NIGHTLY = Path(__file__).parents[1] / "jobs" / "nightly.sh"


def nightly(*arguments, environment=os.environ):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [NIGHTLY, *map(str, arguments)], capture_output=True, text=True, env={**environment, "PATH": path}
    )


def test_each_night_embeds_what_is_new(tmp_path):
    out = tmp_path / "out"
    for night in range(2):
        write_tar(tmp_path / "corpus" / f"{night}.tar", labelled([f"n{night}"]))
        done = nightly(tmp_path / "corpus", out, "demo")
        assert done.returncode == 0, done.stderr
    nights = [json.loads(line) for line in (out / "nightly.jsonl").read_text().splitlines()]
    assert [(night["shards_embedded"], night["shards_done_before"]) for night in nights] == [(1, 0), (1, 1)]
    assert all(night["finished"].endswith("Z") for night in nights)


def test_images_that_crash_their_decoders_do_not_end_the_night(tmp_path):
    (tmp_path / "pillow_heif.py").write_text(CRASHING_PLUGIN)
    write_tar(tmp_path / "a.tar", [("bad.heic", POISON), *labelled(["a", "b"])])
    done = nightly(tmp_path / "a.tar", tmp_path / "out", "demo", environment=with_modules(tmp_path))
    assert "running again, its images one by one" in done.stderr
    (night,) = [json.loads(line) for line in (tmp_path / "out" / "nightly.jsonl").read_text().splitlines()]
    assert (night["rows"], night["rejects"]) == (2, 1)
    assert done.returncode == 3  # of so few, one is more than --max-reject-rate


def test_a_night_that_overlaps_steps_back(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with open(out / ".nightly.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = nightly(tmp_path / "nowhere", out, "demo")
    assert done.returncode == 0
    assert "another nightly run" in done.stderr


def test_a_failed_night_says_so(tmp_path):
    done = nightly(tmp_path / "nowhere", tmp_path / "out", "demo")
    assert done.returncode == 1
    assert "nowhere" in done.stderr
