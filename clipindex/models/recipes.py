"""Names to recipes: which architecture, weights, activation, preprocessing and tokenizer a user's words mean.

Nothing is built here and no weights are read; every contradiction and every gap that open_clip would fill
with a guess ends here as an error.
"""

import difflib
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import open_clip
import open_clip.model
import open_clip.pretrained
import timm

from clipindex.errors import ModelError
from clipindex.models import hf_clip
from clipindex.models.checkpoints import (
    WEIGHT_SUFFIXES,
    Config,
    Files,
    Folder,
    HubRepo,
    Tensors,
    find_weights,
    hub_obstacle,
    read_json,
)
from clipindex.types import ModelSpec

log = logging.getLogger(__name__)

LOCAL_DIR_PREFIX = "local-dir:"
HUB_PREFIX = "hf-hub:"
DEMO_NAME = "demo"
DEMO_DIR = Path(__file__).resolve().parents[1] / "demo_data" / "model"

_OPEN_CLIP_CONFIG = "open_clip_config.json"
_OPEN_CLIP_WEIGHTS = (  # open_clip's own order of preference
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
_PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode", "fill_color")
# Fields that change training, or how a tower is filled, but not what it computes once its weights are loaded.
_WITHOUT_EFFECT = {
    "vision_cfg": ("patch_dropout", "timm_drop", "timm_drop_path", "timm_model_pretrained", "output_tokens"),
    "text_cfg": ("hf_model_pretrained", "output_tokens"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything needed to build a model, whatever it was called."""

    spec: ModelSpec
    """As asked for, with local paths made absolute."""
    origin: str
    """How messages name the architecture's source."""
    model_cfg: Config
    """open_clip's, with `quick_gelu` decided."""
    preprocess_cfg: Config = field(default_factory=dict)
    """open_clip's keys, where they are known; its defaults hold for the rest."""
    weights: tuple[Path, ...] = ()
    """Files to read, none for random weights."""
    convert: Callable[[Tensors], Tensors] | None = None
    """Renames tensors of another layout."""
    may_resize: bool = False
    """Whether position embeddings of another length are interpolated, as open_clip does for its own tags."""
    tokenizer: str | None = None
    """Source of a Hugging Face tokenizer; None for CLIP's own byte-pair encoding."""


def canonical_architecture(model_cfg: Config) -> Config:
    """An architecture spelled one way: defaults and fields without effect on features left out.

    Raises:
        ModelError: a field that open_clip does not know.
    """
    towers: Config = {}
    for key, known in (("vision_cfg", open_clip.CLIPVisionCfg), ("text_cfg", open_clip.CLIPTextCfg)):
        try:
            tower = asdict(known(**model_cfg[key]))
            defaults = asdict(known())
        except TypeError as error:
            raise ModelError(f"{key}: {error}; this version of open_clip does not know it, upgrade it") from error
        tower["mlp_width"] = int(tower["width"] * tower.pop("mlp_ratio"))
        # Only what is not the default: a field that a later open_clip adds must not rename every model.
        towers[key] = {
            name: value
            for name, value in tower.items()
            if name not in _WITHOUT_EFFECT[key] and (name not in defaults or value != defaults[name])
        }
    size = towers["vision_cfg"].get("image_size", open_clip.CLIPVisionCfg().image_size)
    towers["vision_cfg"]["image_size"] = [size, size] if isinstance(size, int) else list(size)
    extra = {"multimodal_cfg": model_cfg["multimodal_cfg"]} if "multimodal_cfg" in model_cfg else {}
    return {
        "embed_dim": model_cfg["embed_dim"],
        "quick_gelu": bool(model_cfg.get("quick_gelu", False)),
        **towers,
        **extra,
    }


def resolve(spec: ModelSpec) -> Recipe:
    """What a user's words mean.

    Raises:
        ModelError: nothing is called so, the words contradict each other or the checkpoint's own config, or
            they leave open what must not be guessed.
    """
    if spec.pretrained is not None and spec.random_init is not None:
        raise ModelError(f"{spec.name}: both weights ({spec.pretrained}) and a random seed asked for; give one of them")
    architecture = spec.name.replace("/", "-")
    if architecture in open_clip.list_models():
        return _from_architecture(replace(spec, name=architecture), architecture)
    files, spec = _files_of(spec)
    if spec.pretrained is not None:
        raise ModelError(
            f"{spec.name} brings its own weights, so --pretrained {spec.pretrained} contradicts it; leave "
            "that out, or name an architecture"
        )
    return _from_files(spec, files)


def _files_of(spec: ModelSpec) -> tuple[Files, ModelSpec]:
    name = spec.name
    if name.startswith(HUB_PREFIX):
        return HubRepo(repo=name.removeprefix(HUB_PREFIX)), spec
    path = DEMO_DIR if name == DEMO_NAME else Path(name.removeprefix(LOCAL_DIR_PREFIX)).expanduser().absolute()
    if path.is_dir():
        # Kept absolute, so that embeddings made here can name their model from anywhere on this machine.
        known_as = DEMO_NAME if name == DEMO_NAME else LOCAL_DIR_PREFIX + str(path)
        return Folder(path=path), replace(spec, name=known_as)
    if name == DEMO_NAME or name.startswith(LOCAL_DIR_PREFIX):
        raise ModelError(f"{path}: no such directory; give a directory that holds a model's config and weights")
    raise ModelError(_unknown_architecture(name))


def _unknown_architecture(name: str) -> str:
    known = {model.lower(): model for model in open_clip.list_models()}
    close = [known[match] for match in difflib.get_close_matches(name.lower(), known, n=5, cutoff=0.5)]
    nearest = f"; nearest names: {', '.join(close)}" if close else ""
    backbone = f"; for timm's backbone say timm:{name}" if timm.is_model(name.partition(".")[0]) else ""
    hub = f"; for a Hugging Face repository say {HUB_PREFIX}{name}" if name.count("/") == 1 else ""
    return f"{name}: neither an architecture of open_clip's nor a directory{nearest}{backbone}{hub}"


def _from_files(spec: ModelSpec, files: Files) -> Recipe:
    if spec.random_init is not None and not isinstance(files, Folder):
        raise ModelError(f"{files.origin} brings its own weights; leave the random seed out, or name an architecture")
    path = files.get(_OPEN_CLIP_CONFIG)
    if path is not None:
        recipe = _from_open_clip_layout(spec, files, path)
    else:
        path = files.get("config.json")
        if path is None:
            raise ModelError(
                f"{files.origin}: holds neither {_OPEN_CLIP_CONFIG} nor config.json; give an open_clip "
                "export or a transformers CLIP"
            )
        recipe = _from_transformers_layout(spec, files, path)
    if recipe.weights and spec.random_init is not None:
        raise ModelError(f"{files.origin} holds weights ({recipe.weights[0].name}); leave the random seed out")
    if not recipe.weights and spec.random_init is None:
        raise ModelError(f"{files.origin}: a config but no weights; add {_OPEN_CLIP_WEIGHTS[0]} beside it")
    return recipe


def _from_open_clip_layout(spec: ModelSpec, files: Files, path: Path) -> Recipe:
    config = read_json(path)
    model_cfg = config.get("model_cfg")
    if not isinstance(model_cfg, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= model_cfg.keys():
        raise ModelError(f"{path}: no model_cfg with embed_dim, vision_cfg and text_cfg; export the model again")
    # A directory must hold its own tokenizer files; a repository names where they are.
    tokenizer = model_cfg["text_cfg"].get("hf_tokenizer_name") or None
    if tokenizer and isinstance(files, Folder):
        tokenizer = str(files.path)
    # In this format a missing quick_gelu means false.
    stated = bool(model_cfg.get("quick_gelu", False))
    return Recipe(
        spec=spec,
        origin=str(path),
        model_cfg=model_cfg | {"quick_gelu": _agreed_quick_gelu(spec, stated, str(path))},
        preprocess_cfg=config.get("preprocess_cfg") or {},
        weights=find_weights(files, _OPEN_CLIP_WEIGHTS),
        tokenizer=tokenizer,
    )


def _from_transformers_layout(spec: ModelSpec, files: Files, path: Path) -> Recipe:
    model_cfg = hf_clip.to_open_clip_config(read_json(path), str(path))
    hf_clip.check_tokenizer(files)
    return Recipe(
        spec=spec,
        origin=str(path),
        model_cfg=model_cfg | {"quick_gelu": _agreed_quick_gelu(spec, model_cfg["quick_gelu"], str(path))},
        preprocess_cfg=hf_clip.to_open_clip_preprocess(files, model_cfg["vision_cfg"]["image_size"]),
        weights=find_weights(files, hf_clip.WEIGHT_NAMES),
        convert=hf_clip.to_open_clip_tensors,
    )


def _from_architecture(spec: ModelSpec, name: str) -> Recipe:
    model_cfg = open_clip.get_model_config(name)
    recipe = Recipe(
        spec=spec,
        origin=name,
        model_cfg=model_cfg,
        tokenizer=model_cfg["text_cfg"].get("hf_tokenizer_name") or None,
    )
    if spec.random_init is not None:
        quick_gelu = model_cfg.get("quick_gelu", False) if spec.quick_gelu is None else spec.quick_gelu
        return _with_activation(recipe, quick_gelu, _agreed_preprocess(name))
    if spec.pretrained is None:
        raise ModelError(
            f"{name}: no weights named, and random ones are never taken unasked; give --pretrained with "
            f"{_tags(name)} or a weights file, or --random-init SEED"
        )
    tag = open_clip.pretrained.get_pretrained_cfg(name, spec.pretrained)
    return _from_tag(recipe, name, tag) if tag else _from_weights_file(recipe, name, Path(spec.pretrained))


def _with_activation(recipe: Recipe, quick_gelu: bool, preprocess_cfg: Config) -> Recipe:
    model_cfg = recipe.model_cfg | {"quick_gelu": quick_gelu}
    return replace(recipe, model_cfg=model_cfg, preprocess_cfg=preprocess_cfg)


def _from_tag(recipe: Recipe, name: str, tag: Config) -> Recipe:
    # A tag that says quick_gelu records how its weights were trained, so it overrules the architecture's name
    # (plain ViT-B-32 with OpenAI's weights): the other activation only loses accuracy. A silent tag records
    # nothing (roberta-ViT-B-32 was trained with QuickGELU and its tag does not say so): there the
    # architecture's file holds.
    stated = bool(tag.get("quick_gelu") or recipe.model_cfg.get("quick_gelu", False))
    quick_gelu = _agreed_quick_gelu(recipe.spec, stated, f"{name} with --pretrained {recipe.spec.pretrained}")
    source = tag.get("hf_hub") or tag.get("url")
    repo, _, file = tag.get("hf_hub", "").rpartition("/")
    if repo and (why := hub_obstacle(repo, [file] if file else _OPEN_CLIP_WEIGHTS)):
        raise ModelError(
            f"{name}: the weights {recipe.spec.pretrained} are not cached, and the Hugging Face Hub does not answer "
            f"for {source} ({why}); check the network, or fetch them elsewhere and give the file as --pretrained"
        )
    try:
        path = Path(open_clip.pretrained.download_pretrained(tag))
    except Exception as error:  # urllib, the Hub's client and open_clip itself each raise their own kinds
        raise ModelError(
            f"{name}: cannot download the weights {recipe.spec.pretrained} from {source} ({error}); check "
            "the network, or fetch them elsewhere and give the file as --pretrained"
        ) from error
    return replace(_with_activation(recipe, quick_gelu, tag), weights=(path,), may_resize=True)


def _from_weights_file(recipe: Recipe, name: str, path: Path) -> Recipe:
    path = path.expanduser().absolute()
    if not path.is_file():
        what = "no such file" if path.suffix in WEIGHT_SUFFIXES else "neither a file nor a known tag"
        raise ModelError(f"{name}: {recipe.spec.pretrained}: {what}; known: {_tags(name)}")
    if path.suffix not in WEIGHT_SUFFIXES:
        raise ModelError(f"{path}: not a kind of weights file that is read here; give {', '.join(WEIGHT_SUFFIXES)}")
    spec = replace(recipe.spec, pretrained=str(path))
    beside = _config_beside(path, recipe.model_cfg)
    if beside is None:
        quick_gelu = _said_quick_gelu(spec, name, recipe.model_cfg)
        twin = f"{name}-quickgelu"
        preprocess_cfg = _agreed_preprocess(twin if quick_gelu and twin in open_clip.list_models() else name)
    else:
        config_path, stated, preprocess_cfg = beside
        if stated is False and recipe.model_cfg.get("quick_gelu"):
            raise ModelError(f"{config_path} says quick_gelu false, but {name} means true; name the other architecture")
        quick_gelu = _agreed_quick_gelu(spec, stated, str(config_path))
    return replace(_with_activation(recipe, quick_gelu, preprocess_cfg), spec=spec, weights=(path,))


def _config_beside(path: Path, model_cfg: Config) -> tuple[Path, bool, Config] | None:
    """The config beside a weights file, where there is one: its path, quick_gelu and preprocess_cfg."""
    folder = Folder(path=path.parent)
    ours = folder.get(_OPEN_CLIP_CONFIG)
    if ours is not None:
        config = read_json(ours)
        theirs = config.get("model_cfg") or {}
        if not _same_shape(theirs, model_cfg):
            raise ModelError(
                f"{ours} describes another architecture than the one asked for, so {path.name} is not of "
                f"that architecture; give {LOCAL_DIR_PREFIX}{folder.path} to use it, or move the file "
                "elsewhere"
            )
        return ours, bool(theirs.get("quick_gelu", False)), config.get("preprocess_cfg") or {}
    foreign = folder.get("config.json")
    stated = None if foreign is None else hf_clip.quick_gelu_of(read_json(foreign))
    if foreign is None or stated is None:
        return None
    return foreign, stated, hf_clip.to_open_clip_preprocess(folder, model_cfg["vision_cfg"]["image_size"])


def _same_shape(theirs: Config, ours: Config) -> bool:
    if not {"embed_dim", "vision_cfg", "text_cfg"} <= theirs.keys():
        return False
    activation = {"quick_gelu": False}
    return canonical_architecture(theirs | activation) == canonical_architecture(ours | activation)


def _agreed_quick_gelu(spec: ModelSpec, stated: bool, by: str) -> bool:
    if spec.quick_gelu is not None and spec.quick_gelu != stated:
        option = "--quick-gelu" if spec.quick_gelu else "--no-quick-gelu"
        raise ModelError(
            f"{by} says quick_gelu {str(stated).lower()}, which {option} contradicts; leave the option out"
        )
    return stated


def _said_quick_gelu(spec: ModelSpec, name: str, model_cfg: Config) -> bool:
    """The activation of a weights file that says nothing itself."""
    if "quick_gelu" in model_cfg:
        return _agreed_quick_gelu(spec, bool(model_cfg["quick_gelu"]), name)
    if spec.quick_gelu is not None:
        return spec.quick_gelu
    # The wrong one loads without a complaint and costs several points of accuracy, so it is not guessed.
    if f"{name}-quickgelu" in open_clip.list_models():
        raise ModelError(
            f"{spec.pretrained}: {name} exists with two activations and nothing beside the file says which "
            "one these weights were trained with; say --quick-gelu (OpenAI's, DFN's, MetaCLIP's) or "
            "--no-quick-gelu (most others)"
        )
    return False


def _tags(name: str) -> str:
    tags = open_clip.list_pretrained_tags_by_model(name)
    return ", ".join(tags) if tags else "no tags (open_clip has none for this architecture)"


def _agreed_preprocess(name: str) -> Config:
    """What all known tags of an architecture agree on, key by key.

    open_clip takes OpenAI's mean and shortest-edge resizing for a weights file of any architecture, SigLIP's
    too.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    known: list[Mapping[str, Any]] = [open_clip.pretrained.get_pretrained_cfg(name, tag) for tag in tags]
    agreed: Config = {}
    for key in _PREPROCESS_KEYS:
        values = {cfg[key] for cfg in known if key in cfg}
        if len(values) == 1:
            agreed[key] = values.pop()
        elif values:
            log.warning("%s: its published weights differ in %s; using open_clip's default", name, key)
    return agreed
