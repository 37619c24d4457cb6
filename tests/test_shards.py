import functools
import gzip
import http.server
import threading

import pytest
import webdataset
from corpus import encoded, labelled, write_tar

from clipindex.errors import ShardError, SourceError
from clipindex.shards import list_shards, read_samples
from clipindex.types import Reject, Sample

JPEG = encoded()


def samples_of(path):
    return list(read_samples(list_shards([str(path)])[0]))


def test_samples_carry_label_caption_metadata_and_place(tmp_path):
    path = write_tar(tmp_path / "t.tar", [("a/1.jpg", JPEG), ("a/1.cls", b"7\n"), ("a/1.txt", "häuser".encode()),
                                          ("a/1.json", b'{"x": 1}'), ("a/1.npy", b"ignored")])  # fmt: skip
    (sample,) = samples_of(path)
    assert (sample.key, sample.member, sample.label) == ("a/1", "a/1.jpg", 7)
    assert (sample.caption, sample.meta) == ("häuser", '{"x": 1}')
    assert path.read_bytes()[sample.tar_offset : sample.tar_offset + len(sample.image)] == JPEG


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # theirs
def test_agrees_with_webdataset_on_keys_images_and_labels(tmp_path):
    names = ["plain", "with/folder/x", "caps", "two words", "ünï"]
    path = write_tar(tmp_path / "t.tar", labelled(names))
    theirs = [(s["__key__"], s["jpg"], int(s["cls"])) for s in webdataset.WebDataset(str(path), shardshuffle=False)]
    assert [(s.key, s.image, s.label) for s in samples_of(path)] == theirs


@pytest.mark.parametrize(
    ("members", "chosen"),
    [
        (["k.jpg", "k.png", "k.webp"], "k.webp"),
        (["k.JPG"], "k.JPG"),
        (["k.v2.jpg"], "k.v2.jpg"),
        (["k.left.jpg", "k.png"], "k.png"),
        (["k.tiff", "k.jpeg"], "k.jpeg"),
    ],
)
def test_which_member_is_the_image(tmp_path, members, chosen):
    path = write_tar(tmp_path / "t.tar", [(name, JPEG) for name in members])
    (sample,) = samples_of(path)
    assert isinstance(sample, Sample)
    assert sample.member == chosen


@pytest.mark.parametrize(
    ("members", "stage", "reason"),
    [
        ([("k.cls", b"1"), ("k.txt", b"x")], "tar", "no image among the members: k.cls, k.txt"),
        ([("README", b"hello")], "tar", "no image"),
        ([("k.left.jpg", JPEG), ("k.right.jpg", JPEG)], "tar", "several images"),
        ([("k.jpg", JPEG), ("k.jpg", JPEG)], "tar", "a member twice"),
        ([("k.jpg", JPEG), ("k.cls", b"cat")], "label", "'cat' is no integer label"),
        ([("k.jpg", JPEG), ("k.cls", b"3,5")], "label", "'3,5' is no integer label or a list as [3,5]"),
        ([("k.jpg", JPEG), ("k.cls", b"99999999999")], "label", "does not fit"),
    ],
)
def test_a_sample_that_cannot_be_a_row_is_a_reject_with_a_reason(tmp_path, members, stage, reason):
    (reject,) = samples_of(write_tar(tmp_path / "t.tar", members))
    assert isinstance(reject, Reject)
    assert reject.stage == stage
    assert reason in reject.reason


def test_members_of_a_key_that_lie_apart_are_reported(tmp_path):
    path = write_tar(tmp_path / "t.tar", [("a.jpg", JPEG), ("b.jpg", JPEG), ("a.cls", b"1"), ("b.cls", b"2")])
    found = samples_of(path)
    assert [type(item) for item in found] == [Sample, Sample, Reject, Reject]
    assert "came before in this tar" in found[2].reason


def test_a_shards_own_notes_are_no_samples(tmp_path):
    path = write_tar(tmp_path / "t.tar", [("__info__", b"x"), ("a.jpg", JPEG), ("__MACOSX__/a.jpg", b"x")])
    assert [item.key for item in samples_of(path)] == ["a"]


def test_bytes_that_are_no_utf8_become_escapes(tmp_path):
    data = bytearray(write_tar(tmp_path / "t.tar", [("a?.jpg", JPEG)]).read_bytes())
    data[1] = 0xFF
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "t.tar").write_bytes(data)
    assert samples_of(tmp_path / "t.tar")[0].key == "a\\xff"


def test_gzip_is_read_without_offsets(tmp_path):
    plain = write_tar(tmp_path / "t.tar", labelled(["a", "b"]))
    packed = tmp_path / "t.tar.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    found = samples_of(packed)
    assert [s.image for s in found] == [s.image for s in samples_of(plain)]
    assert {s.tar_offset for s in found} == {None}
    packed.write_bytes(packed.read_bytes()[:-3000])
    with pytest.raises(ShardError, match=r"t\.tar\.gz"):
        samples_of(packed)


