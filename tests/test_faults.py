"""What happens to a job: crashes, kills, a disk that cannot be written, a second run, a parent that dies."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import COMMAND, run_cli, run_process, with_modules
from conftest import PixelEncoder
from corpus import CRASHING_PLUGIN, HARMLESS, POISON, encoded, labelled, write_tar

from clipindex.atomic import create_temporary
from clipindex.decode import decode_image
from clipindex.embed_job import embed as embed_here
from clipindex.errors import ClipindexError, SampleError, StoreError
from clipindex.pipeline import alone
from clipindex.pipeline.in_hand import InHand
from clipindex.shards import list_shards
from clipindex.store import published_shards, read_embeddings, read_rejects
from clipindex.verification import verify
from clipindex.zeroshot import classify

TINY = ["--model", "demo", "--precision", "fp32", "--device", "cpu", "--batch-size", "16"]


def embedding(sources, out, *options):
    return ["embed", *map(str, sources), "--out", str(out), *TINY, *options]


def check_whole(out, samples):
    """Every sample is a row or a reject, each once, and every row is its image's."""
    records = published_shards(out).values()
    assert sum(record.samples for record in records) == samples
    found = verify(out, deep=True, sample=16, device="cpu", precision="fp32")
    assert (found.faults, found.notes) == ([], [])
    return found


def test_an_image_that_kills_its_decoder_ends_one_run_and_is_a_reject_of_the_next(tmp_path):
    """A Pillow plug-in that reads address zero, in a decode thread: a real segmentation fault."""
    (tmp_path / "pillow_heif.py").write_text(CRASHING_PLUGIN)
    members = []
    for name, data in labelled([f"k{at:03}" for at in range(90)]):
        if name in ("k050.jpg", "k020.jpg"):
            name, data = name.replace(".jpg", ".heic"), POISON if name == "k050.jpg" else HARMLESS
        members.append((name, data))
    write_tar(tmp_path / "a.tar", members[:60])
    write_tar(tmp_path / "b.tar", members[60:])
    environment = with_modules(tmp_path)
    out = tmp_path / "out"
    sources = [tmp_path / "b.tar", tmp_path / "a.tar"]
    crashed = run_process(*embedding(sources, out), env=environment)
    assert crashed.returncode == -signal.SIGSEGV, crashed.stderr
    assert len(list(out.glob(".run.*.hand"))) == 1

    done = run_process(*embedding(sources, out, "--json"), env=environment)
    assert done.returncode == 0, done.stderr
    rejects = [r for record in published_shards(out).values() for r in read_rejects(out, record.name).to_pylist()]
    assert [(r["key"], r["stage"]) for r in rejects] == [("k050", "decode")]
    assert "crashed (SIGSEGV)" in rejects[0]["reason"]
    keys = [k for batch in read_embeddings(out, ("key",)) for k in batch.columns["key"].to_pylist()]
    assert sorted(keys) == [f"k{at:03}" for at in range(90) if at != 50]
    assert not list(out.glob(".run.*"))


def test_suspects_outlive_a_run_that_is_stopped_before_it_comes_to_them(tmp_path):
    code = (
        "import os, pathlib; from clipindex.pipeline.in_hand import InHand\n"
        f"with InHand(pathlib.Path({str(tmp_path)!r}), 1, 2).decoding() as hold:\n"
        "    hold([('shard', 'a')]); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    stopped = InHand(tmp_path, 1, 2)
    stopped.close(finished=False)
    again = InHand(tmp_path, 1, 2)
    with again.decoding() as hold:
        assert hold([("shard", "a")]) == [True]
        assert hold([("shard", "b")]) == [False]
    again.close(finished=True)
    assert not list(tmp_path.iterdir())


def held_image(folder, host=None):
    """What a killed run leaves that had image 'a' of 'shard' in hand."""
    before = set(folder.glob(".run.*.hand"))
    held = InHand(folder, 1, 1)
    with held.decoding() as hold:
        hold([("shard", "a")])
        (path,) = set(folder.glob(".run.*.hand")) - before
        content = path.read_bytes()
    held.close(finished=True)
    parts = path.name.split(".")
    parts[2] = host or parts[2]
    path.with_name(".".join(parts)).write_bytes(content)


def test_suspects_of_another_host_are_heeded_at_once(tmp_path):
    """A container has a new name for each run."""
    held_image(tmp_path, host="another")
    run = InHand(tmp_path, 1, 1)
    with run.decoding() as hold:
        assert hold([("shard", "a")]) == [True]
    run.close(finished=True)
    assert len(list(tmp_path.iterdir())) == 1  # whether that host's run lives cannot be known for a day


def test_suspects_of_a_run_that_dies_meanwhile_are_heeded(tmp_path):
    write_tar(tmp_path / "corpus" / "a.tar", labelled(["a"]))
    (shard,) = list_shards(str(tmp_path / "corpus"))
    out = tmp_path / "out"
    out.mkdir()
    run = InHand(out, 1, 1)
    with run.decoding() as hold:
        assert hold([("shard", "a")]) == [False]
        held_image(out)
        assert not run.is_in_other_hands(shard)
        assert hold([("shard", "a")]) == [True]
    run.close(finished=True)
    assert not list(out.iterdir())


OPTIONS = {"fast": False, "max_pixels": 10_000}


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        ("import os; os.kill(os.getpid(), 15)", ClipindexError, "was stopped"),
        ("import os; os.kill(os.getpid(), 14)", SampleError, "hung for 120 s"),
        ("import os; os.kill(os.getpid(), 40)", SampleError, "crashed"),
        ("import ctypes; ctypes.string_at(0)", SampleError, "crashed \\(SIGSEGV\\)"),
        ("raise RuntimeError('odd')", SampleError, "RuntimeError: odd"),
    ],
)
def test_what_becomes_of_a_process_says_what_becomes_of_its_image(monkeypatch, code, error, said):
    monkeypatch.setattr(alone, "_CODE", code)
    decoder = alone.LoneDecoder(PixelEncoder().info.preprocess, **OPTIONS)
    with pytest.raises(error, match=said) as raised:
        decoder.decode(b"", np.zeros((32, 32, 3), np.uint8))
    assert raised.type is error


