import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from clipindex.bench.corpus import PHOTOGRAPHS, write_corpus
from clipindex.errors import UsageError
from clipindex.shards import list_shards, read_samples
from clipindex.types import Sample

SMALL = (120, 90)


def samples(folder):
    return [sample for shard in list_shards(str(folder)) for sample in read_samples(shard)]


def opened(found):
    return [Image.open(io.BytesIO(sample.image)) for sample in found]


def contents(paths):
    return [Path(path).read_bytes() for path in paths]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Enough small ones to see shares in."""
    folder = tmp_path_factory.mktemp("many")
    write_corpus(folder, 400, size=SMALL, shard_images=150)
    return folder


@pytest.fixture(scope="module")
def natural(tmp_path_factory):
    folder = tmp_path_factory.mktemp("natural")
    write_corpus(folder, 48, seed=1)
    return samples(folder)


def test_tars_are_named_filled_and_returned_in_order(many, tmp_path):
    said = []
    paths = write_corpus(tmp_path / "new", 7, size=SMALL, shard_images=3, on_images=said.append)
    assert paths == [str(tmp_path / "new" / f"{number}.tar") for number in range(3)]
    assert said == [1, 2, 3, 4, 5, 6, 7]
    assert [len(list(read_samples(shard))) for shard in list_shards(paths)] == [3, 3, 1]
    assert [len(list(read_samples(shard))) for shard in list_shards(str(many))] == [150, 150, 100]


def test_every_sample_is_whole(many):
    found = samples(many)
    assert len(found) == 400 and all(isinstance(sample, Sample) for sample in found)
    assert len({sample.key for sample in found}) == 400
    assert all(sample.label in range(1000) for sample in found) and len({sample.label for sample in found}) > 250
    for sample, image in zip(found, opened(found), strict=True):
        meta = json.loads(sample.meta)
        assert (meta["width"], meta["height"]) == image.size
        assert meta["caption"].startswith("a photograph of ")


def test_the_image_comes_first_and_nothing_tells_when_it_was_written(many):
    with tarfile.open(many / "0.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:3]] == ["000000000.jpg", "000000000.cls", "000000000.json"]
    assert {(member.mtime, member.uid, member.gid, member.uname, member.mode) for member in members} == {
        (0, 0, 0, "", 0o644)
    }


def test_equal_arguments_give_equal_bytes(tmp_path):
    first, second = (write_corpus(tmp_path / name, 12, size=SMALL, shard_images=5) for name in "ab")
    assert contents(first) == contents(second)


def test_more_images_extend_a_corpus_whatever_the_tars(many, tmp_path):
    write_corpus(tmp_path / "few", 20, size=SMALL, shard_images=8)
    few = [sample._replace(tar_offset=None) for sample in samples(tmp_path / "few")]
    assert few == [sample._replace(tar_offset=None) for sample in samples(many)[:20]]


@pytest.mark.parametrize("other", [{"seed": 1}, {"size": (121, 90)}])
def test_another_seed_or_size_gives_other_images(many, tmp_path, other):
    write_corpus(tmp_path, 5, **{"size": SMALL, **other})
    assert not {sample.image for sample in samples(tmp_path)} & {sample.image for sample in samples(many)}


def test_sizes_and_forms_are_those_of_a_mixed_corpus(many):
    images = opened(samples(many))
    assert {image.format for image in images} == {"JPEG"}
    sizes = np.array([image.size for image in images])
    long, short = sizes.max(axis=1), sizes.min(axis=1)
    assert long.max() == 120 and short.min() >= 0.3 * 90
    usual = (long == 120) & (short >= 80) & (short <= 96)
    assert 0.7 < usual.mean() < 0.95
    assert 0.15 < (sizes[:, 0] < sizes[:, 1]).mean() < 0.4
    assert len({image.size for image in images}) > 50
    sampling = [JpegImagePlugin.get_sampling(image) for image in images if image.mode == "RGB"]
    assert set(sampling) == {0, 2}  # 4:4:4 and 4:2:0
    assert 0.7 < np.mean(np.array(sampling) == 2) < 0.9
    assert 0 < np.mean([image.mode == "L" for image in images]) < 0.06
    assert 0 < np.mean(["progression" in image.info for image in images]) < 0.1
    # Entry 63 of the luminance table in zigzag order is 99 at quality 50, and falls by two in a hundred a point.
    assert {image.quantization[0][63] for image in images} == {round(99 * (2 - q / 50)) for q in range(85, 96)}


def test_images_have_the_bytes_a_pixel_of_the_photographs_they_are_made_of(natural):
    photographs = [image for image in opened(samples(PHOTOGRAPHS)) if image.mode == "RGB"]
    assert len(photographs) == 7

    def bytes_a_pixel(images):
        files = [io.BytesIO() for _ in images]
        for image, file in zip(images, files, strict=True):
            image.convert("RGB").save(file, "JPEG", quality=90)
        return np.mean([len(file.getvalue()) / np.prod(image.size) for file, image in zip(files, images, strict=True)])

    assert bytes_a_pixel(opened(natural)) == pytest.approx(bytes_a_pixel(photographs), rel=0.15)
    assert 40_000 < np.mean([len(sample.image) for sample in natural]) < 60_000


def test_images_of_camera_size_have_the_bytes_of_camera_files(tmp_path):
    write_corpus(tmp_path, 6, size=(1600, 1200))
    found = samples(tmp_path)
    assert max(max(image.size) for image in opened(found)) == 1600
    assert 250_000 < np.mean([len(sample.image) for sample in found]) < 550_000


def test_images_differ(natural, many):
    assert len({sample.image for sample in samples(many)}) == 400
    grey = [image.convert("L") for image in opened(natural)]
    assert np.mean([np.std(image) for image in grey]) > 40
    pixels = np.array([np.asarray(image.resize((48, 48)), float).ravel() for image in grey])
    correlation = np.abs(np.corrcoef(pixels)[np.triu_indices(len(pixels), 1)])
    assert correlation.mean() < 0.25
    assert (correlation > 0.9).mean() < 0.01


def test_a_corpus_that_is_there_is_used_again(tmp_path):
    paths = write_corpus(tmp_path, 6, size=SMALL, shard_images=3)
    before = [(path, (tmp_path / path).stat().st_mtime_ns) for path in [*paths, "corpus.json"]]
    assert json.loads((tmp_path / "corpus.json").read_bytes())["complete"] is True
    said = []
    assert write_corpus(tmp_path, 6, size=SMALL, shard_images=3, on_images=said.append) == paths
    assert [(path, (tmp_path / path).stat().st_mtime_ns) for path, _ in before] == before
    assert said == []


def test_what_was_stopped_goes_on(tmp_path):
    whole = write_corpus(tmp_path / "whole", 8, size=SMALL, shard_images=3)

    def stop(number):
        if number == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_corpus(tmp_path / "cut", 8, size=SMALL, shard_images=3, on_images=stop)
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {"0.tar", "corpus.json"}
    assert json.loads((tmp_path / "cut" / "corpus.json").read_bytes())["complete"] is False
    first = (tmp_path / "cut" / "0.tar").stat().st_mtime_ns
    said = []
    cut = write_corpus(tmp_path / "cut", 8, size=SMALL, shard_images=3, on_images=said.append)
    assert contents(cut) == contents(whole)
    assert (tmp_path / "cut" / "0.tar").stat().st_mtime_ns == first
    assert said == [3, 4, 5, 6, 7, 8]


def test_a_tar_that_was_removed_is_written_again(tmp_path):
    paths = write_corpus(tmp_path, 6, size=SMALL, shard_images=3)
    before = contents(paths)
    (tmp_path / "1.tar").unlink()
    assert contents(write_corpus(tmp_path, 6, size=SMALL, shard_images=3)) == before


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"num_images": 7}, "images 6 and not 7"),
        ({"seed": 1}, "seed 0 and not 1"),
        ({"size": (120, 91)}, r"size \[120, 90\] and not \[120, 91\]"),
        ({"shard_images": 4}, "shard_images 3 and not 4"),
    ],
)
def test_another_corpus_is_refused_and_left_alone(tmp_path, other, said):
    arguments = {"num_images": 6, "size": SMALL, "shard_images": 3}
    paths = write_corpus(tmp_path, **arguments)
    before = contents(paths)
    with pytest.raises(UsageError, match=f"holds another corpus.*{said}.*give another folder"):
        write_corpus(tmp_path, **{**arguments, **other})
    assert contents(paths) == before


@pytest.mark.parametrize(("name", "text"), [("0.tar", ""), ("corpus.json", "[]"), ("corpus.json", "{")])
def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match="give an(other| empty or new) folder"):
        write_corpus(tmp_path, 2, size=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == text


@pytest.mark.parametrize("wrong", [{"num_images": 0}, {"shard_images": 0}, {"size": (120, 8)}])
def test_numbers_too_small_are_refused(tmp_path, wrong):
    with pytest.raises(UsageError, match="at least"):
        write_corpus(tmp_path / "new", **{"num_images": 2, "size": SMALL, **wrong})
    assert not (tmp_path / "new").exists()
