"""Decoding on a device: the whole way on the CPU as its own device, and on CUDA where there is one."""

import itertools
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import DEVICES, PixelEncoder
from corpus import encoded, labelled, picture, write_tar
from PIL import Image
from sklearn.datasets import load_sample_images

from clipindex import embed
from clipindex.decode import MAX_PIXELS, decode_image, on_device
from clipindex.decode.on_device import DeviceDecoder
from clipindex.errors import UsageError
from clipindex.pipeline import embed_shards
from clipindex.pipeline.device_share import MOST_DEVIATION, MOST_FAULTS, DeviceShare, share_decoding
from clipindex.pipeline.in_hand import InHand
from clipindex.shards import list_shards
from clipindex.store import open_dataset, published_shards, read_embeddings, read_rejects
from clipindex.types import Preprocess

MOST = {"cpu": (2, 0.02), "cuda": (255, MOST_DEVIATION)}
"""Of 255, at worst and on average over an image. How nvJPEG widens chroma is its own affair, and small vivid images
show that most; benchmarks/gpu.py says what it is for photographs."""
SAME = {"cpu": 0, "cuda": 3}
"""Of 255, between one decoding and another: nobody promises that an engine does the same alone and among others."""


def preprocess(size=(64, 64), mode="shortest", interpolation="bicubic", resize_size=None):
    return Preprocess(size=size, resize_mode=mode, interpolation=interpolation, mean=(0.0,) * 3, std=(1.0,) * 3,
                      resize_size=resize_size)  # fmt: skip


def decoder(device, plan=None, max_pixels=MAX_PIXELS, kind=DeviceDecoder):
    return kind(plan or preprocess(), torch.device(device), max_pixels=max_pixels)


def on(device, images, plan=None):
    """Pixels of images that are all for the device."""
    there = decoder(device, plan)
    out = np.zeros((len(images), *there.preprocess.size, 3), np.uint8)
    sizes = [there.size_of(data) for data in images]
    decoded, seconds = there.decode(images, sizes, list(out))
    assert all(decoded) and seconds > 0, (decoded, there.last_error, sizes)
    return out, [tuple(size) for size in sizes]


def by_the_cpu(images, plan=None):
    plan = plan or preprocess()
    out = np.zeros((len(images), *plan.size, 3), np.uint8)
    return out, [decode_image(data, plan, pixels) for data, pixels in zip(images, out, strict=True)]


def apart(found, expected):
    """How far pixels are from others, at worst."""
    return int(np.abs(found.astype(np.int16) - expected).max())