def test_alone_an_image_gives_the_same_pixels():
    preprocess = PixelEncoder().info.preprocess
    found, expected = np.zeros((2, 32, 32, 3), np.uint8)
    decoder = alone.LoneDecoder(preprocess, **OPTIONS)
    assert decoder.decode(encoded(), found) == decode_image(encoded(), preprocess, expected, **OPTIONS)
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(SampleError, match="empty"):
        decoder.decode(b"", found)


def test_a_jpeg_alone_waits_for_pytorch_and_no_more(monkeypatch, tmp_path):
    for name in ("open_clip", "torchvision"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    monkeypatch.syspath_prepend(tmp_path)
    pixels = np.zeros((32, 32, 3), np.uint8)
    decoder = alone.LoneDecoder(PixelEncoder().info.preprocess, **OPTIONS)
    assert decoder.decode(encoded(), pixels) == (96, 64)
    # What has to be there for others and is not says nothing of the image.
    with pytest.raises(SampleError, match="failed in a process of its own: ImportError: not here"):
        decoder.decode(encoded(form="PNG"), pixels)


def test_closing_ends_what_runs_alone(monkeypatch):
    monkeypatch.setattr(alone, "_CODE", "import time; time.sleep(60)")
    decoder = alone.LoneDecoder(PixelEncoder().info.preprocess, **OPTIONS)
    threading.Timer(0.3, decoder.close).start()
    started = time.monotonic()
    with pytest.raises(ClipindexError, match="was stopped"):
        decoder.decode(b"", np.zeros((32, 32, 3), np.uint8))
    assert time.monotonic() - started < 20


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def num_published(out):
    return len(list((out / "embeddings").glob("[!.]*.parquet")))


def test_a_terminal_that_closes_stops_the_run_like_sigterm(tmp_path):
    for at in range(6):
        write_tar(tmp_path / "corpus" / f"{at}.tar", labelled([f"s{at}_{i}" for i in range(300)]))
    out = tmp_path / "out"
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has ignored, and so would its children
    command = embedding([tmp_path / "corpus"], out)
    process = subprocess.Popen([COMMAND, *command], stderr=subprocess.PIPE, start_new_session=True)
    wait_for(lambda: num_published(out) >= 1)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGHUP
    assert not list(out.rglob(".*.tmp")) + list(out.glob(".run.*"))
    assert run_cli(*command).returncode == 0
    check_whole(out, 1800)


def test_a_run_whose_parent_is_killed_goes_on_to_the_end(tmp_path):
    """The pipe of its log lines has no reader any more; rows matter more than lines."""
    for at in range(4):
        write_tar(tmp_path / "corpus" / f"{at}.tar", labelled([f"s{at}_{i}" for i in range(300)]))
    out = tmp_path / "out"
    command = [str(COMMAND), *embedding([tmp_path / "corpus", tmp_path / "corpus" / "0.tar"], out)]
    code = f"import subprocess; subprocess.run({command!r}, stderr=subprocess.PIPE, stdout=subprocess.PIPE)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: num_published(out) >= 1)
    parent.kill()
    parent.wait()
    wait_for(lambda: (out / "summary.json").exists())
    wait_for(lambda: not list(out.glob(".run.*")))
    check_whole(out, 1200)


def test_two_runs_share_the_work_and_publish_each_shard_once(tmp_path):
    num_shards = 24
    for at in range(num_shards):
        members = labelled([f"s{at}_{i}" for i in range(150)])
        broken = ((name, b"broken" if name.endswith("7.jpg") else data) for name, data in members)
        write_tar(tmp_path / "corpus" / f"{at}.tar", broken)
    out = tmp_path / "out"
    command = [COMMAND, *embedding([tmp_path / "corpus"], out, "--json")]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    summaries = []
    for run in runs:
        stdout, stderr = run.communicate(timeout=120)
        assert run.returncode == 0, stderr
        summaries.append(json.loads(stdout))
    assert sum(summary["shards_embedded"] for summary in summaries) == num_shards
    for summary in summaries:
        parts = ("shards_embedded", "shards_done_before", "shards_done_elsewhere")
        assert sum(summary[part] for part in parts) == num_shards
    check_whole(out, num_shards * 150)
    assert sum(record.rows for record in published_shards(out).values()) == num_shards * 135
    assert not list(out.rglob("*.tmp"))


def test_a_shard_in_a_living_runs_hands_is_put_off_but_not_for_ever(tmp_path):
    for name in ("a", "b", "c"):
        write_tar(tmp_path / "corpus" / f"{name}.tar", labelled([f"{name}{i}" for i in range(5)]))
    out = tmp_path / "out"
    first = list_shards(str(tmp_path / "corpus" / "a.tar"))[0]
    hanging = InHand(out, 1, 1)
    hanging.take_shard(first)
    done = run_cli(*embedding([tmp_path / "corpus"], out))
    assert done.returncode == 0, done.stderr
    files = sorted((out / "embeddings").glob("*.parquet"), key=lambda path: path.stat().st_mtime_ns)
    assert files[-1].stem == first.name
    hanging.close(finished=True)
    check_whole(out, 15)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system takes root")
def test_an_output_that_cannot_be_written_is_said_at_once(tmp_path):
    write_tar(tmp_path / "a.tar", labelled(["a", "b"]))
    place = tmp_path / "read-only"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place]).returncode:
        pytest.skip("no right to mount here")
    try:
        done = run_cli(*embedding([tmp_path / "a.tar"], place / "out"))
    finally:
        subprocess.run(["umount", place], check=True)
    assert done.returncode == 1
    assert "Read-only file system" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming somebody without the right takes root")
