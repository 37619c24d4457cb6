"""The program: what it says, its exit status, what stopping it leaves."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from command_line import COMMAND, run_cli, run_process
from corpus import encoded, labelled, write_tar

from clipindex.cli import commands
from clipindex.store import published_shards, read_embeddings, read_rejects

TINY = ["--model", "demo", "--precision", "fp32", "--device", "cpu"]
BATCHES = ["--batch-size", "8"]  # measuring it takes seconds


def dirty(number, prefix):
    for name, data in labelled([f"{prefix}{at:04}" for at in range(number)]):
        yield name, b"broken" if name.endswith("7.jpg") else data


def test_help_answers_without_importing_what_is_slow():
    code = (
        "import sys, clipindex.cli as cli; cli.run(['--help']); cli.run(['embed', '--help']);"
        "print([m for m in ('torch', 'numpy', 'pyarrow', 'faiss', 'open_clip', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    started = time.perf_counter()
    assert run_process("--help").returncode == 0
    assert time.perf_counter() - started < 1  # 0.1 s where nothing else runs


def every_command():
    """Those of groups as well, named as they are typed."""
    for name, command in commands.commands.items():
        yield name, command
        for sub, one in getattr(command, "commands", {}).items():
            yield f"{name} {sub}", one


def test_every_command_and_option_says_what_it_does():
    for _, command in every_command():
        assert command.help
        for parameter in command.params:
            assert isinstance(parameter, click.Argument) or parameter.help, (command.name, parameter.name)


def test_limits_are_those_of_the_modules_that_the_command_line_does_not_load():
    from clipindex.decode import MAX_PIXELS
    from clipindex.shards import MAX_BYTES

    limits = {p.name: p for p in commands.commands["embed"].params if p.name in ("max_pixels", "max_bytes")}
    for name, most in [("max_pixels", MAX_PIXELS), ("max_bytes", MAX_BYTES)]:
        assert (limits[name].default, limits[name].type.max) == (most, most)


def test_every_command_is_in_the_readme():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for name, _ in every_command():
        assert f"clipindex {name}" in readme
    for option in re.findall(r"--[a-z][a-z-]+", readme):
        known = {o for _, c in every_command() for p in c.params for o in (*p.opts, *p.secondary_opts)}
        assert option in known | {"--help", "--version", "--save", "--editable"}, option


def test_from_tars_to_accuracy_in_one_command(tmp_path):
    from clipindex.demo import DATA

    done = run_process("classify", DATA / "wds_shapes", "--out", tmp_path / "out", *TINY, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["acc1"] >= 0.8
    assert found["rows"] == sum(record.rows for record in published_shards(tmp_path / "out").values())
    again = run_cli("classify", tmp_path / "out", "--classes", DATA / "wds_shapes" / "classnames.txt", "--top", 1)
    assert again.returncode == 0, again.stderr
    assert re.search(r"acc1 \d+\.\d\d%", again.stdout)


def test_json_is_the_only_thing_on_standard_output_and_logs_are_lines(tmp_path):
    write_tar(tmp_path / "a.tar", dirty(12, "k"))
    done = run_process("embed", tmp_path / "a.tar", "--out", tmp_path / "out", *TINY, *BATCHES, "--json")
    summary = json.loads(done.stdout)
    assert (summary["samples"], summary["rows"], summary["rejects"]) == (12, 11, 1)
    assert done.returncode == 0
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", line) for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["embed", "nowhere.tar", "--out", "out", *TINY], 1, "nowhere.tar: no such file"),
        (["embed", "a.tar", "--out", "out"], 2, "--model"),
        (["embed", "a.tar", "--out", "out", "--model", "ViT-B-33"], 1, "ViT-B-32"),
        (["embed", "pipe:cat x", "--out", "out", *TINY], 1, "refused"),
        (["embed", "a.tar", "--out", "out", "--model", "demo", "--device", "tpu"], 2, "tpu"),
        (
            ["embed", "a.tar", "--out", "out", *TINY, *BATCHES, "--max-reject-rate", "0.05"],
            3,
            "10.0% of the samples are rejects, above --max-reject-rate 0.05",
        ),
        (["embed", "a.tar", "cut.tar", "--out", "out", *TINY, *BATCHES], 1, "cut.tar: truncated"),
        (["embed", "a.tar", "--out", "a.tar", *TINY], 1, "a.tar"),
        (["classify", "nowhere", "--classes", "c.txt"], 2, "--out and --model"),
        (["classify", "--image", "x.jpg", "--classes", "c.txt", *TINY], 1, "c.txt"),
        (["frobnicate"], 2, "No such command"),
        (["classify", "--image", "x.jpg", "--classes", "c.txt", *TINY, "--refresh"], 2, "--refresh does not apply"),
        (["classify", "a.tar", "--classes", "c.txt", "--out", "o", "--random-init", "1"], 2, "--random-init does not"),
    ],
)
def test_mistakes_end_in_one_line_and_a_status(tmp_path, monkeypatch, arguments, status, message):
    whole = write_tar(tmp_path / "a.tar", dirty(10, "k")).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:5000])
    monkeypatch.chdir(tmp_path)
    done = run_cli(*arguments)
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_part_of_the_source_is_not_classified_as_if_it_were_all(tmp_path):
    whole = write_tar(tmp_path / "wds" / "0.tar", labelled(["a", "b"])).read_bytes()
    (tmp_path / "wds" / "1.tar").write_bytes(whole[:3000])
    (tmp_path / "c.txt").write_text("cat\ndog\nbird\n")
    source, classes = tmp_path / "wds", tmp_path / "c.txt"
    command = ["classify", source, "--classes", classes, "--out", tmp_path / "out", *TINY, *BATCHES]
    done = run_cli(*command)
    assert done.returncode == 1
    assert "not classified" in done.stderr
    assert not (tmp_path / "out" / "predictions").exists()
    write_tar(tmp_path / "wds" / "1.tar", labelled(["c"]))
    assert "3 images, 3 classes" in run_cli(*command).stdout


def test_the_readmes_python_works(tmp_path):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    block = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    write_tar(tmp_path / "shards" / "000.tar", labelled(["a", "b"]))
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\n")
    block = block.replace("{000..999}", "000").replace(
        'model="ViT-B-32", pretrained="laion2b_s34b_b79k"', 'model="demo"'
    )
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) >= 0


def test_pack_then_embed_then_one_image(tmp_path):
    for at, name in enumerate(("red circle", "blue square")):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        (folder / f"{at}.jpg").write_bytes(encoded())
    packed = run_process("pack", tmp_path / "photos", tmp_path / "wds", "--split", "test", "--json")
    assert packed.returncode == 0, packed.stderr
    assert json.loads(packed.stdout)["num_samples"] == 2
    done = run_cli(
        "classify", "--image", tmp_path / "photos/red circle/0.jpg", "--classes", tmp_path / "wds/classnames.txt", *TINY
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"(red circle|blue square): +\d+\.\d\d%", done.stdout)) == 2


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_is_finished_by_the_next(tmp_path, number):
    for at in range(8):
        write_tar(tmp_path / "corpus" / f"{at}.tar", dirty(200, f"s{at}_"))
    out = tmp_path / "out"
    command = [COMMAND, "embed", tmp_path / "corpus", "--out", out, *TINY, *BATCHES]
    # What a shell starts in the background ignores SIGINT, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    wait_for(lambda: len(list((out / "embeddings").glob("[!.]*.parquet"))) >= 2)
    process.send_signal(number)
    said = process.communicate(timeout=30)[1].decode()
    status = process.returncode
    assert status == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    done_before = published_shards(out)
    assert 2 <= len(done_before) < 8
    if number != signal.SIGKILL:
        assert said.endswith("ed: published shards are kept; run again to go on\n")
        assert not list(out.rglob("*.tmp"))

    done = run_cli(*command[1:], "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["shards_done_before"] == len(done_before)
    records = published_shards(out).values()
    assert [(r.samples, r.rows, r.rejects) for r in records] == [(200, 180, 20)] * 8
    keys = {k for batch in read_embeddings(out, ("key",)) for k in batch.columns["key"].to_pylist()}
    rejected = {k for r in records for k in read_rejects(out, r.name)["key"].to_pylist()}
    assert keys | rejected == {f"s{at}_{i:04}" for at in range(8) for i in range(200)}
    assert not keys & rejected
    assert not list(out.rglob("*.tmp"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_full_disk_is_said_and_what_was_published_stays(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", small]).returncode:
        pytest.skip("no right to mount here")
    try:
        for at in range(4):
            write_tar(tmp_path / "corpus" / f"{at}.tar", dirty(300, f"s{at}_"))
        done = run_cli("embed", tmp_path / "corpus", "--out", small / "out", *TINY, *BATCHES)
        assert done.returncode == 1
        assert "No space left" in done.stderr
        assert "Traceback" not in done.stderr
        for record in published_shards(small / "out").values():
            assert record.rows + record.rejects == 300
        assert not list((small / "out").rglob("*.tmp"))
    finally:
        subprocess.run(["umount", small], check=True)
