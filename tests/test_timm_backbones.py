"""Backbones by their timm names: weights, pooled features and pixels are timm's own."""

import io
import json
import logging
import time

import numpy as np
import pytest
import timm
import torch
from corpus import encoded, picture
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config

from clipindex.decode import decode_image
from clipindex.encode import ImageTower, TextTower
from clipindex.errors import ModelError
from clipindex.models import load_model
from clipindex.types import ModelSpec

CPU = torch.device("cpu")
NAMES = ["test_resnet", "test_vit", "test_convnext"]


def pixels_of(data, preprocess):
    out = np.zeros((*preprocess.size, 3), np.uint8)
    decode_image(data, preprocess, out)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_a_plain_timm_loop(tmp_path, name):
    theirs = timm.create_model(name, pretrained=False).eval()
    save_file({key: t.contiguous() for key, t in theirs.state_dict().items()}, tmp_path / "weights.safetensors")
    loaded = load_model(ModelSpec(name=f"timm:{name}", pretrained=str(tmp_path / "weights.safetensors")))
    photographs = [encoded(picture(500, 375, seed=seed), quality=95) for seed in range(4)]
    transform = create_transform(**resolve_model_data_config(theirs), is_training=False)
    with torch.inference_mode():
        pixels = torch.stack([transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in photographs])
        raw = theirs.forward_head(theirs.forward_features(pixels), pre_logits=True)
    found = ImageTower(loaded, device=CPU, precision="fp32").encode(
        np.stack([pixels_of(data, loaded.info.preprocess) for data in photographs])
    )
    assert (loaded.info.features, loaded.info.dim) == ("pooled", raw.shape[1])
    np.testing.assert_allclose(found.norms, raw.norm(dim=1), rtol=1e-2)
    assert (found.unit * torch.nn.functional.normalize(raw).numpy()).sum(1).min() > 0.9999


@pytest.mark.parametrize("crop", [{"crop_pct": 0.9, "crop_mode": "center"}, {"crop_pct": 0.8, "crop_mode": "squash"},
                                  {"crop_pct": 1.0, "crop_mode": "squash"}])  # fmt: skip
@pytest.mark.parametrize(("form", "mode"), [("JPEG", "RGB"), ("PNG", "P"), ("PNG", "RGBA")])
def test_pixels_are_those_of_timms_transform(tmp_path, crop, form, mode):
    theirs = timm.create_model("test_vit", pretrained=False)
    save_file({key: t.contiguous() for key, t in theirs.state_dict().items()}, tmp_path / "w.safetensors")
    cfg = theirs.pretrained_cfg | crop | {"interpolation": "bilinear"}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit", "pretrained_cfg": cfg}))
    plan = load_model(ModelSpec(name="timm:test_vit", pretrained=str(tmp_path / "w.safetensors"))).info.preprocess
    image = picture(640, 400).convert(mode)
    file = io.BytesIO()
    image.save(file, form, quality=95)
    transform = create_transform(**resolve_model_data_config(theirs, pretrained_cfg=cfg), is_training=False)
    pixels = transform(Image.open(io.BytesIO(file.getvalue())).convert("RGB")).numpy()
    mean, std = (np.array(one).reshape(3, 1, 1) for one in (cfg["mean"], cfg["std"]))
    expected = ((pixels * std + mean) * 255).transpose(1, 2, 0)
    assert np.abs(pixels_of(file.getvalue(), plan) - expected).max() <= 2.001


def test_random_weights_are_drawn_from_the_seed_and_the_name_is_all_that_differs():
    first, again, other = (load_model(ModelSpec(name="timm:test_vit", random_init=seed)).info for seed in (1, 1, 2))
    assert first == again
    assert first.fingerprint != other.fingerprint