class TestListing:
    @pytest.fixture
    def corpus(self, tmp_path):
        for at in (0, 1, 2, 10):
            write_tar(tmp_path / "train" / f"{at}.tar", labelled([f"k{at}"]))
        write_tar(tmp_path / "test" / "0.tar", labelled(["t"]))
        (tmp_path / "train" / "nshards.txt").write_text("4\n")
        return tmp_path

    def found(self, *sources):
        return [shard.url.rsplit("/", 2)[-2] + "/" + shard.url.rsplit("/", 1)[-1] for shard in list_shards(sources)]

    def test_a_data_set_root_a_split_globs_braces_and_lists(self, corpus):
        train = ["train/0.tar", "train/1.tar", "train/2.tar", "train/10.tar"]
        assert self.found(f"{corpus}") == ["test/0.tar", *train]
        assert self.found(f"{corpus}/train") == train
        assert self.found(f"{corpus}/train/*.tar") == train
        assert self.found(f"{corpus}/train/{{0..2}}.tar") == train[:3]
        (corpus / "list.txt").write_text(f"# mine\n{corpus}/train/{{0..1}}.tar\n\n{corpus}/test\n")
        assert self.found(f"@{corpus}/list.txt") == [*train[:2], "test/0.tar"]
        assert self.found(f"{corpus}/train", f"{corpus}/train/1.tar") == train

    def test_names_are_unique_and_stable(self, corpus):
        shards = list_shards([str(corpus)])
        assert len({shard.name for shard in shards}) == len(shards)
        assert shards == list_shards([str(corpus)])

    @pytest.mark.parametrize("source", ["missing.tar", "no/*.tar", "gap/{0..3}.tar", "."])
    def test_what_names_nothing_is_an_error_that_names_it(self, tmp_path, monkeypatch, source):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SourceError):
            list_shards([source])

    @pytest.mark.parametrize(
        "source", ["pipe:cat /etc/passwd", "pipe:touch x |", "ssh://host/x.tar", "simplecache::s3://b/x.tar"]
    )
    def test_urls_that_run_programs_are_refused(self, source):
        with pytest.raises(SourceError, match="refused"):
            list_shards([source])

    def test_lists_that_will_not_do(self, corpus):
        (corpus / "empty.txt").write_text("# nothing\n")
        (corpus / "loop.txt").write_text(f"@{corpus}/loop.txt\n")
        (corpus / "binary.txt").write_bytes(b"\xff\xfe")
        for name, reason in {"empty": "names no source", "loop": "another list", "binary": "UTF-8"}.items():
            with pytest.raises(SourceError, match=reason):
                list_shards(f"@{corpus}/{name}.txt")
        with pytest.raises(SourceError, match="brace"):
            list_shards(f"{corpus}/train/{{0..2.tar")

    def test_links_to_folders_are_followed_once(self, corpus):
        (corpus / "test" / "more").symlink_to(corpus / "train")
        (corpus / "train" / "back").symlink_to(corpus)
        assert len(list_shards(str(corpus / "test"))) == 5

    def test_a_folder_with_a_dot_in_front_gives_visible_names(self, tmp_path):
        write_tar(tmp_path / ".wds" / "0.tar", labelled(["a"]))
        (shard,) = list_shards(str(tmp_path / ".wds"))
        assert not shard.name.startswith(".")

    def test_a_split_with_a_lost_tar_is_refused(self, corpus):
        (corpus / "train" / "1.tar").unlink()
        with pytest.raises(SourceError, match=r"nshards\.txt says 4, but there are 3 tars"):
            list_shards([str(corpus)])

    def test_over_http(self, corpus):
        handler = functools.partial(QuietHandler, directory=str(corpus))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}/train/{{0..1}}.tar"
            shards = list_shards([url])
            remote = [item for shard in shards for item in read_samples(shard)]
            server.shutdown()
        local = [item for at in (0, 1) for item in samples_of(corpus / "train" / f"{at}.tar")]
        assert remote == local
        assert all(shard.size for shard in shards)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class CuttingHandler(http.server.BaseHTTPRequestHandler):
    """Promises a whole file and hangs up halfway."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.send_header("Last-Modified", "Sat, 21 Nov 2026 00:00:00 GMT")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(bytes(1000))
            self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.mark.filterwarnings("ignore")  # aiohttp's, of the connection that was cut
def test_a_connection_that_drops_breaks_the_shard_and_not_the_job():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), CuttingHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (shard,) = list_shards(f"http://127.0.0.1:{server.server_port}/0.tar?signature=1")
        assert "2026" in shard.version
        with pytest.raises(SourceError, match=r"0\.tar"):  # no break of the tar, which one would salvage
            list(read_samples(shard))
        server.shutdown()
