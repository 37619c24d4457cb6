import gc
import hashlib
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import clipindex.packing
from clipindex.errors import ClassesError, SourceError, UsageError
from clipindex.packing import pack
from clipindex.shards import list_shards, read_samples
from clipindex.types import Sample


def encoded(shade, image_format="PNG", side=4):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (shade % 256, shade // 256, 7)).save(buffer, image_format)
    return buffer.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def class_folder(root, classes=("cat", "dog"), num_each=3):
    for at, name in enumerate(classes):
        for number in range(num_each):
            write(root / name / f"img{number}.png", encoded(100 * at + number))
    return root


def members(tar_path):
    with tarfile.open(tar_path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]


def split_members(split_dir):
    tars = sorted(split_dir.glob("*.tar"), key=lambda path: int(path.stem))
    return [member for path in tars for member in members(path)]


def names(split_dir):
    return [name for name, _ in split_members(split_dir)]


def digests(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rejects(summary):
    return {row["name"]: row["reason"] for row in map(json.loads, summary.rejects_path.read_text().splitlines())}


def webdataset_rows(summary, label="cls"):
    """As CLIP_benchmark's build_wds_dataset reads a split."""
    import webdataset

    pattern = str(summary.split_dir / f"{{0..{summary.num_shards - 1}}}.tar")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves tars to the garbage collector
        rows = list(
            webdataset.WebDataset(pattern, shardshuffle=False, nodesplitter=lambda src: src)
            .decode(webdataset.autodecode.ImageHandler("pil", extensions=["webp", "png", "jpg", "jpeg"]))
            .to_tuple(["webp", "png", "jpg", "jpeg"], label)
        )
        gc.collect()
    return rows


def job_samples(summary):
    """As this project's own reader reads a split."""
    return [sample for shard in list_shards([str(summary.split_dir)]) for sample in read_samples(shard)]


# --- folders


def test_folder_has_the_layout_of_clip_benchmark(tmp_path):
    source = class_folder(tmp_path / "src", ("hot_dog", "cat"))
    jpeg = write(source / "cat" / "more" / "IMG.Final.JPEG", encoded(9, "JPEG")).read_bytes()
    summary = pack(source, tmp_path / "out")

    assert (summary.num_shards, summary.num_samples, summary.num_rejects) == (1, 7, 0)
    assert summary.kind == "folder" and summary.rejects_path is None and summary.notes == ()
    assert summary.classes == ("cat", "hot dog")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "train",
        "classnames.txt",
        "zeroshot_classification_templates.txt",
    }
    assert (tmp_path / "out/classnames.txt").read_bytes() == b"cat\nhot dog\n"
    assert (tmp_path / "out/zeroshot_classification_templates.txt").read_bytes() == b"a photo of a {c}.\n"
    assert (tmp_path / "out/train/nshards.txt").read_bytes() == b"1\n"
    assert sorted(path.name for path in summary.split_dir.iterdir()) == ["0.tar", "nshards.txt"]
    assert summary.num_bytes == (summary.split_dir / "0.tar").stat().st_size
    found = members(summary.split_dir / "0.tar")
    assert found[:2] == [("cat/img0.png", encoded(100)), ("cat/img0.cls", b"0")]
    assert ("cat/more/IMG_Final.jpg", jpeg) in found
    assert [name for name, _ in found[-2:]] == ["hot_dog/img2.png", "hot_dog/img2.cls"] and found[-1][1] == b"1"


def test_clip_benchmark_and_the_job_read_what_was_packed(tmp_path):
    summary = pack(class_folder(tmp_path / "src"), tmp_path / "out", split="test", max_samples=4)
    rows = webdataset_rows(summary)
    assert [label for _, label in rows] == [0, 0, 0, 1, 1, 1]
    assert [image.getpixel((0, 0)) for image, _ in rows] == [(n, 0, 7) for n in (0, 1, 2, 100, 101, 102)]
    samples = job_samples(summary)
    assert all(isinstance(sample, Sample) for sample in samples)
    assert [(sample.key, sample.label) for sample in samples[2:4]] == [("cat/img2", 0), ("dog/img0", 1)]


def test_folder_of_images_without_classes_is_packed_without_labels(tmp_path):
    for number in range(3):
        write(tmp_path / f"src/{number}.webp", encoded(number, "WEBP"))
    summary = pack(tmp_path / "src", tmp_path / "out")
    assert names(summary.split_dir) == ["0.webp", "1.webp", "2.webp"]
    assert summary.classes == () and os.listdir(tmp_path / "out") == ["train"]
    assert [sample.label for sample in job_samples(summary)] == [None] * 3


def test_every_file_is_a_sample_or_a_reject(tmp_path):
    source = class_folder(tmp_path / "src")
    target = write(tmp_path / "elsewhere/real.png", encoded(55))
    (source / "cat/link.png").symlink_to(target)
    (source / "cat/broken.png").symlink_to(tmp_path / "gone.png")
    (source / "cat/loop").symlink_to(source, target_is_directory=True)
    (source / "dogs_again").symlink_to(source / "dog", target_is_directory=True)
    os.mkfifo(source / "dog/pipe.png")
    write(source / "dog/empty.png", b"")
    write(source / "dog/notes.txt", b"x")
    write(source / "dog/._img0.png", b"AppleDouble")
    write(source / ".git/deep/logo.png", encoded(1))
    write(source / "stray.png", encoded(1))
    write(Path(os.fsdecode(os.fsencode(source) + b"/dog/b\xff.txt")), b"x")
    summary = pack(source, tmp_path / "out")

    reasons = rejects(summary)
    assert reasons == {
        ".git/deep/logo.png": "in a hidden folder",
        "cat/broken.png": "No such file or directory",
        "cat/loop": "a link to a folder; links are followed to files only",
        "dog/._img0.png": "a hidden file",
        "dog/b\\xff.txt": "not the extension of an image that can be read",
        "dog/empty.png": "0 bytes; an image has 1 to 268435456",
        "dog/notes.txt": "not the extension of an image that can be read",
        "dog/pipe.png": "not a regular file",
        "dogs_again": "a link to a folder; links are followed to files only",
        "stray.png": "outside the class folders",
    }
    assert summary.classes == ("cat", "dog")
    assert summary.num_samples == 7 and ("cat/link.png", target.read_bytes()) in split_members(summary.split_dir)
    assert summary.num_samples + summary.num_rejects == 17
    assert [reject.name for reject in summary.first_rejects] == list(reasons)


def test_keys_are_unique_and_have_no_dot(tmp_path):
    source = tmp_path / "src"
    for name in ("a.jpg", "a.png", "a-2.png", "b.tar.gz.png", "b_tar.gz.png", "straße 北京.png", "n\nl.png"):
        write(source / "v1.0" / name, encoded(3, "JPEG" if name.endswith("jpg") else "PNG"))
    write(Path(os.fsdecode(os.fsencode(source) + b"/v1.0/x\xff\xfe.png")), encoded(4))
    write(source / "__pycache__" / f"{'ü' * 120}.png", encoded(5))
    summary = pack(source, tmp_path / "out")

    assert names(summary.split_dir)[::2] == [
        f"_pycache__/{'ü' * 100}.png",
        "v1_0/a-2.png",
        "v1_0/a.jpg",
        "v1_0/a-3.png",
        "v1_0/b_tar_gz.png",
        "v1_0/b_tar_gz-2.png",
        "v1_0/n_l.png",
        "v1_0/straße 北京.png",
        "v1_0/x__.png",
    ]
    assert summary.classes == ("pycache", "v1.0")
    assert len(webdataset_rows(summary)) == len(job_samples(summary)) == summary.num_samples == 9


def test_splits_and_outputs_inside_are_not_taken_for_classes(tmp_path):
    class_folder(tmp_path / "src/train")
    class_folder(tmp_path / "src/val")
    with pytest.raises(UsageError, match=r"train, val look like splits.*src/train with split='train'"):
        pack(tmp_path / "src", tmp_path / "out")
    assert pack(tmp_path / "src", tmp_path / "out", kind="folder").classes == ("train", "val")
    with pytest.raises(UsageError, match="inside the folder to pack"):
        pack(tmp_path / "src/train", tmp_path / "src/train/packed")


def test_class_names_that_clash_are_refused(tmp_path):
    with pytest.raises(ClassesError, match="'hot dog' and 'hot_dog' are both class 'hot dog'"):
        pack(class_folder(tmp_path / "src", ("hot_dog", "hot dog")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_given_class_names_match_folders_by_name_or_all_by_position(tmp_path):
    listing = tmp_path / "names.txt"
    source = class_folder(tmp_path / "src", ("dog", "hot_dog"), 1)
    listing.write_text("hot dog\ncat\ndog\n")
    by_name = pack(source, tmp_path / "a", classnames=listing)
    assert [label for name, label in split_members(by_name.split_dir) if name.endswith("cls")] == [b"2", b"0"]
    assert by_name.classes == ("hot dog", "cat", "dog")

    wordnet = class_folder(tmp_path / "wn", ("n01440764", "n01443537"), 1)
    listing.write_text("tench\ngold_fish\n")
    assert pack(wordnet, tmp_path / "b", classnames=listing).classes == ("tench", "gold_fish")
    listing.write_text("n01440764\ngoldfish\n")
    with pytest.raises(ClassesError, match=r"1 of 2 class folders \('n01443537'\)"):
        pack(wordnet, tmp_path / "c", classnames=listing)


def test_a_class_without_images_is_noted(tmp_path):
    source = class_folder(tmp_path / "src")
    (source / "bat").mkdir()
    summary = pack(source, tmp_path / "out")
    assert summary.classes == ("bat", "cat", "dog")
    assert summary.notes == ("class folders without an image: bat",)


@pytest.mark.parametrize("content", [{}, {"readme.txt": b"x"}, {"cat/a.txt": b"x", "cat/b.png": b""}])
def test_nothing_to_pack_is_an_error(tmp_path, content):
    (tmp_path / "src").mkdir()
    for name, data in content.items():
        write(tmp_path / "src" / name, data)
    with pytest.raises(SourceError, match="neither images nor class folders|no image to pack, 2 rejects"):
        pack(tmp_path / "src", tmp_path / "out")
    assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))


# --- CIFAR


def py2_pickle(value):
    """Protocol 2 as Python 2's cPickle writes it: 8-bit strings, and numpy's names of that time."""

    def string(data):
        return b"U" + bytes([len(data)]) + data if len(data) < 256 else b"T" + struct.pack("<i", len(data)) + data

    def dump(item):
        if isinstance(item, dict):
            return b"}(" + b"".join(dump(key) + dump(val) for key, val in item.items()) + b"u"
        if isinstance(item, list):
            return b"](" + b"".join(map(dump, item)) + b"e"
        if isinstance(item, bytes):
            return string(item)
        if isinstance(item, int):
            return b"J" + struct.pack("<i", item)
        assert item.dtype == np.uint8
        dtype = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R"
        dtype += b"(K\x03" + string(b"|") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
        state = b"(K\x01" + dump(item.shape[0]) + dump(item.shape[1]) + b"\x86" + dtype + b"\x89"
        made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R"
        return made + state + string(item.tobytes()) + b"tb"

    return b"\x80\x02" + dump(value) + b"."


def cifar_pixels(num, seed):
    return np.random.default_rng(seed).integers(0, 256, (num, 3072), dtype=np.uint8)


def cifar10_files(num=3):
    labels = [b"airplane", b"automobile", b"bird"]
    files = {"batches.meta": {b"num_cases_per_batch": num, b"label_names": labels, b"num_vis": 3072}}
    for at, name in enumerate([f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]):
        files[name] = {
            b"batch_label": name.encode(),
            b"labels": [n % 3 for n in range(num)],
            b"data": cifar_pixels(num, at),
            b"filenames": [f"{labels[n % 3].decode()}_s_{at * num + n:06}.png".encode() for n in range(num)],
        }
    return files


def cifar100_files(num=4):
    meta = {
        b"fine_label_names": [b"apple", b"aquarium_fish"],
        b"coarse_label_names": [b"fruit", b"fish", b"x"],
    }
    files = {"meta": meta}
    for seed, name in enumerate(("train", "test")):
        files[name] = {
            b"filenames": [b"same.png"] * 2 + [f"{n}.png".encode() for n in range(2, num)],
            b"batch_label": b"training batch 1 of 1",
            b"fine_labels": [1, 0, 1, 0],
            b"coarse_labels": [2, 1, 0, 0],
            b"data": cifar_pixels(num, 70 + seed),
        }
    return files


def write_cifar(folder, files, dumps=py2_pickle):
    for name, content in files.items():
        write(folder / name, dumps(content))
    return folder


def pixels_of(summary):
    """The images back as CIFAR's rows."""
    images = [
        np.array(Image.open(io.BytesIO(data))) for name, data in split_members(summary.split_dir) if "png" in name
    ]
    return np.stack([image.transpose(2, 0, 1).reshape(3072) for image in images])


def py3_pickle(value):
    return pickle.dumps(value, protocol=2)


def test_the_test_pickles_are_what_python_and_numpy_take_them_for():
    batch = cifar10_files()["test_batch"]
    for dumps in (py2_pickle, py3_pickle):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy 2 deprecates the old module name
            loaded = pickle.loads(dumps(batch), encoding="bytes")
        assert loaded.keys() == batch.keys() and loaded[b"labels"] == batch[b"labels"]
        np.testing.assert_array_equal(loaded[b"data"], batch[b"data"])
    assert b"numpy.core.multiarray" in py2_pickle(batch) and b"_codecs\nencode" in py3_pickle(batch)


def fortran_pickle(value):
    return py3_pickle({key: np.asfortranarray(item) if key == b"data" else item for key, item in value.items()})


@pytest.mark.parametrize("dumps", [py2_pickle, py3_pickle, fortran_pickle, pickle.dumps])
def test_cifar10_keeps_pixels_labels_and_names(tmp_path, dumps):
    files = cifar10_files()
    write_cifar(tmp_path / "data/cifar-10-batches-py", files, dumps)
    train = pack(tmp_path / "data/cifar-10-batches-py", tmp_path / "out")
    test = pack(tmp_path / "data", tmp_path / "out", split="test")

    assert (train.kind, train.num_samples, test.num_samples) == ("cifar", 15, 3)
    expected = np.concatenate([files[f"data_batch_{n}"][b"data"] for n in range(1, 6)])
    np.testing.assert_array_equal(pixels_of(train), expected)
    np.testing.assert_array_equal(pixels_of(test), files["test_batch"][b"data"])
    assert names(train.split_dir)[:4:2] == ["airplane_s_000000.png", "automobile_s_000001.png"]
    assert [label for _, label in webdataset_rows(test)] == [0, 1, 2]
    assert (tmp_path / "out/classnames.txt").read_text() == "airplane\nautomobile\nbird\n"


@pytest.mark.parametrize("coarse", [False, True])
def test_cifar100_archive_is_read_as_downloaded(tmp_path, coarse):
    files = cifar100_files()
    write_cifar(tmp_path / "cifar-100-python", files)
    archive = tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "cifar-100-python", "cifar-100-python")
    seen = []
    summary = pack(archive, tmp_path / "out", coarse=coarse, on_progress=lambda *args: seen.append(args))

    np.testing.assert_array_equal(pixels_of(summary), files["train"][b"data"])
    assert names(summary.split_dir)[::2] == ["same.png", "same-2.png", "2.png", "3.png"]
    labels = [int(data) for name, data in split_members(summary.split_dir) if name.endswith(".cls")]
    assert labels == ([2, 1, 0, 0] if coarse else [1, 0, 1, 0])
    assert summary.classes == (("fruit", "fish", "x") if coarse else ("apple", "aquarium fish"))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def attacks(target):
    """Pickles that would act, each by another way in."""
    path = str(target).encode()
    array = b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01K\x01\x85"
    return {
        "reduce": pickle.dumps({b"label_names": Evil(target)}, protocol=2),
        "inst": b"(S'" + path + b"'\nios\nmkdir\n.",
        "stack_global": b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93\x8c" + bytes([len(path)]) + path + b"\x85R.",
        "dotted": b"\x80\x04\x8c\x05numpy\x8c\x0ddtype.__new__\x93.",
        "numpy_helper": b"cnumpy.testing._private.utils\nrunstring\n(S'" + path + b"'\n}tR.",
        "object_array": array + b"cnumpy\ndtype\n(S'O8'\ntR\x89]tb.",
        "patch_stand_in": b"cnumpy\ndtype\nN}S'__init__'\nNs\x86b.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"Pos\n.",
        "truncated": b"\x80\x02}(U",
        "list": b"].",
    }


