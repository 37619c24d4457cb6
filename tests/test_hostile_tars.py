"""Tars as they are found: every sample of them is a row or a reject, or the shard says where it breaks."""

import gzip
import io
import os
import tarfile

import numpy as np
import pytest
from conftest import PixelEncoder
from corpus import encoded, labelled, write_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipindex.errors import ShardError
from clipindex.pipeline import embed_shards
from clipindex.shards import MAX_NAME_CHARACTERS, MAX_SAMPLE_MEMBERS, list_shards, read_samples
from clipindex.store import open_dataset, published_shards, read_embeddings, read_rejects
from clipindex.types import Reject, Sample

JPEG = encoded()
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(
    lambda name: name.strip("/. ") and not name.endswith("/") and not name.startswith("__")
)
EXTENSIONS = st.sampled_from(["jpg", "JPG", "png", "left.jpg", "cls", "txt", "json", "npy", "", "."])
CONTENTS = st.sampled_from([JPEG, JPEG[:200], b"", b"<html>", b"7", b"cat", b"\xff\xfe", b"{"])
MEMBERS = st.lists(st.tuples(NAMES, EXTENSIONS, CONTENTS), max_size=12)


def tar_of(members, form=tarfile.GNU_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def samples_of(path, data=None, **options):
    if data is not None:
        path.write_bytes(data)
    return list(read_samples(list_shards([str(path)])[0], **options))


def read_until_it_breaks(path, data):
    path.write_bytes(data)
    found, error = [], None
    try:
        for item in read_samples(list_shards([str(path)])[0]):
            found.append(item)
    except ShardError as raised:
        error = str(raised)
    return found, error


def embed(source, out, **options):
    encoder = PixelEncoder()
    dataset = open_dataset(out, encoder.info, "float32", "test")
    options = {"batch_size": 5, "decode_threads": 2, **options}
    return list(embed_shards(list_shards([str(source)]), [encoder], out, dataset, **options))


def key_of(name):
    """As WebDataset defines it: up to the first dot of the last component, which may begin with one."""
    folder, slash, last = name.rpartition("/")
    stem = last[:1] + last[1:].partition(".")[0]
    return folder + slash + stem


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members=MEMBERS, form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_every_run_of_a_key_is_one_row_or_one_reject(tmp_path, members, form):
    members = [(f"{name}.{extension}" if extension else name, data) for name, extension, data in members]
    data = tar_of(members, form)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        keys = [key_of(name) for name in tar.getnames()]
    runs = [key for at, key in enumerate(keys) if at == 0 or keys[at - 1] != key]
    found = samples_of(tmp_path / "t.tar", data)
    assert [item.key for item in found] == runs
    rows = [item.key for item in found if isinstance(item, Sample)]
    assert len(set(rows)) == len(rows)
    assert all(item.reason for item in found if isinstance(item, Reject))


WHOLE = tar_of([(name, data) for at in range(6) for name, data in [(f"k{at}.jpg", JPEG), (f"k{at}.cls", b"%d" % at)]])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, len(WHOLE) - 1), zeros=st.integers(0, 3000))
def test_cut_off_anywhere_it_gives_what_came_before_and_says_so(tmp_path, cut, zeros):
    """Zeros after the cut are what a download leaves that reserved its space."""
    whole = samples_of(tmp_path / "whole.tar", WHOLE)
    end_of_data = WHOLE.rindex(b"ustar") - 257 + 1024
    found, error = read_until_it_breaks(tmp_path / "t.tar", WHOLE[:cut] + bytes(zeros))
    complete = [item for item in found if isinstance(item, Sample)]
    if error is None:
        # Zeros on the boundary of two members are an end-of-archive block: there a shorter tar is a tar.
        assert cut >= end_of_data or zeros >= 512
        assert [item.key for item in complete] == [item.key for item in whole[: len(complete)]]
    else:
        assert complete == whole[: len(complete)]
        assert len(found) <= len(complete) + 1
        assert "t.tar" in error


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=5))
def test_damaged_anywhere_the_law_holds(tmp_path_factory, changes):
    data = bytearray(WHOLE)
    for at, value in changes:
        data[at] = value
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "t.tar").write_bytes(data)
    for salvage in (False, True):
        (result,) = embed(folder / "t.tar", folder / f"out{salvage}", salvage=salvage)
        if result.record is None:
            assert "t.tar" in result.error
            assert published_shards(folder / f"out{salvage}") == {}
        else:
            record = result.record
            assert record.rows + record.rejects == record.samples
            keys = [
                k for b in read_embeddings(folder / f"out{salvage}", ("key",)) for k in b.columns["key"].to_pylist()
            ]
            assert len(set(keys)) == len(keys) == record.rows
            assert read_rejects(folder / f"out{salvage}", record.name).num_rows == record.rejects


@pytest.mark.parametrize(
    "garbage", [b"", bytes(100), os.urandom(5000), b"<html>" * 1000, gzip.compress(b"no tar" * 500)]
)
def test_what_is_no_tar_is_broken(tmp_path, garbage):
    found, error = read_until_it_breaks(tmp_path / "t.tar", garbage)
    assert (found, error is None) == ([], False)


@pytest.mark.parametrize("zeros", [512, 1024, 10240])
def test_an_empty_tar_is_a_shard_without_samples(tmp_path, zeros):
    (tmp_path / "t.tar").write_bytes(bytes(zeros))
    (result,) = embed(tmp_path / "t.tar", tmp_path / "out")
    assert (result.error, result.record.samples) == (None, 0)


