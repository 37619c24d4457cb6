import gc
import os
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import PixelEncoder
from corpus import encoded, labelled, picture, write_tar

from clipindex.decode import decode_image
from clipindex.pipeline import Progress, embed_shards
from clipindex.pipeline import run as pipeline_run
from clipindex.shards import list_shards, read_samples
from clipindex.store import open_dataset, published_shards, read_embeddings, read_rejects
from clipindex.types import Encoding, Sample


def run(corpus, out, encoder=None, **options):
    encoder = encoder or PixelEncoder()
    dataset = open_dataset(out, PixelEncoder().info, "float32", "test")
    encoders = encoder if isinstance(encoder, list) else [encoder]
    options = {"batch_size": 7, "decode_threads": 2, **options}
    return list(embed_shards(list_shards([str(corpus)]), encoders, out, dataset, **options))


def dirty(number, prefix):
    """Members with, here and there, something that is no image."""
    for at, (name, data) in enumerate(labelled([f"{prefix}{at:03}" for at in range(number)])):
        bad = name.endswith("jpg") and at % 15 == 0
        yield name, b"<html>" if bad else data


@pytest.fixture
def corpus(tmp_path):
    for at, number in enumerate([25, 1, 13, 0]):
        write_tar(tmp_path / "corpus" / f"{at}.tar", dirty(number, f"s{at}_"))
    return tmp_path / "corpus"


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("decode_threads", [1, 4])
def test_each_row_is_its_images_whatever_the_batches(tmp_path, corpus, batch_size, decode_threads):
    encoder = PixelEncoder()
    results = run(corpus, tmp_path / "out", encoder, batch_size=batch_size, decode_threads=decode_threads)
    assert [result.record.samples for result in results] == [25, 1, 13, 0]
    rows = {}
    for batch in read_embeddings(tmp_path / "out", ("key", "label")):
        for at, key in enumerate(batch.columns["key"].to_pylist()):
            rows[key] = (batch.embedding[at], batch.columns["label"][at].as_py())
    for shard in list_shards([str(corpus)]):
        for sample in read_samples(shard):
            if sample.image == b"<html>":
                assert sample.key not in rows
                continue
            pixels = np.zeros((1, 32, 32, 3), np.uint8)
            decode_image(sample.image, encoder.info.preprocess, pixels[0])
            np.testing.assert_allclose(rows[sample.key][0], encoder.encode(pixels)[0][0], atol=1e-6)
            assert rows[sample.key][1] == sample.label


def test_rows_and_rejects_add_up_and_keep_tar_order(tmp_path, corpus):
    for result in run(corpus, tmp_path / "out"):
        record = result.record
        assert record.rows + record.rejects == record.samples
        assert sum(result.reject_stages.values()) == record.rejects
        keys = [item.key for item in read_samples(result.shard)]
        rejected = read_rejects(tmp_path / "out", record.name)["key"].to_pylist()
        rows = [
            key
            for batch in read_embeddings(tmp_path / "out", ("key",), [record.name])
            for key in batch.columns["key"].to_pylist()
        ]
        assert rows == [key for key in keys if key not in rejected]
        assert rejected == [key for key in keys if key not in rows]


def test_offsets_lead_to_the_images_bytes(tmp_path, corpus):
    run(corpus, tmp_path / "out")
    for batch in read_embeddings(tmp_path / "out", ("key", "tar_offset", "tar_size")):
        tar = Path(batch.shard.url).read_bytes()
        images = {item.key: item.image for item in read_samples(list_shards([batch.shard.url])[0])}
        places = zip(*(batch.columns[c].to_pylist() for c in ("key", "tar_offset", "tar_size")), strict=True)
        for key, offset, size in places:
            assert tar[offset : offset + size] == images[key]


def test_a_broken_shard_is_left_out_and_the_others_go_on(tmp_path, corpus):
    broken = corpus / "0.tar"
    broken.write_bytes(broken.read_bytes()[:9000])
    results = run(corpus, tmp_path / "out")
    assert [result.error is None for result in results] == [False, True, True, True]
    assert "0.tar" in results[0].error
    assert "truncated" in results[0].error
    assert len(published_shards(tmp_path / "out")) == 3
    assert not [path for path in (tmp_path / "out").rglob("*.tmp")]


def test_embeddings_that_are_no_numbers_are_rejects(tmp_path):
    class Faulty(PixelEncoder):
        def encode(self, images):
            vectors = super().encode(images)
            vectors.norms[0] = np.nan
            return vectors

    corpus = write_tar(tmp_path / "a.tar", labelled(["a", "b"]))
    (result,) = run(corpus, tmp_path / "out", Faulty())
    assert (result.record.rows, result.reject_stages) == (1, Counter(encode=1))