@pytest.mark.parametrize("attack", attacks("x"))
def test_pickles_that_are_no_cifar_are_refused_unexecuted(tmp_path, attack):
    source = write_cifar(tmp_path / "src", cifar10_files())
    target = tmp_path / "pwned"
    (source / "batches.meta").write_bytes(attacks(target)[attack])
    with pytest.raises(SourceError, match=r"batches\.meta is no CIFAR file") as caught:
        pack(source, tmp_path / "out")
    assert not target.exists() and not (tmp_path / "out").exists()
    if attack == "reduce":
        assert "refused: it asks for posix.mkdir" in str(caught.value)
    (source / "batches.meta").write_bytes(py2_pickle(cifar10_files()["batches.meta"]))
    assert pack(source, tmp_path / "out").num_samples == 15  # nothing in the process was bent


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({b"labels": [0, 1]}, "3 images, 2 labels, 3 filenames"),
        ({b"labels": [0, 1, 3]}, "label 3 is none of the 3 classes"),
        ({b"labels": [0, 1, b"2"]}, "'labels' is no list of integers"),
        ({b"data": np.zeros((3, 3071), np.uint8)}, r"no uint8 array 'data' of shape \[N, 3072\]"),
        ({b"data": b"pixels"}, r"no uint8 array 'data' of shape \[N, 3072\]"),
        ({b"filenames": 5}, "'filenames' is no list of names"),
    ],
)
def test_damaged_cifar_names_the_batch(tmp_path, change, message):
    files = cifar10_files()
    files["data_batch_4"] |= change
    with pytest.raises(SourceError, match=f"data_batch_4: {message}"):
        pack(write_cifar(tmp_path / "src", files), tmp_path / "out")


