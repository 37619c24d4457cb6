"""The benchmark through the command line, on the smallest of everything."""

import json
import os
import re

import pytest
import torch
from click.testing import CliRunner
from conftest import CUDA
from PIL import Image

from clipindex.bench import ceilings, measure
from clipindex.bench.machine import VARIABLES, describe_machine
from clipindex.bench.measure import measure_device_decode
from clipindex.bench.utilisation import describe_utilisation, sampling_utilisation
from clipindex.cli import commands
from clipindex.decode import on_device
from clipindex.models import load_model
from clipindex.shards import list_shards, read_samples
from clipindex.types import ModelSpec

STAGES = ["read", "decode", "decode", "write", "encode", "encode", "end to end", "encode", "encode", "end to end"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    monkeypatch.setattr(ceilings, "LEAST_S", 0.01)


def bench(work, *arguments):
    command = [
        "bench",
        "--models",
        "demo",
        "--images",
        "12",
        "--seconds",
        "0.1",
        "--device",
        "cpu",
        "--work",
        str(work),
        *arguments,
    ]
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
    whole = [row["note"] for row in rows if row["stage"] == "end to end"]
    assert all("bound by" in note for note in whole)
    passes = [int(re.search(r", each image (\d+) times", note)[1]) for note in whole]
    assert all(note.startswith(f"{12 * times:,} rows") for note, times in zip(whole, passes, strict=True))
    assert max(passes) > 1
    assert report["images"] == 12
    assert report["machine"]["packages"]["torch"]
    assert report["peak_memory_bytes"] > 50e6
    with Image.open(plot) as image:
        assert image.width > 1000


@pytest.mark.cuda
def test_every_stage_is_measured_on_cuda(work):
    done = bench(work, "--device", CUDA, "--precisions", "fp32,bf16", "--batch-sizes", "4", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    rows = report["measurements"]
    assert all(row["images_per_s"] > 0 and row["ceiling_per_s"] > 0 for row in rows)
    assert [row["setting"] for row in rows if row["stage"] == "copy"] == [f"batch of 4 to {CUDA}"] * 2
    # nvJPEG decodes what it can, or a warning says why not; the CPU does in any case.
    assert len([row for row in rows if row["stage"] == "decode"]) in (2, 4)
    assert [row["setting"] for row in rows if row["stage"] == "end to end"] == [
        f"demo, {precision} on {CUDA}, batch of 4" for precision in ("fp32", "bf16")
    ]
    assert report["peak_device_memory_bytes"] > 1e6
    assert report["machine"]["gpu"]


def test_the_corpus_is_used_again_and_nothing_else_is_left(work):
    made = {path: path.stat().st_mtime_ns for path in work.rglob("*.tar")}
    for left in ("again", "out/0"):  # as a benchmark that was killed leaves them
        (work / left).mkdir(parents=True)
    done = bench(work, "--batch-sizes", "4", "--precisions", "fp32")
    assert done.exit_code == 0, done.output
    assert "end to end" in done.stdout and "ceilings" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*.tar")} == made != {}
    assert {path.name for path in work.iterdir()} <= {"500x375", "1600x1200", "bench.png"}


def test_decoding_on_a_device_is_measured_beside_its_ceiling(work):
    """On the CPU as one, for want of another."""
    plan = load_model(ModelSpec(name="demo")).info.preprocess
    tars = [str(path) for path in sorted((work / "500x375").glob("*.tar"))]
    row = measure_device_decode(tars, "500x375", plan, torch.device("cpu"), chunk=5)
    assert row.images_per_s > 0 and row.ceiling_per_s > 0
    assert re.fullmatch("(9|10|11|12) of 12 images are for the device", row.note)
    with sampling_utilisation(torch.device("cpu")) as samples:
        pass
    assert "unknown" in describe_utilisation(samples)
    assert describe_utilisation([40, 60]) == "GPU utilisation 50 %"


def test_a_device_that_cannot_decode_is_asked_once(work, monkeypatch):
    asked = []

    def fail(images, device):
        asked.append(images)
        raise AttributeError("no nvJPEG")

    for module in (measure, on_device, ceilings):
        monkeypatch.setattr(module, "decode_jpegs", fail)
    plan = load_model(ModelSpec(name="demo")).info.preprocess
    tars = [str(path) for path in sorted((work / "500x375").glob("*.tar"))]
    with pytest.raises(RuntimeError, match="cpu cannot decode JPEGs: no nvJPEG"):
        measure_device_decode(tars, "500x375", plan, torch.device("cpu"))
    assert len(asked) == 1


def test_images_that_a_device_cannot_decode_are_counted(work, monkeypatch):
    real = on_device.decode_jpegs

    def choosy(images, device):
        if max(map(len, images)) == largest:
            raise RuntimeError("too large")
        return real(images, device)

    plan = load_model(ModelSpec(name="demo")).info.preprocess
    tars = [str(path) for path in sorted((work / "500x375").glob("*.tar"))]
    decoder = on_device.DeviceDecoder(plan, torch.device("cpu"), max_pixels=1 << 25)
    images = [sample.image for shard in list_shards(tars) for sample in read_samples(shard)]
    largest = max(len(image) for image in images if decoder.size_of(image))
    for module in (on_device, ceilings):
        monkeypatch.setattr(module, "decode_jpegs", choosy)
    row = measure_device_decode(tars, "500x375", plan, torch.device("cpu"), chunk=5)
    mine, of_them = re.fullmatch(r"(\d+) of 12 .*, which decoded (\d+) of them: too large", row.note).groups()
    assert int(of_them) == int(mine) - 1


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


def test_variables_that_libraries_go_by_are_part_of_a_machine(monkeypatch):
    for name in [name for name in os.environ if name.startswith(VARIABLES)]:
        monkeypatch.delenv(name)
    assert "variables" not in describe_machine()
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert describe_machine()["variables"] == {"OPENBLAS_CORETYPE": "Haswell"}