def test_an_output_of_somebody_else_is_said(tmp_path):
    code = (
        "import os, sys; from clipindex.cli import run; import torch, pyarrow.parquet, open_clip, clipindex.embed_job\n"
        "os.setgid(65534); os.setuid(65534); sys.exit(run(sys.argv[1:]))"
    )
    for folder in (tmp_path, *tmp_path.parents):
        if any(part.startswith("pytest-") for part in folder.parts):  # made by pytest, for its user alone
            folder.chmod(0o755)
    write_tar(tmp_path / "a.tar", labelled(["a", "b"]))
    command = [sys.executable, "-c", code, *embedding([tmp_path / "a.tar"], tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Permission denied" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_what_dead_runs_left_is_cleaned_by_the_next(tmp_path):
    write_tar(tmp_path / "a.tar", labelled(["a"]))
    out = tmp_path / "out"
    for folder in ("", "embeddings", "rejects"):
        path, file = create_temporary(out / folder / "x.parquet", ".tmp")
        file.close()
        assert path.exists()
    path, file = create_temporary(out / "run", ".hand")
    file.close()
    assert run_cli(*embedding([tmp_path / "a.tar"], out)).returncode == 0
    check_whole(out, 1)


def test_classifying_what_is_damaged_or_foreign_is_said(tmp_path):
    write_tar(tmp_path / "a.tar", labelled(["a", "b"]))
    out = tmp_path / "out"
    embed_here(str(tmp_path / "a.tar"), out, model="demo", batch_size=8, device="cpu", precision="fp32")
    (tmp_path / "c.txt").write_bytes("\N{BYTE ORDER MARK}cat\r\ndog\r\nbird\r\n".encode())
    options = {"classes": tmp_path / "c.txt", "device": "cpu", "precision": "fp32"}
    assert [row["name"] for row in classify(out, **options).per_class] == ["cat", "dog", "bird"]

    (path,) = (out / "embeddings").glob("*.parquet")
    whole = path.read_bytes()
    pq.write_table(pa.table({"x": [1]}), tmp_path / "foreign.parquet")
    for data, said in [
        (whole[: len(whole) // 2], "is damaged"),
        (b"", "is damaged"),
        (encoded(), "is damaged"),
        ((tmp_path / "foreign.parquet").read_bytes(), "was not written by clipindex"),
    ]:
        path.write_bytes(data)
        with pytest.raises(StoreError, match=f"{path}.* {said}"):
            classify(out, **options)