def test_cifar_usage_errors(tmp_path):
    source = write_cifar(tmp_path / "src", cifar10_files())
    with pytest.raises(UsageError, match="'train' and 'test'"):
        pack(source, tmp_path / "out", split="val")
    with pytest.raises(UsageError, match="no coarse labels"):
        pack(source, tmp_path / "out", coarse=True)
    with pytest.raises(UsageError, match="brings its class names"):
        pack(source, tmp_path / "out", classnames=source / "x")
    (source / "data_batch_3").unlink()
    with pytest.raises(SourceError, match="data_batch_3 missing"):
        pack(source, tmp_path / "out")
    with pytest.raises(SourceError, match="no readable tar archive"):
        pack(write(tmp_path / "x.tar.gz", b"\x1f\x8b not really"), tmp_path / "out")
    write_cifar(tmp_path / "src", cifar100_files())
    with pytest.raises(SourceError, match=r"holds batches\.meta and meta"):
        pack(source, tmp_path / "out")


# --- tables


def table(folder, text, name="list.csv"):
    for number in range(4):
        write(folder / f"images/{number}.png", encoded(number))
    return write(folder / name, text if isinstance(text, bytes) else text.encode())


def labels_of(summary):
    return {name[:-4]: int(data) for name, data in split_members(summary.split_dir) if name.endswith(".cls")}


