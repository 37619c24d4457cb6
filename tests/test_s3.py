"""A real object-store protocol: shards behind an S3 server on this machine."""

import pytest
from corpus import labelled, write_tar

from clipindex.shards import list_shards, read_samples
from clipindex.urls import read_range

pytest.importorskip("s3fs")


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
    filesystem.makedirs("corpus", exist_ok=True)
    for at in range(3):
        tar = write_tar(tmp_path / f"{at}.tar", labelled([f"k{at}_{i}" for i in range(5)]))
        filesystem.put(str(tar), f"corpus/train/{at}.tar")
    yield tmp_path
    filesystem.clear_instance_cache()
    server.stop()


@pytest.mark.filterwarnings("ignore")  # botocore's own
@pytest.mark.parametrize("source", ["s3://corpus/train", "s3://corpus/train/*.tar", "s3://corpus/train/{0..2}.tar"])
def test_shards_in_a_bucket_are_read_like_local_ones(bucket, source):
    remote = list_shards([source])
    local = list_shards([str(bucket)])
    assert [shard.url for shard in remote] == [f"s3://corpus/train/{at}.tar" for at in range(3)]
    assert all(shard.version for shard in remote)
    for there, here in zip(remote, local, strict=True):
        samples = list(read_samples(there))
        assert samples == list(read_samples(here))
        assert read_range(there.url, samples[0].tar_offset, len(samples[0].image)) == samples[0].image