def test_weights_are_timms_default_unless_they_are_named(monkeypatch, caplog):
    asked = []

    def create_model(name, pretrained, **options):
        asked.append((name, pretrained))
        return real(name, pretrained=False, **options)

    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    caplog.set_level(logging.INFO, "clipindex")
    for name, pretrained in (("resnet18", None), ("resnet18.tv_in1k", None), ("resnet18", "tv_in1k")):
        info = load_model(ModelSpec(name=f"timm:{name}", pretrained=pretrained)).info
        assert (info.spec.name, info.spec.pretrained) == (f"timm:{asked[-1][0]}", None)
    default = timm.get_pretrained_cfg("resnet18").tag
    assert asked == [(f"resnet18.{default}", True), ("resnet18.tv_in1k", True), ("resnet18.tv_in1k", True)]
    assert f"timm:resnet18: timm's default weights, {default}" in caplog.text


def test_without_network_what_is_not_cached_is_said_at_once_and_what_is_gets_loaded(tmp_path, monkeypatch):
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nobody + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    spec = ModelSpec(name="timm:test_vit.r160_in1k")
    started = time.monotonic()
    with pytest.raises(
        ModelError, match="its weights are not cached, and the Hugging Face Hub does not answer .*refused"
    ):
        load_model(spec)
    assert time.monotonic() - started < 10  # 23 s by the Hub's client
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ModelError, match="cannot fetch its weights .*; unset HF_HUB_OFFLINE"):
            load_model(spec)

    theirs = timm.create_model("test_vit", pretrained=False)
    repo = tmp_path / "models--timm--test_vit.r160_in1k"
    for part in ("refs", "snapshots/0a1b2c"):
        (repo / part).mkdir(parents=True)
    (repo / "refs" / "main").write_text("0a1b2c")
    save_file(
        {key: t.contiguous() for key, t in theirs.state_dict().items()}, repo / "snapshots/0a1b2c/model.safetensors"
    )
    found = load_model(spec).model.visual.state_dict()
    assert all(torch.equal(found[name], theirs.state_dict()[name]) for name in found)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "timm:resnet5"}, "no such model; nearest names: .*resnet50"),
        ({"name": "timm:RESNET50"}, "nearest names: .*resnet50"),
        ({"name": "timm:resnet50."}, "no weights after the dot"),
        ({"name": "timm:resnet50.", "random_init": 1}, "no weights after the dot"),
        ({"name": "resnet50", "random_init": 1}, "for timm's backbone say timm:resnet50"),
        ({"name": "timm:resnet50.nope"}, "no such weights; timm has a1_in1k"),
        ({"name": "timm:resnet50.a1_in1k", "pretrained": "a2_in1k"}, "--pretrained a2_in1k contradicts it"),
        ({"name": "timm:resnet50", "pretrained": "nope"}, "neither a file .* nor a known tag; known: a1_in1k"),
        ({"name": "timm:resnet50.a1_in1k", "random_init": 0}, "both weights .a1_in1k. and a random seed"),
        ({"name": "timm:resnet50", "random_init": 0, "quick_gelu": True}, "leave the option out"),
    ],
)
def test_contradictions_and_unknown_names(spec, message):
    with pytest.raises(ModelError, match=message):
        load_model(ModelSpec(**spec))


def test_weights_of_another_architecture_are_refused(tmp_path):
    theirs = timm.create_model("test_vit", pretrained=False)
    save_file({key: t.contiguous() for key, t in theirs.state_dict().items()}, tmp_path / "w.safetensors")
    spec = ModelSpec(name="timm:test_resnet", pretrained=str(tmp_path / "w.safetensors"))
    with pytest.raises(ModelError, match="w.safetensors does not fit timm:test_resnet: .* missing"):
        load_model(spec)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
    with pytest.raises(ModelError, match="config.json is of test_vit, not of test_resnet"):
        load_model(spec)


def test_a_backbone_knows_no_texts():
    loaded = load_model(ModelSpec(name="timm:test_vit", random_init=0))
    with pytest.raises(ModelError, match="timm:test_vit: its embeddings are pooled features"):
        TextTower(loaded, device=CPU, precision="fp32")