def test_table_with_names_captions_and_missing_files(tmp_path):
    caption = 'Two, "quoted",\r\nlines – naïve ☃'
    text = (
        "\ufeffPath,label,caption,url\r\n"
        f'images/0.png,hot_dog,"{caption.replace(chr(34), chr(34) * 2)}",u\r\n'
        "images/gone.png,cat,plain,u\r\n"
        "\r\n"
        f"{tmp_path}/src/images/1.png, cat ,,u\r\n"
        "images/2.png,,no label,u\r\n"
        "images/3.png,cat,an unquoted, comma,u\r\n"
        ",cat,no path,u\r\n"
        "../src/images/3.png,cat,up,u\r\n"
        "images/0.png,cat,again,u\r\n"
    )
    summary = pack(table(tmp_path / "src", text), tmp_path / "out")
    absolute = f"{str(tmp_path)[1:]}/src/images/1"
    assert labels_of(summary) == {
        "images/0": 1,
        absolute: 0,
        "_/src/images/3": 0,
        "images/0-2": 0,
    }
    found = dict(split_members(summary.split_dir))
    assert found["images/0.txt"].decode() == caption and f"{absolute}.txt" not in found
    assert names(summary.split_dir)[:3] == ["images/0.png", "images/0.cls", "images/0.txt"]
    assert rejects(summary) == {
        "images/gone.png": "line 4: No such file or directory",
        "images/2.png": "line 7: no label, where other rows have one",
        "images/3.png": "line 8: 5 fields under 4 columns",
        "": "line 9: no path",
    }
    assert summary.num_samples + summary.num_rejects == 8
    assert summary.notes == ("columns ignored: url",)
    assert summary.classes == ("cat", "hot dog")
    assert len(webdataset_rows(summary)) == 4
    assert job_samples(summary)[0].caption == caption