def test_a_tar_that_changes_while_it_is_read_is_not_published(tmp_path):
    corpus = write_tar(tmp_path / "a.tar", labelled([f"k{at}" for at in range(30)]))

    class Meddler(PixelEncoder):
        def encode(self, images):
            os.utime(corpus)
            return super().encode(images)

    (result,) = run(corpus, tmp_path / "out", Meddler(), batch_size=2)
    assert "changed while it was read" in result.error
    assert published_shards(tmp_path / "out") == {}


def test_memory_is_bounded_by_the_batches_not_the_shard(tmp_path):
    """However slow the device is, the reader stays a fixed number of samples ahead of it."""
    corpus = write_tar(tmp_path / "a.tar", labelled([f"k{at}" for at in range(200)]))
    seen = []

    class Slow(PixelEncoder):
        def encode(self, images):
            time.sleep(0.02)
            if len(seen) < 10:
                seen.append(sum(type(thing) is Sample for thing in gc.get_objects()))
            return super().encode(images)

    run(corpus, tmp_path / "out", Slow(), batch_size=5)
    assert max(seen) <= 5 * 8


def test_leaving_early_publishes_nothing_half_and_stops_the_threads(tmp_path):
    corpus = tmp_path / "corpus"
    for at in range(3):
        write_tar(corpus / f"{at}.tar", labelled([f"k{at}_{i}" for i in range(20)]))
    encoder = PixelEncoder()
    dataset = open_dataset(tmp_path / "out", encoder.info, "float16", "test")
    before = threading.active_count()
    results = embed_shards(list_shards([str(corpus)]), [encoder], tmp_path / "out", dataset, batch_size=4)
    assert next(results).error is None
    results.close()
    assert threading.active_count() == before
    assert len(published_shards(tmp_path / "out")) == 1
    assert not [path for path in (tmp_path / "out").rglob("*.tmp")]


def test_an_error_of_the_encoder_reaches_the_caller(tmp_path):
    class Broken(PixelEncoder):
        def encode(self, images):
            raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        run(write_tar(tmp_path / "a.tar", labelled(["a"])), tmp_path / "out", Broken())


def test_progress_counts_up_to_the_whole(tmp_path, corpus):
    seen: list[Progress] = []
    run(corpus, tmp_path / "out", on_progress=seen.append)
    counts = [progress.counts for progress in seen]
    assert [c.rows + c.rejects for c in counts] == sorted(c.rows + c.rejects for c in counts)
    assert (counts[-1].rows + counts[-1].rejects, counts[-1].shards) == (39, 4)
    assert counts[-1].bytes == sum(shard.size for shard in list_shards([str(corpus)]))


class Deferred(PixelEncoder):
    """Looks at the pixels when it is waited for, and at no time before: the last moment at which a device may."""

    def __init__(self, device):
        super().__init__()
        self.device = device
        self.begun, self.ahead = 0, []

    def begin(self, images):
        self.begun += 1
        number = self.begun

        def finish():
            self.ahead.append(self.begun - number)
            return Encoding(self.encode(images), 0.0)

        return finish


@pytest.mark.parametrize(("device", "ahead"), [("cuda:0", 1), ("cpu", 0)])
def test_a_device_of_its_own_has_its_next_batch_before_the_last_one_is_waited_for(tmp_path, corpus, device, ahead):
    encoder = Deferred(device)
    run(corpus, tmp_path / "deferred", encoder, batch_size=2)
    assert encoder.begun > 10
    assert encoder.ahead == [ahead] * (encoder.begun - 1) + [0]
    run(corpus, tmp_path / "at-once", batch_size=2)
    for later, sooner in zip(
        read_embeddings(tmp_path / "deferred"), read_embeddings(tmp_path / "at-once"), strict=True
    ):
        np.testing.assert_array_equal(later.embedding, sooner.embedding)


@pytest.mark.parametrize(("device", "sizes"), [("cuda:0", {16, 8}), ("cpu", {16, 39 % 16})])
def test_a_device_of_its_own_gets_batches_of_few_shapes(tmp_path, device, sizes):
    class Shapes(PixelEncoder):
        seen: list[int] = []

        def encode(self, images):
            self.seen.append(len(images))
            return super().encode(images)

    corpus = write_tar(tmp_path / "a.tar", labelled([f"k{at}" for at in range(39)]))
    encoder = Shapes()
    encoder.device = device
    (result,) = run(corpus, tmp_path / "out", encoder, batch_size=16)
    assert set(encoder.seen) == sizes
    assert result.record.rows == 39
    run(corpus, tmp_path / "one", batch_size=1)
    for full, single in zip(read_embeddings(tmp_path / "out"), read_embeddings(tmp_path / "one"), strict=True):
        np.testing.assert_array_equal(full.embedding, single.embedding)