def photographs(width=500, **options):
    return [
        encoded(
            Image.fromarray(pixels).resize((width, width * 3 // 4), Image.Resampling.LANCZOS), quality=90, **options
        )
        for pixels in load_sample_images().images
    ]


VARIED = [
    *photographs(), *photographs(640, subsampling=0), *photographs(333, subsampling=1), *photographs(1001),
    *(encoded(picture(*shape)) for shape in [(40, 30), (301, 97), (64, 64), (90, 900), (65, 63)]),
    encoded(picture(200, 150).convert("L")), encoded(picture(200, 150), restart_marker_blocks=2),
]  # fmt: skip
TINY = [encoded(picture(*shape)) for shape in [(1, 1), (8, 8), (3, 17)]]
PLANS = [
    preprocess(), preprocess((224, 224)), preprocess((224, 224), "squash"), preprocess((48, 80), "squash"),
    preprocess(interpolation="bilinear"), preprocess((224, 224), resize_size=(256, 256)),
]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("plan", PLANS)
def test_pixels_are_those_of_the_cpus_way(device, plan):
    found, sizes = on(device, VARIED, plan)
    expected, expected_sizes = by_the_cpu(VARIED, plan)
    assert sizes == expected_sizes
    difference = np.abs(found.astype(np.int16) - expected)
    worst, mean = MOST[device]
    means = difference.mean(axis=(1, 2, 3))
    assert difference.max() <= worst and means.max() <= mean, (difference.max(), list(zip(sizes, means, strict=True)))


@pytest.mark.parametrize("device", DEVICES)
def test_tiny_images_are_right_or_for_the_cpu(device):
    there = decoder(device, PLANS[1])
    out = np.zeros((len(TINY), 224, 224, 3), np.uint8)
    decoded, _ = there.decode(TINY, [there.size_of(data) for data in TINY], list(out))
    assert all(decoded) or device == "cuda", there.last_error
    difference = np.abs(out.astype(np.int16) - by_the_cpu(TINY, PLANS[1])[0])[decoded]
    worst, mean = MOST[device]
    assert difference.max(initial=0) <= worst, difference.max()
    assert all(one.mean() <= mean for one in difference), [one.mean() for one in difference]


@pytest.mark.parametrize("device", DEVICES)
def test_edges_between_black_and_white_are_cut_off_in_both_directions(device):
    """Bicubic filters overshoot there, which Pillow cuts off after each direction."""
    checks = np.kron(np.random.default_rng(0).integers(0, 2, (30, 40, 1)), np.full((5, 5, 3), 255)).astype(np.uint8)
    images = [encoded(Image.fromarray(checks), quality=95, subsampling=0)]
    found, expected = on(device, images, preprocess((100, 100)))[0], by_the_cpu(images, preprocess((100, 100)))[0]
    assert apart(found, expected) <= (2 if device == "cpu" else 10), apart(found, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_threads_do_not_disturb_each_other(device):
    there = decoder(device)
    images = [*photographs(), *(encoded(picture(90 + at, 70, seed=at)) for at in range(10))]
    sizes = [there.size_of(data) for data in images]
    expected = np.zeros((len(images), 64, 64, 3), np.uint8)
    there.decode(images, sizes, list(expected))

    def decode(shift):
        turned = [(at + shift) % len(images) for at in range(len(images))]
        if device == "cuda":  # work of others, on the stream that all share
            torch.randn(2048, 2048, device=device) @ torch.randn(2048, 2048, device=device)
        out = np.zeros_like(expected)
        decoded, _ = there.decode([images[at] for at in turned], [sizes[at] for at in turned], list(out))
        assert all(decoded), (decoded, there.last_error)
        return apart(out, expected[turned])

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(decode, range(40)))
    assert max(found) <= SAME[device], found


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_that_fails_is_decoded_image_by_image(device, monkeypatch):
    bad = encoded(picture(70, 70))
    images = [*photographs(), bad, encoded(picture(50, 50))]
    calls = []
    real = on_device.decode_jpegs

    def choosy(some, where):
        calls.append(len(some))
        if bad in some:
            raise RuntimeError("Failed to decode batch: 6")
        return real(some, where)

    monkeypatch.setattr(on_device, "decode_jpegs", choosy)
    there = decoder(device)
    out = np.full((4, 64, 64, 3), 7, np.uint8)
    decoded, _ = there.decode(images, [there.size_of(data) for data in images], list(out))
    assert decoded == [True, True, False, True]
    assert calls == [4, 1, 1, 1, 1]
    assert there.last_error == "Failed to decode batch: 6"
    assert (out[2] == 7).all()
    monkeypatch.undo()
    difference = apart(out[[0, 1, 3]], on(device, [*images[:2], images[3]])[0])
    assert difference <= SAME[device], difference


@pytest.mark.parametrize(
    ("says", "calls"),
    [(lambda some: "Failed to initialize nvjpeg", [6, 1, 1]), (lambda some: f"no {len(some[0])} bytes", [6] + [1] * 6)],
)
def test_a_device_that_fails_alike_is_not_asked_for_every_image(monkeypatch, says, calls):
    found = []

    def failing(some, where):
        found.append(len(some))
        raise RuntimeError(says(some))

    monkeypatch.setattr(on_device, "decode_jpegs", failing)
    there = decoder("cpu")
    images = [encoded(picture(50 + at, 60, seed=at)) for at in range(6)]
    out = np.full((6, 64, 64, 3), 7, np.uint8)
    assert there.decode(images, [there.size_of(data) for data in images], list(out))[0] == [False] * 6
    assert found == calls
    assert (out == 7).all()


def test_what_comes_back_all_grey_is_for_the_cpu(monkeypatch):
    real = on_device.decode_jpegs

    def lazy(some, where):
        decoded = real(some, where)
        decoded[1].fill_(on_device.BLANK)
        return decoded

    images = [encoded(picture(90, 70, seed=at)) for at in range(3)]
    monkeypatch.setattr(on_device, "decode_jpegs", lazy)
    there = decoder("cpu")
    out = np.full((3, 64, 64, 3), 7, np.uint8)
    assert there.decode(images, [there.size_of(data) for data in images], list(out))[0] == [True, False, True]
    assert "blank" in there.last_error
    assert (out[1] == 7).all()
    monkeypatch.undo()
    np.testing.assert_array_equal(out[[0, 2]], on("cpu", [images[0], images[2]])[0])


@pytest.mark.parametrize("reason", [None, "asked for"])
def test_a_picture_of_that_grey_is_a_row_as_any_other(tmp_path, reason):
    grey = encoded(Image.new("RGB", (80, 60), (on_device.BLANK,) * 3))
    keys = [f"k{at:02}" for at in range(40)]
    write_tar(tmp_path / "a.tar", [*labelled(keys[:9]), ("grey.jpg", grey), ("grey.cls", b"1"), *labelled(keys[9:])])
    share = shared(reason=reason, threads=0)
    (result,) = run(tmp_path / "a.tar", tmp_path / "out", share)
    assert (result.record.rows, result.record.samples) == (41, 41)
    assert (share.way, share.num_decoded) == ("cuda", 40), share.reason


@pytest.mark.parametrize(("reason", "way", "num_decoded"), [(None, "cpu", 0), ("asked for", "cuda", 40)])
def test_many_pictures_of_that_grey_are_no_faults_of_the_device(tmp_path, reason, way, num_decoded):
    grey = encoded(Image.new("RGB", (80, 60), (on_device.BLANK,) * 3))
    placeholders = [(f"a{at:03}.jpg", grey) for at in range(32 * (MOST_FAULTS + 1))]
    write_tar(tmp_path / "a.tar", [*placeholders, *labelled([f"k{at:02}" for at in range(40)])])
    share = shared(reason=reason, threads=0)
    (result,) = run(tmp_path / "a.tar", tmp_path / "out", share)
    assert result.record.rows == result.record.samples == len(placeholders) + 40
    assert (share.way, share.num_decoded) == (way, num_decoded), share.reason
    assert reason or "all grey" in share.reason


@pytest.mark.cuda
def test_the_decoder_gets_the_memory_that_was_greyed_out(monkeypatch):
    there = decoder("cuda")
    images = [*VARIED, *photographs(1600), *photographs(500)]
    sizes = [there.size_of(data) for data in images]
    out = np.zeros((len(images), 64, 64, 3), np.uint8)
    for _ in range(2 * on_device.AT_ONCE):
        there.decode(images, sizes, list(out))
    shapes = {data: (3, size.height, size.width) for data, size in zip(images, sizes, strict=True)}

    def lazy(some, where):
        return [torch.empty(shapes[data], dtype=torch.uint8, device=where) for data in some]

    monkeypatch.setattr(on_device, "decode_jpegs", lazy)
    for _ in range(on_device.AT_ONCE):
        decoded, _ = there.decode(images, sizes, list(out))
        assert not any(decoded), [size for size, is_decoded in zip(sizes, decoded, strict=True) if is_decoded]


@pytest.mark.parametrize("device", DEVICES)
def test_damage_that_nobody_sees_never_shows_another_image(device):
    noise = np.kron(np.random.default_rng(0).integers(0, 2, (40, 40, 3)), np.full((10, 10, 1), 255)).astype(np.uint8)
    whole = encoded(Image.fromarray(noise), quality=90)
    there = decoder(device)
    cuts = (whole[:cut] + b"\xff\xd9" for cut in range(len(whole) // 2, len(whole)))
    damaged, size = next((data, size) for data in cuts if (size := there.size_of(data)))
    out = np.full((8, 64, 64, 3), 128, np.uint8)
    for _ in range(4):
        for _ in range(on_device.AT_ONCE):  # whichever memory is next, the whole image was there
            there.decode([whole] * 8, [size] * 8, list(out))
        other = out[7, 48:].copy()
        assert other.std() > 60, other.std()
        (is_decoded,), _ = there.decode([damaged], [size], [out[7]])
        rest, difference = out[7, 48:].std(), np.abs(out[7, 48:].astype(np.int16) - other).mean()
        # What follows a cut is an engine's own affair, but not what was there before.
        assert not is_decoded or (rest < 5 if device == "cpu" else difference > 30), (rest, difference)


def test_what_the_cpu_refuses_by_its_size_is_not_for_the_device():
    assert decoder("cpu").size_of(encoded(picture(96, 64))) == (96, 64)
    assert decoder("cpu", max_pixels=96 * 64 - 1).size_of(encoded(picture(96, 64))) is None
    assert decoder("cpu").size_of(encoded(Image.new("RGB", (6000, 6000)))) is None
    sliver = encoded(Image.new("L", (1, 16_000)))  # 224 x 3,584,000 pixels, once resized
    assert decoder("cpu", preprocess((224, 224))).size_of(sliver) is None


def test_a_call_has_so_many_pixels_and_no_more(monkeypatch):
    calls = []
    real = on_device.decode_jpegs
    monkeypatch.setattr(on_device, "decode_jpegs", lambda some, where: calls.append(len(some)) or real(some, where))
    monkeypatch.setattr(on_device, "BATCH_PIXELS", 5 * 96 * 64)
    on("cpu", [encoded(picture(96, 64))] * 12)
    assert calls == [5, 5, 2]


def test_images_of_one_size_are_resized_together_as_alone(monkeypatch):
    groups = []
    real = on_device.resize_on_device
    shapes = [
        (96, 64),
        (80, 64),
        (96, 64),
        (96, 64),
        (64, 80),
        (96, 64),
        (80, 64),
        (96, 64),
        (96, 64),
        (96, 64),
        (300, 200),
    ]
    images = [encoded(picture(*shape, seed=at)) for at, shape in enumerate(shapes)]
    alone = np.concatenate([on("cpu", [data])[0] for data in images])
    monkeypatch.setattr(
        on_device, "resize_on_device", lambda some, plan: groups.append((len(some), *some[0].shape)) or real(some, plan)
    )
    monkeypatch.setattr(on_device, "GROUP_PIXELS", 3 * 96 * 64)
    np.testing.assert_array_equal(on("cpu", images)[0], alone)
    assert groups == [(1, 3, 80, 64), (2, 3, 64, 80), (3, 3, 64, 96), (3, 3, 64, 96), (1, 3, 64, 96), (1, 3, 200, 300)]


def mixed(number):
    """Members of all kinds of images, and of none."""
    kinds = itertools.cycle([
        {}, {"subsampling": 0}, {"progressive": True}, {"restart_marker_blocks": 2}, "L", "CMYK", "PNG", b"<html>",
        "cut", {"quality": 50}, "long", {}, "end",
    ])  # fmt: skip
    for at, kind in zip(range(number), kinds, strict=False):
        image = picture(90 + at % 7, 70, seed=at)
        data = encoded(image)
        if isinstance(kind, dict):
            data = encoded(image, **kind)
        elif kind in ("L", "CMYK"):
            data = encoded(image.convert(kind))
        elif kind == "PNG":
            data = encoded(image, "PNG")
        elif kind == "cut":
            data = data[: len(data) // 2]
        elif kind == "end":
            data = data[: len(data) // 2] + b"\xff\xd9"
        elif kind == "long":
            data += bytes(20)
        else:
            data = kind
        yield f"{at:04}.jpg", data
        yield f"{at:04}.cls", b"1"


def run(corpus, out, share=None, **options):
    encoder = PixelEncoder()
    dataset = open_dataset(out, encoder.info, "float32", "test")
    options = {"batch_size": 50, "decode_threads": 2, **options}
    return list(embed_shards(list_shards([str(corpus)]), [encoder], out, dataset, share=share, **options))


def shared(device="cpu", reason="asked for", threads=2, kind=DeviceDecoder, fast=False):
    return DeviceShare(decoder(device, PixelEncoder().info.preprocess, kind=kind), reason, threads, fast=fast)


def content(folder):
    rows = [
        (*row, tuple(size))
        for batch in read_embeddings(folder, ("key", "label", "width", "height"))
        for row, size in zip(
            zip(batch.columns["key"].to_pylist(), batch.columns["label"].to_pylist(), strict=True),
            zip(batch.columns["width"].to_pylist(), batch.columns["height"].to_pylist(), strict=True),
            strict=True,
        )
    ]
    vectors = np.concatenate([batch.embedding for batch in read_embeddings(folder)])
    rejects = [row for name in sorted(published_shards(folder)) for row in read_rejects(folder, name).to_pylist()]
    return rows, rejects, vectors


@pytest.fixture
def corpus(tmp_path):
    write_tar(tmp_path / "corpus" / "0.tar", mixed(140))
    write_tar(tmp_path / "corpus" / "1.tar", mixed(9))
    return tmp_path / "corpus"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch_size", [3, 50])
def test_rows_and_rejects_are_those_of_the_cpu(tmp_path, corpus, device, batch_size):
    run(corpus, tmp_path / "cpu")
    share = shared(device)
    seen = []
    results = run(corpus, tmp_path / "there", share, batch_size=batch_size, on_progress=seen.append)
    rows, rejects, vectors = content(tmp_path / "cpu")
    found_rows, found_rejects, found_vectors = content(tmp_path / "there")
    assert (found_rows, found_rejects) == (rows, rejects)
    assert rejects
    # Where the second half is lost but not the end, nobody looks, and decoders differ in what they make of it.
    whole = [int(row[0]) % 13 != 12 for row in rows]
    cosines = (vectors * found_vectors).sum(axis=1)[whole]
    assert cosines.min() > 0.999, cosines.min()
    ordinary = sum(at % 13 in (0, 1, 3, 4, 9, 11) for at in [*range(140), *range(9)])
    said = share.num_decoded, share.way, share.reason, [result.record.decoder for result in results]
    if device == "cpu":
        assert share.num_decoded in (ordinary, ordinary + 10), said
        assert said[1:] == ("cuda", "asked for", ["cuda", "cuda"]), said
    else:  # what it makes of a lost half may cost it the chunk, and three of those the rest
        assert 0 < share.num_decoded <= ordinary + 10 and "cuda" in said[3], said
        assert share.way == "cuda" or "given up after" in share.reason, said
    assert 0 < seen[-1].stages.busy["device decode"] <= 1


def test_without_a_device_nothing_is_said_of_one(tmp_path, corpus):
    seen = []
    results = run(corpus, tmp_path / "out", on_progress=seen.append)
    assert {result.record.decoder for result in results} == {"exact"}
    assert "device decode" not in seen[-1].stages.busy


class Wrong(DeviceDecoder):
    """Gives each image the pixels of the next, as a decoder might that says nothing of what it skipped."""

    def decode(self, images, sizes, out):
        found = super().decode(images, sizes, out)
        pixels = np.roll(np.array(out), 1, axis=0)
        for one, other in zip(out, pixels, strict=True):
            one[:] = other
        return found


class Brighter(DeviceDecoder):
    """A little too bright: not what is promised, and good enough where it is asked for."""

    def decode(self, images, sizes, out):
        found = super().decode(images, sizes, out)
        for one in out:
            one += (one < 250) * np.uint8(3)
        return found


class Coarser(DeviceDecoder):
    """As one that repeats chroma samples: far off at a few pixels, and under 1/255 on average."""

    def decode(self, images, sizes, out):
        found = super().decode(images, sizes, out)
        for one in out:
            one[::5, ::5] ^= 8
        return found


class Refusing(DeviceDecoder):
    """Decodes nothing."""

    def decode(self, images, sizes, out):
        return [False] * len(images), 0.0


class Slow(DeviceDecoder):
    def decode(self, images, sizes, out):
        time.sleep(0.05)
        return super().decode(images, sizes, out)


@pytest.mark.parametrize("kind", [Wrong, Refusing])
def test_a_device_that_gives_something_else_is_noticed_and_given_up(tmp_path, kind):
    corpus = write_tar(tmp_path / "a.tar", labelled([f"k{at:03}" for at in range(300)]))
    run(corpus, tmp_path / "cpu")
    share = shared(kind=kind)
    run(corpus, tmp_path / "there", share, batch_size=100)
    found, expected = content(tmp_path / "there"), content(tmp_path / "cpu")
    assert found[:2] == expected[:2]
    np.testing.assert_array_equal(found[2], expected[2])
    assert (share.way, share.num_decoded) == ("cpu", 0)
    assert f"given up after {MOST_FAULTS} faults" in share.reason


def test_what_is_asked_for_may_be_a_little_off(tmp_path):
    corpus = write_tar(tmp_path / "a.tar", labelled([f"k{at:03}" for at in range(50)]))
    share = shared(kind=Brighter)
    run(corpus, tmp_path / "out", share)
    assert (share.way, share.num_decoded) == ("cuda", 50)


@pytest.mark.parametrize(
    ("kind", "threads", "way", "said"),
    [
        (DeviceDecoder, 0, "cuda", "images/s on cpu, 0 on 0 CPU threads, measured on the first"),
        (Slow, 1000, "cpu", "on 1000 CPU threads, measured on the first"),
        (Brighter, 0, "cpu", r"pixels are up to [3-5]/255 from the CPU's.*--decode cuda takes them"),
        (Wrong, 0, "cpu", "pixels are up to"),
        (Refusing, 0, "cpu", r"could not decode (\d+) of \1 ordinary JPEGs"),
    ],
)
def test_auto_takes_the_device_if_it_is_right_and_faster(tmp_path, kind, threads, way, said):
    corpus = write_tar(tmp_path / "a.tar", labelled([f"k{at:03}" for at in range(120)]))
    run(corpus, tmp_path / "cpu")
    share = shared(reason=None, threads=threads, kind=kind)
    (result,) = run(corpus, tmp_path / "there", share)
    found, expected = content(tmp_path / "there"), content(tmp_path / "cpu")
    assert found[:2] == expected[:2]
    assert np.abs(found[2] - expected[2]).max() < 0.01
    assert share.way == way
    assert re.search(said, share.reason), share.reason
    assert share.num_decoded == (120 if way == "cuda" else 0)
    assert result.record.decoder == ("cuda" if way == "cuda" else "exact")


@pytest.mark.parametrize(
    ("kind", "fast", "way"),
    [(Coarser, True, "cuda"), (Coarser, False, "cpu"), (Brighter, True, "cpu"), (DeviceDecoder, True, "cuda")],
)
def test_where_decoding_is_to_be_fast_auto_asks_for_an_average(tmp_path, kind, fast, way):
    corpus = write_tar(tmp_path / "a.tar", labelled([f"k{at:03}" for at in range(60)]))
    share = shared(reason=None, threads=0, kind=kind, fast=fast)
    (result,) = run(corpus, tmp_path / "out", share, fast_decode=fast)
    assert share.way == way, share.reason
    assert result.record.decoder == ("cuda" if way == "cuda" else "fast" if fast else "exact")
    assert result.record.rows == 60


def test_auto_that_meets_too_few_images_stays_on_the_cpu(tmp_path):
    share = shared(reason=None, threads=0)
    run(write_tar(tmp_path / "a.tar", labelled(["a", "b"])), tmp_path / "out", share)
    assert (share.way, share.num_decoded) == ("cpu", 0)
    assert "too few" in share.reason


def test_what_the_device_had_when_the_process_died_is_suspect_and_not_for_it_again(tmp_path):
    keys = [f"k{at:03}" for at in range(20)]
    corpus = write_tar(tmp_path / "a.tar", labelled(keys))
    code = (
        "import pathlib; from test_device_decode import *\n"
        "class Deadly(DeviceDecoder):\n"
        "    def decode(self, images, sizes, out): os._exit(77)\n"
        f"run({str(corpus)!r}, pathlib.Path({str(tmp_path / 'out')!r}), shared(kind=Deadly))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 77
    in_hand = InHand(tmp_path / "out", 1, 2, 32)
    (shard,) = list_shards([str(corpus)])
    names = [*((shard.name, key) for key in keys), (shard.name, "new")]
    images = [encoded(picture(60 + at, 50, seed=at)) for at in range(21)]
    out = np.zeros((21, 32, 32, 3), np.uint8)
    with in_hand.decoding() as hold:
        sizes, _ = shared().decode(images, lambda mine: hold([names[at] for at in mine]), out)
    assert sizes == [None] * 20 + [(80, 50)]
    assert out[20].any() and not out[:20].any()
    in_hand.close(finished=True)


def test_where_there_is_no_device_it_is_said(tmp_path):
    corpus = str(write_tar(tmp_path / "a.tar", labelled(["a", "b"])))
    summary = embed(corpus, tmp_path / "out", model="demo", device="cpu")
    assert (summary.decode, summary.decode_reason, summary.decoded_on_device) == ("cpu", "no CUDA device", 0)
    with pytest.raises(UsageError, match="no CUDA device"):
        embed(corpus, tmp_path / "there", model="demo", device="cpu", decode="cuda")
    assert embed(corpus, tmp_path / "out", model="demo", device="cpu").decode_reason == "nothing to decode"
    with pytest.raises(UsageError, match="decode 'gpu'"):
        embed(corpus, tmp_path / "there", model="demo", device="cpu", decode="gpu")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("devices", "plan", "why"),
    [
        (["cpu"], preprocess(), "no CUDA device"),
        (["cuda:0", "cuda:1"], preprocess(), "one decoder for all devices"),
        (["cuda:0"], preprocess(mode="longest"), "more than a resize and a crop"),
        (["cuda:0"], preprocess((48, 80)), "more than a resize and a crop"),
    ],
)
def test_what_stands_in_the_way(devices, plan, why):
    options = {"fast": False, "decode_threads": 2}
    found = [torch.device(name) for name in devices]
    share = share_decoding("auto", found, plan, **options)
    assert (share.way, share.chunk) == ("cpu", None)
    assert why in share.reason
    assert share_decoding("cpu", found, plan, **options).reason == "asked for"
    with pytest.raises(UsageError, match=why):
        share_decoding("cuda", found, plan, **options)


@pytest.mark.cuda
def test_embed_on_cuda_gives_the_rows_of_the_cpu(tmp_path, corpus):
    options = {"model": "demo", "precision": "fp32", "dtype": "float32", "batch_size": 64, "device": "cuda:0"}
    there = embed(str(corpus), tmp_path / "cuda", decode="cuda", **options)
    here = embed(str(corpus), tmp_path / "cpu", decode="cpu", **options)
    either = embed(str(corpus), tmp_path / "auto", decode="auto", **options)
    # What it makes of images that lack a half may cost it their chunks, and 'auto' may say anything it measured.
    assert there.decoded_on_device > 0, there
    assert there.decode == "cuda" or "given up after" in there.decode_reason, there
    assert (here.decode, here.decoded_on_device) == ("cpu", 0), here
    assert re.search(r"images/s|/255|could (not|be) decode|the CPU says", either.decode_reason), either
    rows, rejects, vectors = content(tmp_path / "cpu")
    whole = [int(row[0]) % 13 != 12 for row in rows]
    for out in ("cuda", "auto"):
        found_rows, found_rejects, found_vectors = content(tmp_path / out)
        assert (found_rows, found_rejects) == (rows, rejects)
        cosines = (vectors * found_vectors).sum(axis=1)[whole]
        assert cosines.min() > 0.99, (out, cosines.min())


@pytest.mark.cuda
def test_memory_on_the_device_does_not_grow_with_the_calls():
    there = decoder("cuda", preprocess((224, 224)))
    images = photographs() * 16
    sizes = [there.size_of(data) for data in images]
    out = np.zeros((len(images), 224, 224, 3), np.uint8)
    free = []
    for _ in range(30):
        assert all(there.decode(images, sizes, list(out))[0]), there.last_error
        on_device.decode_jpegs(images[:1], torch.device("cuda"))  # the same device by its other name
        free.append(torch.cuda.mem_get_info()[0])
    assert free[5] - free[-1] < 64 << 20, free