def test_tsv_with_integer_labels_and_no_names(tmp_path):
    text = "path\tlabel\nimages/0.png\t2\nimages/1.png\t0.0\nimages/2.png\t\n"
    summary = pack(table(tmp_path / "src", text, "list.tsv"), tmp_path / "out")
    assert labels_of(summary) == {"images/0": 2, "images/1": 0}
    assert summary.num_rejects == 1 and summary.classes == ()
    assert not (tmp_path / "out/classnames.txt").exists()


def test_captions_alone_make_image_text_pairs(tmp_path):
    summary = pack(table(tmp_path / "src", "path,caption,label\nimages/0.png,a cat,\n"), tmp_path / "out")
    assert split_members(summary.split_dir) == [("images/0.png", encoded(0)), ("images/0.txt", b"a cat")]


def test_table_labels_against_given_names(tmp_path):
    listing = write(tmp_path / "names.txt", b"0\n1\nhot dog\n")
    by_name = table(tmp_path / "src", "path,label\nimages/0.png,hot_dog\nimages/1.png,1\n")
    assert labels_of(pack(by_name, tmp_path / "a", classnames=listing)) == {"images/0": 2, "images/1": 1}
    by_index = table(tmp_path / "src", "path,label\nimages/0.png,2\nimages/1.png,1\n")
    assert labels_of(pack(by_index, tmp_path / "b", classnames=listing)) == {"images/0": 2, "images/1": 1}
    with pytest.raises(ClassesError, match=r"labels 'bat' are not, or not once, among the 3"):
        pack(table(tmp_path / "src", "path,label\nimages/0.png,bat\n"), tmp_path / "c", classnames=listing)
    for bad in ("3", "-1"):
        with pytest.raises(ClassesError, match=rf"label {bad} is outside 0\.\.2; count labels from zero"):
            pack(
                table(tmp_path / "src", f"path,label\nimages/0.png,{bad}\n"),
                tmp_path / "c",
                classnames=listing,
            )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.png,1\n", r"no column path in its header \['file', 'label'\]"),
        ("", "no column path"),
        ("path;label\na.png;1\n", r"no column path in its header \['path;label'\]"),
        ("path,label,label\na.png,1,1\n", "two columns 'label'"),
        (
            'path,caption\nimages/0.png,"open\nimages/1.png,x\n',
            "line 3: unexpected end of data; mend the quoting",
        ),
        ('path\tcaption\nimages/0.png\t"hello" she said\n', "line 2: .*mend the quoting"),
        ("path\nimages/ü.png\n".encode("latin-1"), "not UTF-8"),
        ("path\nimages/0.png\n".encode("utf-16"), "not UTF-8"),
    ],
)
def test_tables_that_cannot_be_read_are_refused_before_writing(tmp_path, text, message):
    source = table(tmp_path / "src", text, "list.tsv" if "\t" in str(text) else "list.csv")
    with pytest.raises(SourceError, match=message):
        pack(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- shards


def test_shards_respect_both_limits(tmp_path):
    """Counted by hand: a tar has 512 bytes a header, 1024 more for a name beyond ASCII, records of 10240."""
    source = tmp_path / "src/c"
    for number in range(18):
        write(source / f"a{number:02}.jpg", bytes([number]) * 100)  # 2 x 1024: nine by their number
    for number in range(16):
        write(source / f"b{number:02}.jpg", bytes([number]) * 3000)  # 3584 + 1024: eight
    for number in range(12):
        write(source / f"ü{number:02}.jpg", bytes([number]) * 3000)  # 4608 + 2048: six, to the last byte
    write(source / "ü.jpg", b"x" * 90_000)
    summary = pack(tmp_path / "src", tmp_path / "out", max_samples=9, max_bytes=40_960)
    tars = [summary.split_dir / f"{number}.tar" for number in range(summary.num_shards)]
    assert [len(members(path)) // 2 for path in tars] == [9, 9, 8, 8, 1, 6, 6]
    sizes = [path.stat().st_size for path in tars]
    assert sizes == [20_480, 20_480, 40_960, 40_960, 102_400, 40_960, 40_960]
    assert summary.num_bytes == sum(sizes) and summary.num_samples == 47
    assert (summary.split_dir / "nshards.txt").read_text() == "7\n"
    assert len(list(summary.split_dir.glob("*.tar"))) == 7


def test_equal_sources_give_equal_bytes(tmp_path):
    first, second = class_folder(tmp_path / "a"), tmp_path / "b"
    for path in sorted(first.rglob("*.png"), reverse=True):
        os.utime(write(second / path.relative_to(first), path.read_bytes()), (1, 1))
    write(first / "cat/x.txt", b"")
    write(second / "cat/x.txt", b"")
    pack(first, tmp_path / "out1", max_samples=2)
    pack(second, tmp_path / "out2", max_samples=2)
    assert digests(tmp_path / "out1") == digests(tmp_path / "out2")
    with tarfile.open(tmp_path / "out1/train/0.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


KILLED = """
import os, signal, sys
from clipindex.packing import pack
def on_progress(num_done, num_total):
    if num_done == 25:
        os.kill(os.getpid(), signal.SIGKILL)
pack(sys.argv[1], sys.argv[2], max_samples=10, overwrite=len(sys.argv) > 3, on_progress=on_progress)
"""


def run_killed(*args):
    root = Path(clipindex.packing.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, args)],
        env=os.environ | {"PYTHONPATH": str(root)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL


def test_a_killed_pack_shows_no_half_shard_and_mixes_with_nothing(tmp_path):
    source = class_folder(tmp_path / "src", num_each=20)
    write(source / "cat/a.txt", b"")
    split_dir = tmp_path / "out/train"
    run_killed(source, tmp_path / "out")

    assert sorted(path.name for path in split_dir.iterdir() if not path.name.endswith(".tmp")) == [
        "0.tar",
        "1.tar",
    ]
    assert len(list(split_dir.iterdir())) == 4  # and the third shard and the rejects under way
    assert [len(members(split_dir / f"{n}.tar")) for n in range(2)] == [20, 20]
    with pytest.raises(UsageError, match=r"an unfinished pack \(no nshards.txt\); --overwrite"):
        pack(source, tmp_path / "out", max_samples=10)

    pack(source, tmp_path / "out", max_samples=10, overwrite=True)
    pack(source, tmp_path / "fresh", max_samples=10)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")

    run_killed(source, tmp_path / "out", "overwrite")  # a kill over a finished pack leaves none that says finished
    assert not (split_dir / "nshards.txt").exists()


def test_an_error_halfway_leaves_no_temporary_file(tmp_path):
    source = class_folder(tmp_path / "src")
    write(source / "cat/a.txt", b"")

    def stop(num_done, num_total):
        if num_done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "out", max_samples=2, on_progress=stop)
    assert [path.name for path in (tmp_path / "out/train").iterdir()] == ["0.tar"]


def test_a_finished_split_is_replaced_only_when_told(tmp_path):
    source = class_folder(tmp_path / "src")
    write(source / "cat/a.txt", b"")
    pack(source, tmp_path / "out", max_samples=2)
    before = digests(tmp_path / "out")
    with pytest.raises(UsageError, match="a finished pack"):
        pack(source, tmp_path / "out")
    assert digests(tmp_path / "out") == before

    (source / "cat/a.txt").unlink()
    other = class_folder(tmp_path / "other", ("ant", "bee"))
    pack(other, tmp_path / "out", overwrite=True)
    pack(other, tmp_path / "fresh")
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")

    write(tmp_path / "out/train/mine.tar", b"")
    with pytest.raises(UsageError, match=r"mine\.tar is not pack's to replace"):
        pack(other, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/train/0.tar").exists()


def test_two_packs_at_once_do_not_mix(tmp_path):
    source = class_folder(tmp_path / "src")
    refused = []

    def again(num_done, num_total):
        with pytest.raises(UsageError, match="another pack is writing it") as caught:
            pack(source, tmp_path / "out", overwrite=True)
        refused.append(caught.value)

    assert pack(source, tmp_path / "out", on_progress=again).num_samples == len(refused) == 6


def test_a_second_split_must_have_the_classes_of_the_first(tmp_path):
    pack(class_folder(tmp_path / "train"), tmp_path / "out")
    pack(class_folder(tmp_path / "test", num_each=1), tmp_path / "out", split="test")
    fewer = class_folder(tmp_path / "fewer", ("dog",))
    with pytest.raises(ClassesError, match=r"its 2 classes are not the source's 1: line 1 is 'cat', not 'dog'"):
        pack(fewer, tmp_path / "out", split="val")
    with pytest.raises(ClassesError, match="line 1 is 'cat', not 'dog'"):  # the other splits still need them
        pack(fewer, tmp_path / "out", split="test", overwrite=True)
    summary = pack(fewer, tmp_path / "out", split="val", classnames=tmp_path / "out/classnames.txt")
    assert labels_of(summary) == {"dog/img0": 1, "dog/img1": 1, "dog/img2": 1}
    numbers = table(tmp_path / "csv", "path,label\nimages/0.png,2\n")
    with pytest.raises(ClassesError, match="has 2 classes, the source a label 2"):
        pack(numbers, tmp_path / "out", split="more")
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir() and any(path.iterdir())) == [
        "test",
        "train",
        "val",
    ]


def test_templates_are_kept_given_or_checked(tmp_path):
    source = class_folder(tmp_path / "src")
    given = ["a blurry photo of a {c}.", "{c}"]
    prompts = tmp_path / "out/zeroshot_classification_templates.txt"
    pack(source, tmp_path / "out", templates=given)
    assert prompts.read_text() == "a blurry photo of a {c}.\n{c}\n"
    pack(source, tmp_path / "out", split="test")
    assert prompts.read_text() == "a blurry photo of a {c}.\n{c}\n"
    with pytest.raises(UsageError, match="holds other templates"):
        pack(source, tmp_path / "out", split="val", templates=["{c}"])
    for bad in (["a photo"], ["a {c} {d}"], ["two\n{c}"], []):
        with pytest.raises(ClassesError, match="template"):
            pack(source, tmp_path / "bad", templates=bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "../up"}, "name a folder"),
        ({"split": ".hidden"}, "name a folder"),
        ({"max_samples": 0}, "at least 1"),
        ({"max_bytes": 0}, "at least 1"),
        ({"coarse": True}, "CIFAR-100's"),
        ({"kind": "parquet"}, "kind 'parquet'"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        pack(class_folder(tmp_path / "src"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_sources_that_are_not_there_or_of_no_kind(tmp_path):
    with pytest.raises(SourceError, match="no such file or folder"):
        pack(tmp_path / "gone", tmp_path / "out")
    with pytest.raises(UsageError, match="give a folder, CIFAR's"):
        pack(write(tmp_path / "x.zip", b""), tmp_path / "out")
    with pytest.raises(UsageError, match="cannot be made"):
        pack(class_folder(tmp_path / "src"), write(tmp_path / "file", b""))


def test_progress_counts_samples_and_rejects(tmp_path):
    source = class_folder(tmp_path / "src")
    write(source / "cat/a.txt", b"")
    seen = []
    pack(source, tmp_path / "out", max_samples=2, on_progress=lambda *args: seen.append(args))
    assert seen == [(number, 7) for number in range(1, 8)]


def test_packing_loads_no_torch():
    root = Path(clipindex.packing.__file__).parents[2]
    code = "import sys, clipindex.packing; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(root)}, check=True)
