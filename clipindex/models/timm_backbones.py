"""Plain image backbones by their timm names: pooled features, without a text tower.

Preprocessing is that of timm's own inference transform (timm.data.create_transform of resolve_data_config).
"""

import difflib
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants
from timm.data import resolve_data_config

from clipindex.errors import ModelError
from clipindex.models.checkpoints import WEIGHT_SUFFIXES, hub_obstacle, read_json, read_tensors
from clipindex.models.weights import drawing, fill, fingerprint
from clipindex.types import ModelInfo, ModelSpec, Preprocess

log = logging.getLogger(__name__)

TIMM_PREFIX = "timm:"
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def load_backbone(spec: ModelSpec) -> tuple[torch.nn.Module, ModelInfo]:
    """Load a backbone without its classifier.

    Args:
        spec: `timm:ARCHITECTURE` or `timm:ARCHITECTURE.TAG`; the weights are those of the tag, else of `pretrained` (a
            tag or a file), else timm's default for the architecture, which the record then names.

    Returns:
        A module whose `visual` gives pooled features [N, D] of pixels [N, 3, H, W]: fp32, on the CPU, in eval mode.

    Raises:
        ModelError: timm knows no such model, cannot build or fetch it, or the weights do not fit it.
    """
    named = _resolve(spec)
    name = named.name.removeprefix(TIMM_PREFIX)
    try:
        cfg = timm.get_pretrained_cfg(name).to_dict()
        visual, cfg = _from_file(named, name, cfg) if named.pretrained else (_build(named, name), cfg)
        preprocess = _preprocess(named.name, cfg)
    except (TypeError, ValueError, KeyError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{named.name}: its config cannot be understood ({error})") from error
    visual.eval().requires_grad_(False)
    model = torch.nn.Module()
    model.visual = visual
    info = ModelInfo(
        spec=named,
        fingerprint=fingerprint({"timm": name.partition(".")[0]}, model.state_dict(), preprocess),
        dim=_dim(visual, preprocess),
        features="pooled",
        preprocess=preprocess,
        logit_scale=1.0,
        logit_bias=None,
    )
    return model, info


def _resolve(spec: ModelSpec) -> ModelSpec:
    """The same model by architecture, tag and file."""
    architecture, dot, tag = spec.name.removeprefix(TIMM_PREFIX).partition(".")
    if dot and not tag:
        raise ModelError(f"{spec.name}: no weights after the dot; leave it out for timm's default ones")
    if not timm.is_model(architecture):
        nearest = difflib.get_close_matches(architecture.lower(), timm.list_models(), n=5, cutoff=0.5)
        raise ModelError(
            f"{spec.name}: timm {timm.__version__} has no such model"
            + (f"; nearest names: {', '.join(nearest)}" if nearest else "")
        )
    if spec.quick_gelu is not None:
        raise ModelError(f"{spec.name}: quick_gelu is a choice of open_clip's architectures; leave the option out")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ModelError(f"{spec.name}: no such weights; timm has {', '.join(tags) or 'none'} for {architecture}")
    if spec.random_init is not None:
        if spec.pretrained is not None or tag:
            raise ModelError(
                f"{spec.name}: both weights ({spec.pretrained or tag}) and a random seed asked for; give one of them"
            )
        return spec
    if spec.pretrained is None or spec.pretrained in tags:
        return _by_tag(spec, architecture, tag, tags)
    path = Path(spec.pretrained).expanduser().absolute()
    if not path.is_file() or path.suffix not in WEIGHT_SUFFIXES:
        raise ModelError(
            f"{spec.name}: {spec.pretrained} is neither a file ({', '.join(WEIGHT_SUFFIXES)}) nor a known tag;"
            f" known: {', '.join(tags) or 'none'}"
        )
    return replace(spec, pretrained=str(path))


def _by_tag(spec: ModelSpec, architecture: str, tag: str, tags: list[str]) -> ModelSpec:
    if tag and spec.pretrained not in (None, tag):
        raise ModelError(f"{spec.name} names its weights, so --pretrained {spec.pretrained} contradicts it")
    chosen = tag or spec.pretrained or timm.get_pretrained_cfg(architecture).tag
    if chosen not in tags:
        raise ModelError(
            f"{spec.name}: timm has no weights for it; give --pretrained with a file, or --random-init SEED"
        )
    if not tag and spec.pretrained is None:
        log.info("%s: timm's default weights, %s", spec.name, chosen)
    return replace(spec, name=f"{TIMM_PREFIX}{architecture}.{chosen}", pretrained=None)


def _build(spec: ModelSpec, name: str, *, fetch: bool | None = None) -> torch.nn.Module:
    fetch = spec.random_init is None if fetch is None else fetch
    if fetch:
        _check_reachable(spec, name)
    with drawing(spec.random_init):
        try:
            model: torch.nn.Module = timm.create_model(name, pretrained=fetch, num_classes=0)
        except Exception as error:  # the Hub's client, urllib and timm's models each raise their own kinds
            if fetch:
                remedy = "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "check the network"
                raise ModelError(
                    f"{spec.name}: cannot fetch its weights ({type(error).__name__}: {error}); {remedy}, or"
                    " fetch them elsewhere and give the file as --pretrained"
                ) from error
            raise ModelError(f"{spec.name}: timm cannot build it ({type(error).__name__}: {error})") from error
    return model.float()


def _check_reachable(spec: ModelSpec, name: str) -> None:
    cfg = timm.get_pretrained_cfg(name)
    files = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else _HUB_FILES
    if cfg.hf_hub_id and (why := hub_obstacle(cfg.hf_hub_id, files)):
        raise ModelError(
            f"{spec.name}: its weights are not cached, and the Hugging Face Hub does not answer ({why}); check the"
            " network, or fetch them elsewhere and give the file as --pretrained"
        )


def _from_file(spec: ModelSpec, name: str, cfg: dict[str, Any]) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model with a file's weights; its classifier's are left out, and a config.json beside it is heard."""
    assert spec.pretrained is not None
    path = Path(spec.pretrained)
    beside = path.parent / "config.json"
    stated = read_json(beside) if beside.is_file() else {}
    architecture = name.partition(".")[0]
    if stated.get("architecture") not in (None, architecture):
        raise ModelError(f"{beside} is of {stated['architecture']}, not of {architecture}; name that one")
    if isinstance(stated.get("pretrained_cfg"), Mapping):
        cfg = cfg | dict(stated["pretrained_cfg"])
    else:
        log.info("%s: preprocessing of timm's %s", spec.pretrained, ".".join(filter(None, (architecture, cfg["tag"]))))
    visual = _build(spec, name, fetch=False)
    classifiers = [cfg["classifier"]] if isinstance(cfg["classifier"], str) else list(cfg["classifier"] or ())
    tensors = {
        key: tensor
        for key, tensor in read_tensors([path]).items()
        if not any(key.startswith(f"{classifier}.") for classifier in classifiers)
    }
    fill(visual, tensors, f"{path} does not fit {spec.name}")
    return visual, cfg


def _dim(visual: torch.nn.Module, preprocess: Preprocess) -> int:
    """Of the features of an image, which no attribute of all of timm's models tells."""
    with torch.inference_mode():
        features = visual(torch.zeros(1, 3, *preprocess.size))
    return int(features.shape[-1])


def _preprocess(name: str, cfg: dict[str, Any]) -> Preprocess:
    data = resolve_data_config({}, pretrained_cfg=cfg)
    channels, height, width = data["input_size"]
    mode, interpolation = data["crop_mode"], data["interpolation"]
    if channels != 3 or mode not in ("center", "squash") or interpolation not in ("bicubic", "bilinear"):
        raise ModelError(
            f"{name}: preprocessing with {channels} channels, crop {mode!r} and {interpolation!r} is not one that is"
            " done here; bicubic and bilinear, center and squash are"
        )
    scaled = math.floor(height / data["crop_pct"]), math.floor(width / data["crop_pct"])
    if mode == "center" and scaled[0] != scaled[1]:
        raise ModelError(f"{name}: a centre crop of {height} x {width} is not done here; take a model of square input")
    return Preprocess(
        size=(height, width),
        resize_mode="squash" if mode == "squash" else "shortest",
        interpolation=interpolation,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        resize_size=scaled,
    )
