"""What is shipped, read with nothing of clipindex: plain open_clip, the standard library and Pillow."""

import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
DATA = ROOT / "clipindex" / "demo_data"


@pytest.fixture(scope="module")
def model():
    loaded, _, transform = open_clip.create_model_and_transforms(f"local-dir:{DATA / 'model'}")
    return loaded.eval(), transform, open_clip.get_tokenizer(f"local-dir:{DATA / 'model'}")


def samples(name):
    for path in sorted((DATA / name / "test").glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for member, data in members.items():
            if not member.endswith((".cls", ".txt", ".json")):
                yield member, data, members


def accuracy(model, name):
    network, transform, tokenizer = model
    lines = {file: (DATA / name / file).read_text().splitlines() for file in
             ("classnames.txt", "zeroshot_classification_templates.txt")}  # fmt: skip
    images, labels = [], []
    for member, data, members in samples(name):
        images.append(transform(Image.open(io.BytesIO(data))))
        labels.append(int(members[member.rsplit(".", 1)[0] + ".cls"]))
    assert 0 <= min(labels) <= max(labels) < len(lines["classnames.txt"])
    with torch.inference_mode():
        classes = []
        for name in lines["classnames.txt"]:
            prompts = [t.replace("{c}", name) for t in lines["zeroshot_classification_templates.txt"]]
            vectors = network.encode_text(tokenizer(prompts), normalize=True).mean(dim=0)
            classes.append(vectors / vectors.norm())
        found = network.encode_image(torch.stack(images), normalize=True) @ torch.stack(classes).T
    return (found.argmax(dim=1).numpy() == np.array(labels)).mean(), set(labels)


def test_the_model_is_small():
    assert sum(path.stat().st_size for path in (DATA / "model").iterdir()) <= 6_000_000
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) <= 9_000_000


def test_held_out_digits(model):
    assert accuracy(model, "wds_digits")[0] >= 0.95


def test_pairs_that_training_never_showed(model, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "jobs"))
    spec = importlib.util.spec_from_file_location("demo_scenes", ROOT / "jobs" / "demo_scenes.py")
    scenes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scenes)
    share, labels = accuracy(model, "wds_shapes")
    assert share >= 0.80
    assert labels == set(scenes.HELD_OUT)
    assert not labels & set(scenes.TRAINING)
    assert (DATA / "wds_shapes" / "classnames.txt").read_text().splitlines() == scenes.CLASS_NAMES


def test_every_photograph_says_whose_it_is():
    licences = (DATA / "LICENSES.md").read_text()
    found = list(samples("wds_photos"))
    assert len({Image.open(io.BytesIO(data)).format for _, data, _ in found}) >= 3
    assert {Image.open(io.BytesIO(data)).mode for _, data, _ in found} >= {"RGB", "L", "P", "RGBA"}
    for member, _, members in found:
        about = json.loads(members[member.rsplit(".", 1)[0] + ".json"])
        assert about["author"].split(",")[0] in licences
        assert about["licence"].removeprefix("CC ") in licences
        assert members[member.rsplit(".", 1)[0] + ".txt"]


def test_the_assets_can_be_made_again(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "jobs"))
    monkeypatch.setattr(sys, "argv", ["demo_assets.py", "--out", str(tmp_path)])
    import demo_assets

    demo_assets.main()
    for name in ("wds_digits", "wds_shapes", "wds_photos"):
        with (
            tarfile.open(tmp_path / name / "test" / "0.tar") as ours,
            tarfile.open(DATA / name / "test" / "0.tar") as shipped,
        ):
            assert ours.getnames() == shipped.getnames()
