"""The benchmark through the command line, on the smallest of everything."""

import json

import pytest
from click.testing import CliRunner
from PIL import Image

from clipindex.cli import commands

STAGES = ["read", "decode", "decode", "write", "encode", "encode", "end to end", "encode", "encode", "end to end"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


def bench(work, *arguments):
    command = ["bench", "--models", "demo", "--images", "12", "--device", "cpu", "--work", str(work), *arguments]
    return CliRunner().invoke(commands, command)


def test_every_stage_is_measured_beside_its_ceiling(work):
    plot = work / "bench.png"
    done = bench(work, "--precisions", "fp32,bf16", "--batch-sizes", "4,6", "--plot", str(plot), "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    rows = report["measurements"]
    assert [row["stage"] for row in rows] == STAGES
    for row in rows:
        assert row["images_per_s"] > 0 and row["ceiling_per_s"] > 0
        assert row["of_ceiling"] == pytest.approx(row["images_per_s"] / row["ceiling_per_s"], abs=1e-3)
    encoded = [row["setting"] for row in rows if row["stage"] == "encode"]
    assert encoded == [f"demo, {p} on cpu, batch of {b}" for p in ("fp32", "bf16") for b in (4, 6)]
    # The whole job cannot be faster than its slowest stage was in the same minute, by much.
    assert all("bound by" in row["note"] for row in rows if row["stage"] == "end to end")
    assert report["images"] == 12
    assert report["machine"]["packages"]["torch"]
    assert report["peak_memory_bytes"] > 50e6
    with Image.open(plot) as image:
        assert image.width > 1000


def test_the_corpus_is_used_again_and_nothing_else_is_left(work):
    made = {path: path.stat().st_mtime_ns for path in work.rglob("*.tar")}
    done = bench(work, "--batch-sizes", "4", "--precisions", "fp32")
    assert done.exit_code == 0, done.output
    assert "end to end" in done.stdout and "ceilings" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*.tar")} == made != {}
    assert {path.name for path in work.iterdir()} <= {"500x375", "1600x1200", "bench.png"}


@pytest.mark.parametrize(
    "wrong",
    [
        ("--batch-sizes", "four"),
        ("--batch-sizes", "0"),
        ("--precisions", "fp9"),
        ("--plot", "x.bmp"),
        ("--device", "tpu"),
    ],
)
def test_mistakes_are_told(work, wrong):
    done = bench(work, *wrong)
    assert done.exit_code != 0
    assert wrong[1] in done.output or wrong[1] in str(done.exception)