def test_salvage_publishes_what_was_read_with_the_break_recorded(tmp_path):
    whole = write_tar(tmp_path / "t.tar", labelled([f"k{at:02}" for at in range(20)])).read_bytes()
    (tmp_path / "t.tar").write_bytes(whole[: len(whole) // 2])
    (failed,) = embed(tmp_path / "t.tar", tmp_path / "out")
    assert "truncated" in failed.error
    (result,) = embed(tmp_path / "t.tar", tmp_path / "out", salvage=True)
    record = published_shards(tmp_path / "out")[result.shard.name]
    assert "truncated" in record.broken
    assert record.rows + record.rejects == record.samples
    assert 0 < record.rows < 20
    (last,) = read_rejects(tmp_path / "out", record.name).to_pylist()
    assert last["key"] == f"k{record.rows:02}"
    assert "the tar breaks in or after this sample" in last["reason"]


def test_where_nothing_came_before_the_break_nothing_is_salvaged(tmp_path):
    (tmp_path / "t.tar").write_bytes(b"<html>" * 1000)
    (result,) = embed(tmp_path / "t.tar", tmp_path / "out", salvage=True)
    assert result.record is None
    assert "no tar header at offset 0" in result.error


def test_a_disk_that_fails_is_no_break_to_salvage(tmp_path):
    """/proc/self/mem cannot be read from its start: EIO, as of a dying disk."""
    (tmp_path / "t.tar").symlink_to("/proc/self/mem")
    (result,) = embed(tmp_path / "t.tar", tmp_path / "out", salvage=True)
    assert result.record is None
    assert "Input/output error" in result.error


def test_a_tar_that_grows_while_it_is_read_is_not_published(tmp_path):
    path = write_tar(tmp_path / "t.tar", labelled([f"k{at}" for at in range(30)]))

    class Growing(PixelEncoder):
        def encode(self, images):
            with open(path, "ab") as file:
                file.write(bytes(10240))
            return super().encode(images)

    dataset = open_dataset(tmp_path / "out", PixelEncoder().info, "float32", "test")
    shards = list_shards([str(path)])
    (result,) = embed_shards(shards, [Growing()], tmp_path / "out", dataset, batch_size=3, salvage=True)
    assert "changed while it was read" in result.error


def test_names_of_any_length_and_members_of_any_number_cost_no_memory(tmp_path):
    long = "x" * (MAX_NAME_CHARACTERS + 1)
    many = [(f"many.{at}.txt", b"t" * 1000) for at in range(MAX_SAMPLE_MEMBERS + 5)]
    members = [(f"{long}.jpg", JPEG), *many, (f"a.{long}.jpg", JPEG), ("b.jpg", JPEG)]
    first, second, third, last = samples_of(tmp_path / "t.tar", tar_of(members))
    assert "characters" in first.reason and len(first.key) == MAX_NAME_CHARACTERS
    assert f"more than {MAX_SAMPLE_MEMBERS}" in second.reason
    assert "characters" in third.reason and third.key == "a"
    assert last.key == "b"


def test_images_of_too_many_bytes_are_not_read(tmp_path):
    found = samples_of(
        tmp_path / "t.tar", tar_of([("a.jpg", JPEG), ("b.jpg", bytes(50_000)), ("c.jpg", JPEG)]), max_bytes=len(JPEG)
    )
    assert [type(item) for item in found] == [Sample, Reject, Sample]
    assert "50000 bytes, more than" in found[1].reason


def test_nothing_is_unpickled_rewritten_or_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WDS_REWRITE", f"{tmp_path}=pipe:touch {tmp_path}/ran ;")
    evil = b"cos\nsystem\n(S'touch " + str(tmp_path).encode() + b"/ran'\ntR."
    data = tar_of([("a.jpg", JPEG), ("a.pyd", evil), ("a.pickle", evil), ("a.pth", evil), ("a.json", evil)])
    (sample,) = samples_of(tmp_path / "t.tar", data)
    assert sample.meta == evil.decode()
    assert not (tmp_path / "ran").exists()


def test_global_pax_headers_do_not_pile_up(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={f"v{at}": "x" * 50 for at in range(2000)}
    ) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = len(JPEG)
        tar.addfile(info, io.BytesIO(JPEG))
    (sample,) = samples_of(tmp_path / "t.tar", buffer.getvalue())
    assert sample.image == JPEG


def test_a_million_members(tmp_path):
    names = np.char.add(
        np.char.zfill(np.repeat(np.arange(333_334), 3).astype("U"), 7), np.tile([".jpg", ".cls", ".txt"], 333_334)
    )
    blank = tarfile.TarInfo("x" * 11).tobuf(tarfile.USTAR_FORMAT)[:512]
    headers = np.frombuffer(blank * 1000, np.uint8).reshape(1000, 512).copy()
    with open(tmp_path / "t.tar", "wb") as file:
        for first in range(0, len(names), 1000):
            part = names[first : first + 1000].astype("S11")
            headers[: len(part), :11] = part.view(np.uint8).reshape(len(part), 11)
            headers[:, 148:156] = ord(" ")
            sums = headers.sum(axis=1, dtype=np.int64)
            headers[:, 148:156] = np.array([b"%06o\0 " % total for total in sums]).view(np.uint8).reshape(-1, 8)
            file.write(headers[: len(part)].tobytes())
        file.write(bytes(1024))
    shard = list_shards([str(tmp_path / "t.tar")])[0]
    assert sum(1 for _ in read_samples(shard)) == 333_334
    (tmp_path / "t.tar").unlink()
