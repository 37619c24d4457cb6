import io
import subprocess
import tarfile

import pytest
from corpus import write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from clipindex.errors import ShardError
from clipindex.tar import Member, read_members


def members_of(data: bytes) -> list[Member]:
    return list(read_members(io.BytesIO(data), lambda name, size: True))


def by_tarfile(data: bytes):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [
            (m.name, m.offset_data, m.size, tar.extractfile(m).read()) for m in tar if m.isreg() and not m.issparse()
        ]


def files_of(data: bytes):
    return [(m.name, m.offset, m.size, m.data) for m in members_of(data) if m.kind == "file"]


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=60)
PATHS = st.lists(NAMES, min_size=1, max_size=6).map("/".join).filter(lambda path: path.strip("/. "))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(PATHS, st.binary(max_size=1500)), max_size=6),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_agrees_with_the_standard_library_on_names_offsets_and_bytes(members, form):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert files_of(buffer.getvalue()) == by_tarfile(buffer.getvalue())


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["a.jpg", "d" * 90 + "/" + "e" * 60 + ".jpg", "x" * 99 + ".", "ü/é" * 8 + ".png"])
def test_long_and_accented_names_in_every_format(tmp_path, form, name):
    data = write_tar(tmp_path / "t.tar", [(name, b"12345"), ("next.cls", b"1")], form).read_bytes()
    assert files_of(data) == by_tarfile(data)


def test_links_and_directories_are_told_apart_from_files(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in [("d", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere"
            tar.addfile(info)
        info = tarfile.TarInfo("f.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert [(m.name, m.kind) for m in members_of(buffer.getvalue())] == [
        ("l.jpg", "symbolic link"),
        ("h.jpg", "hard link"),
        ("f.jpg", "file"),
    ]


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_sparse_files_are_named_as_such_and_what_follows_is_intact(tmp_path, form):
    with open(tmp_path / "hole.jpg", "wb") as file:
        for at in range(12):  # more holes than fit the first header
            file.seek(at * 100_000)
            file.write(b"data")
        file.truncate(2_000_000)
    (tmp_path / "after.jpg").write_bytes(b"after")
    subprocess.run(["tar", "-S", f"--format={form}", "-cf", "t.tar", "hole.jpg", "after.jpg"], cwd=tmp_path, check=True)
    found = members_of((tmp_path / "t.tar").read_bytes())
    assert [(m.name, m.kind) for m in found] == [("hole.jpg", "sparse file"), ("after.jpg", "file")]
    assert found[1].data == b"after"


def test_sizes_in_base_256(tmp_path):
    data = bytearray(write_tar(tmp_path / "t.tar", [("a.jpg", b"x" * 700)]).read_bytes())
    data[124:136] = b"\x80" + (700).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    assert files_of(bytes(data)) == by_tarfile(bytes(data))


def test_a_stream_cut_at_any_block_is_broken_not_short(tmp_path):
    whole = write_tar(tmp_path / "t.tar", [("a.jpg", b"x" * 700), ("b.jpg", b"y")]).read_bytes()
    end_of_data = 512 + 1024 + 512 + 512
    for cut in [*range(0, end_of_data + 1, 512), 100, 513, 1200, end_of_data - 1]:
        with pytest.raises(ShardError, match=f"truncated: ends at offset {cut} "):
            members_of(whole[:cut])
    assert len(members_of(whole[: end_of_data + 512])) == 2


def test_skipping_data_notices_a_cut_as_well(tmp_path):
    whole = write_tar(tmp_path / "t.tar", [("a.bin", b"x" * 50_000)]).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:20_000])
    with open(tmp_path / "cut.tar", "rb") as file, pytest.raises(ShardError, match="truncated"):
        list(read_members(file, lambda name, size: False))


def test_damage_is_named_with_its_offset(tmp_path):
    whole = bytearray(write_tar(tmp_path / "t.tar", [("a.jpg", b"x" * 700), ("b.jpg", b"y")]).read_bytes())
    whole[1536 + 3] ^= 1
    with pytest.raises(ShardError, match="checksum at offset 1536"):
        members_of(bytes(whole))
    with pytest.raises(ShardError, match="offset 0"):
        members_of(b"<html>" + bytes(2000))


def test_a_checksum_is_compared_to_its_highest_digit(tmp_path):
    data = bytearray(write_tar(tmp_path / "t.tar", [("a.jpg", b"x")]).read_bytes())
    data[148:149] = b"2"  # 65536 more
    with pytest.raises(ShardError, match="checksum at offset 0"):
        members_of(bytes(data))


def test_headers_of_high_bytes_have_large_sums(tmp_path):
    name = "\N{CYRILLIC SMALL LETTER YA}" * 49
    data = bytearray(write_tar(tmp_path / "t.tar", [("a.jpg", b"x")], tarfile.GNU_FORMAT).read_bytes())
    data[0:98] = name.encode()
    data[157:257] = b"\xff" * 100  # a link's target
    data[345:500] = b"\xff" * 155  # the prefix, which GNU's format does not know
    data = with_field(bytes(data), 0, name.encode())
    assert sum(data[:148]) + sum(data[156:512]) + 256 > 65521
    assert files_of(data)[0][:1] == (name,)


def with_field(data: bytes, start: int, value: bytes) -> bytes:
    """A tar whose first header has another field, and a checksum that holds."""
    changed = bytearray(data)
    changed[start : start + len(value)] = value
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed[:512])
    return bytes(changed)


@pytest.mark.parametrize(
    "size", [b"-0000001000\0", b"1_00\0", b"0x10\0", b"\xff" * 12, b"\x80" + (1 << 44).to_bytes(11, "big")]
)
def test_sizes_that_no_file_has_are_damage(tmp_path, size):
    data = write_tar(tmp_path / "t.tar", [("a.jpg", b"x" * 700)]).read_bytes()
    with pytest.raises(ShardError, match="damaged"):
        members_of(with_field(data, 124, size))


@pytest.mark.parametrize("size", ["9" * 30, "9" * 5000, "-1", "1.5"])
def test_pax_sizes_that_no_file_has_are_damage(size):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = {"size": size}
        tar.addfile(info)
    with pytest.raises(ShardError, match="damaged"):
        members_of(buffer.getvalue())


def test_tars_glued_together_are_refused(tmp_path):
    one = write_tar(tmp_path / "1.tar", [("a.jpg", b"x")]).read_bytes()
    with pytest.raises(ShardError, match="glued"):
        members_of(one + one)


def test_a_zero_filled_download_is_refused(tmp_path):
    one = write_tar(tmp_path / "1.tar", [("a.jpg", b"x")]).read_bytes()
    with pytest.raises(ShardError, match="cut short"):
        members_of(one + bytes(2 << 20))
