import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import run_cli, run_process
from corpus import encoded, labelled, picture, write_tar

from clipindex.embed_job import embed
from clipindex.errors import FingerprintError, StoreError
from clipindex.types import ModelSpec
from clipindex.verification import verify

HERE = {"device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two tars with some rejects, one of them gzipped, and their embeddings."""
    folder = tmp_path_factory.mktemp("made")
    members = [
        (name, b"<html>" if name.endswith("3.jpg") else data)
        for name, data in labelled([f"k{at:02}" for at in range(24)])
    ]
    members += [("k05.jpg", encoded()), ("notes.txt", b"no image")]
    write_tar(folder / "a.tar", members)
    write_tar(folder / "b.tar", labelled([f"z{at}" for at in range(9)], seed=50))
    with gzip.open(folder / "c.tar.gz", "wb") as file:
        file.write((folder / "a.tar").read_bytes())
    embed(str(folder), folder / "out", model="demo", batch_size=8, **HERE)
    return folder


@pytest.fixture
def out(made, tmp_path):
    """A copy of the embeddings to spoil; it says where its tars are by absolute path."""
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


def shard(out, letter="a"):
    (path,) = (out / "embeddings").glob(f"*-{letter}-*.parquet")
    return path


def rewrite(path, change):
    """The same file with another table in it."""
    table = pq.read_table(path)
    footer = {b"clipindex": pq.read_metadata(path).metadata[b"clipindex"]}
    changed = change(table)
    pq.write_table(
        changed.cast(table.schema).replace_schema_metadata(footer), path, use_dictionary=False, store_schema=True
    )


def column(table, name, change):
    at = table.schema.get_field_index(name)
    return table.set_column(
        at, table.schema.field(at), pa.array(change(table[name].to_pylist()), table.schema.field(at).type)
    )


def faults(out, **options):
    return [fault.what for fault in verify(out, **options).faults]


def test_what_was_embedded_is_without_fault(out):
    found = verify(out, deep=True, **HERE)
    assert (found.faults, found.notes) == ([], [])
    assert found.rows + found.rejects == found.samples == 26 + 9 + 26
    assert found.embedded_again == found.rows
    assert found.least_cosine > 0.9999
    assert verify(out, deep=True, sample=5, **HERE).embedded_again == 5


def swapped(values):
    return [values[1], values[0], *values[2:]]


SHALLOW = {
    "a vector of another length": (
        lambda t: column(t, "embedding", lambda v: [*v[:3], [2 * x for x in v[3]], *v[4:]]),
        "row 3 .*length 2",
    ),
    "a vector of NaN": (
        lambda t: column(t, "embedding", lambda v: [[np.nan] * len(v[0]), *v[1:]]),
        "row 0 .*length nan",
    ),
    "no norm": (lambda t: column(t, "norm", lambda v: [*v[:2], np.inf, *v[3:]]), "row 2 .*norm"),
    "rows in another order": (lambda t: t.take(swapped(list(range(len(t))))), "order of their tar"),
    "a key twice": (lambda t: column(t, "key", lambda v: [v[0], v[0], *v[2:]]), "1 keys come twice"),
    "a key that is rejected too": (
        lambda t: column(t, "key", lambda v: ["k03", *v[1:]]),
        "'k03' is a row and a reject",
    ),
    "a lost row": (lambda t: t.slice(1), "footer contradicts"),
}


@pytest.mark.parametrize("name", SHALLOW)
def test_the_files_alone_tell(out, name):
    change, said = SHALLOW[name]
    rewrite(shard(out), change)
    (fault,) = verify(out).faults
    assert Path(fault.path) == shard(out)
    assert re.search(said, fault.what), fault.what
    assert fault.remedy.endswith(" again")


DEEP = {
    "labels of other rows": (lambda t: column(t, "label", swapped), "k00.*label differ"),
    "a caption": (lambda t: column(t, "caption", lambda v: ["x", *v[1:]]), "caption differ"),
    "vectors of other rows": (lambda t: column(t, "embedding", swapped), "2 of .* embedded anew differ"),
    "an offset": (lambda t: column(t, "tar_offset", lambda v: [v[0] + 1, *v[1:]]), "tar_offset differ"),
    "a key": (lambda t: column(t, "key", lambda v: ["other", *v[1:]]), "has key 'k00'"),
    "a size": (lambda t: column(t, "width", lambda v: [v[0] + 1, *v[1:]]), "64 x 48 pixels, not 65 x 48"),
}


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("letter", ["a", "c"])
def test_the_tars_tell_the_rest(out, name, letter):
    if (name, letter) == ("an offset", "c"):
        pytest.skip("a gzipped tar has none")
    change, said = DEEP[name]
    rewrite(shard(out, letter), change)
    assert faults(out) == []
    found = faults(out, deep=True, **HERE)
    assert any(re.search(said, what) for what in found), found


def test_tars_that_ought_to_be_there_are_asked_for(made, out):
    assert verify(out, [str(made)]).faults == []
    shard(out, "b").unlink()
    (fault,) = verify(out, [str(made)]).faults
    assert (Path(fault.path).name, fault.what) == ("b.tar", "is not embedded")
    assert faults(out) == []


def test_rejects_are_counted_and_of_their_shard(out):
    (path,) = (out / "rejects").glob("*-a-*.parquet")
    rewritten = pq.read_table(path).slice(1)
    pq.write_table(rewritten, path)
    (what,) = faults(out)
    assert "rejects instead of" in what
    path.unlink()
    (what,) = faults(out)
    assert "is missing" in what


@pytest.mark.filterwarnings("ignore")
def test_damage_anywhere_is_a_fault_and_no_exception(out):
    """Of one byte: most are found, some lie where nothing is kept; none may end the check."""
    rng = np.random.default_rng(0)
    num_found = 0
    for path in [shard(out), *(out / "rejects").glob("*-a-*.parquet")]:
        whole = path.read_bytes()
        for _ in range(120):
            damaged = bytearray(whole)
            for at in rng.integers(0, len(whole), 4):
                damaged[at] = rng.integers(256)
            path.write_bytes(damaged)
            num_found += bool(verify(out).faults)
        path.write_bytes(whole)
    assert num_found > 60
    assert verify(out).faults == []


def test_a_foreign_file_of_rejects_is_a_fault(out):
    (path,) = (out / "rejects").glob("*-a-*.parquet")
    pq.write_table(pa.table({"x": [1] * pq.read_metadata(path).num_rows}), path)
    (what,) = faults(out)
    assert "no file of rejects" in what


def test_leftovers_are_notes(out):
    path = shard(out)
    path.unlink()
    (out / "embeddings" / ".x.parquet.host.1.abcd.tmp").write_bytes(b"")
    found = verify(out)
    assert found.faults == []
    assert len(found.notes) == 2
    assert "belongs to no published shard" in found.notes[0]


def test_a_tar_that_changed_or_went_or_broke(made, out, tmp_path):
    corpus = tmp_path / "corpus"
    for at in range(3):
        write_tar(corpus / f"{at}.tar", labelled([f"s{at}_{i}" for i in range(4)]))
    embed(str(corpus), tmp_path / "made", model="demo", batch_size=8, **HERE)
    (corpus / "0.tar").unlink()
    write_tar(corpus / "1.tar", labelled(["new"]))
    found = verify(tmp_path / "made", deep=True, **HERE).faults
    assert [Path(fault.path).name for fault in found] == ["0.tar", "1.tar"]
    assert "No such file" in found[0].what
    assert "changed since" in found[1].what and "--refresh" in found[1].remedy


def test_a_salvaged_shard_is_no_fault_but_a_note(tmp_path):
    whole = write_tar(tmp_path / "t.tar", labelled([f"k{at}" for at in range(9)])).read_bytes()
    (tmp_path / "t.tar").write_bytes(whole[:20_000])
    summary = embed(
        str(tmp_path / "t.tar"), tmp_path / "out", model="demo", batch_size=8, on_broken_shard="salvage", **HERE
    )
    assert list(summary.shards_salvaged) == [str(tmp_path / "t.tar")]
    found = verify(tmp_path / "out", deep=True, **HERE)
    assert found.faults == []
    assert "was salvaged" in found.notes[0] and "truncated" in found.notes[0]


def test_rows_after_the_break_of_a_salvaged_shard_are_faults(tmp_path):
    whole = write_tar(tmp_path / "t.tar", labelled([f"k{at}" for at in range(9)])).read_bytes()
    (tmp_path / "t.tar").write_bytes(whole[:20_000])
    embed(str(tmp_path / "t.tar"), tmp_path / "out", model="demo", batch_size=8, on_broken_shard="salvage", **HERE)
    (path,) = (tmp_path / "out" / "embeddings").glob("*.parquet")
    footer = json.loads(pq.read_metadata(path).metadata[b"clipindex"])
    elsewhere = {**footer, "broken": "somewhere else"}
    table = pq.read_table(path)

    def write(record, rows):
        table = rows.replace_schema_metadata({b"clipindex": json.dumps(record).encode()})
        pq.write_table(table, path, use_dictionary=False)

    write(elsewhere, table)
    (what,) = faults(tmp_path / "out", deep=True, **HERE)
    assert "its record says of the tar: somewhere else" in what
    invented = column(table.slice(table.num_rows - 1), "key", lambda v: ["invented"])
    invented = column(invented, "tar_offset", lambda v: [v[0] + 512])
    more = {**footer, "rows": footer["rows"] + 1, "samples": footer["samples"] + 1}
    write(more, pa.concat_tables([table, invented]))
    assert any("'invented' is not in the tar" in what for what in faults(tmp_path / "out", deep=True, **HERE))


def test_another_model_is_refused(out, tmp_path):
    with pytest.raises(FingerprintError):
        verify(out, deep=True, model=ModelSpec(name="RN50", random_init=1), **HERE)
    with pytest.raises(StoreError, match="no embedding directory"):
        verify(tmp_path)


def test_the_command_names_faults_and_fails(out):
    good = run_process("verify", out)
    assert good.returncode == 0, good.stderr
    assert good.stdout.endswith("no fault\n")
    shard(out).write_bytes(encoded(picture()))
    bad = run_cli("verify", out, "--json")
    assert bad.returncode == 1
    (fault,) = json.loads(bad.stdout)["faults"]
    assert fault["path"] == str(shard(out))
    assert "fault: " in run_cli("verify", out).stdout
    refused = run_cli("verify", out, "--sample", 3)
    assert refused.returncode == 2