class SlowEncoder(PixelEncoder):
    """Takes the time of a real tower, on a device of its own."""

    def __init__(self, device, seconds):
        super().__init__()
        self.device = device
        self.seconds = seconds

    def encode(self, images):
        time.sleep(self.seconds)
        return super().encode(images)


def test_several_devices_share_the_shards_and_the_faster_one_takes_more(tmp_path):
    corpus = tmp_path / "corpus"
    for at in range(12):
        write_tar(corpus / f"{at}.tar", dirty(20, f"s{at}_"))
    seen: list[Progress] = []
    devices = [SlowEncoder("fast", 0.005), SlowEncoder("slow", 0.08)]
    results = run(corpus, tmp_path / "out", devices, batch_size=10, decode_threads=2, on_progress=seen.append)
    assert sum(result.record.samples for result in results) == 240
    assert {result.shard.url for result in results} == {shard.url for shard in list_shards([str(corpus)])}
    shards = Counter(record.device for record in published_shards(tmp_path / "out").values())
    assert shards["fast"] > shards["slow"] > 0
    assert seen[-1].counts.shards == 12
    assert seen[-1].counts.rows + seen[-1].counts.rejects == 240

    alone = run(corpus, tmp_path / "alone")
    assert {r.record.name: r.record.rows for r in alone} == {r.record.name: r.record.rows for r in results}
    for together, single in zip(read_embeddings(tmp_path / "out"), read_embeddings(tmp_path / "alone"), strict=True):
        np.testing.assert_array_equal(together.embedding, single.embedding)


def test_a_device_that_fails_ends_the_run_and_leaves_nothing_half(tmp_path):
    class Broken(SlowEncoder):
        def encode(self, images):
            super().encode(images)
            raise RuntimeError("device lost")

    corpus = tmp_path / "corpus"
    for at in range(6):
        write_tar(corpus / f"{at}.tar", labelled([f"k{at}_{i}" for i in range(20)]))
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="device lost"):
        run(corpus, tmp_path / "out", [SlowEncoder("good", 0.01), Broken("bad", 0.05)])
    assert threading.active_count() == before
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert all(record.samples == 20 for record in published_shards(tmp_path / "out").values())


@pytest.mark.parametrize(("device", "together"), [("cpu", False), ("cuda:0", True)])
def test_on_a_cpu_decoding_and_encoding_take_turns_at_the_cores(tmp_path, monkeypatch, device, together):
    """The name of the device is what decides; neither of the two is there."""
    encoding = threading.Event()
    begun_meanwhile = []

    def spy(*arguments, **options):
        begun_meanwhile.append(encoding.is_set())
        return decode_image(*arguments, **options)

    class Watched(SlowEncoder):
        def encode(self, images):
            encoding.set()
            found = super().encode(images)
            encoding.clear()
            return found

    monkeypatch.setattr(pipeline_run, "decode_image", spy)
    corpus = write_tar(tmp_path / "a.tar", labelled([f"k{at}" for at in range(120)]))
    run(corpus, tmp_path / "out", Watched(device, 0.02), batch_size=20)
    assert len(begun_meanwhile) == 120
    # A thread that had its turn may be about to begin; each can be so once a batch.
    assert (sum(begun_meanwhile) > 2 * 6) is together


def test_the_stage_that_binds_is_named(tmp_path):
    corpus = write_tar(tmp_path / "a.tar", labelled([f"k{at}" for at in range(60)]))
    seen: list[Progress] = []
    run(corpus, tmp_path / "slow", SlowEncoder("cpu", 0.05), on_progress=seen.append)
    stages = seen[-1].stages
    assert stages.bound_by == "encode"
    assert stages.busy["encode"] > 0.5
    assert 0 < stages.busy["decode"] < stages.busy["encode"]
    big = [(name, encoded(picture(1500, 1500)) if name.endswith("jpg") else data) for name, data in
           labelled([f"k{at}" for at in range(40)])]  # fmt: skip
    run(write_tar(tmp_path / "b.tar", big), tmp_path / "fast", decode_threads=1, on_progress=seen.append)
    assert seen[-1].stages.bound_by == "decode"
    assert seen[-1].stages.device_waited_s > 0


def test_many_formats_in_one_shard(tmp_path):
    forms = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF"}
    members = [(f"k{at}.{ext}", encoded(picture(), form)) for at, (ext, form) in enumerate(forms.items())]
    (result,) = run(write_tar(tmp_path / "a.tar", members), tmp_path / "out")
    assert result.record.rows == len(forms)
    (batch,) = read_embeddings(tmp_path / "out", ("width", "height"))
    assert set(batch.columns["width"].to_pylist()) == {96}
    assert (batch.embedding @ batch.embedding[1] > 0.999).all()
