"""Recipes to loaded models: built, filled with exactly their weights, described and fingerprinted.

open_clip's own `create_model` is not used: it warns and goes on where weights are missing, resizes position
embeddings unasked, and takes OpenAI's preprocessing and the architecture's activation for any weights it is
given.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import open_clip
import open_clip.convert
import open_clip.model
import open_clip.tokenizer
import open_clip.transform
import torch

from clipindex.errors import ModelError
from clipindex.models.checkpoints import Config, Tensors, read_tensors
from clipindex.models.hf_clip import is_transformers_layout
from clipindex.models.projection import projected_width
from clipindex.models.recipes import Recipe, canonical_architecture, resolve
from clipindex.models.timm_backbones import TIMM_PREFIX, load_backbone
from clipindex.models.weights import drawing, fill, fingerprint
from clipindex.store import check_fingerprint
from clipindex.types import ModelInfo, ModelSpec, Preprocess

log = logging.getLogger(__name__)

Tokenize = Callable[[Sequence[str]], torch.Tensor]
"""Texts to token numbers, int64 [N, context length]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model ready to be taken apart into towers."""

    model: torch.nn.Module
    """Both towers: fp32, on the CPU, in eval mode, no gradients."""
    info: ModelInfo
    """What every embedding of this model shares."""
    pre_projection: ModelInfo | None
    """The same of its features before the projection; None where there are none."""
    tokenize: Tokenize
    """Texts to int64 token numbers [N, context length]; the tokenizer is built at the first call."""

    def before_projection(self) -> ModelInfo:
        """`pre_projection`.

        Raises:
            ModelError: there are none.
        """
        if self.pre_projection is None:
            raise ModelError(
                f"{self.info.spec.name}: its image tower ends in no projection, so there are no features before it;"
                " leave --features out"
            )
        return self.pre_projection


def load_model(spec: ModelSpec, *, pre_projection: bool = False) -> LoadedModel:
    """Load any model that open_clip can represent, or a backbone of timm's.

    Args:
        spec: An architecture of open_clip's with a pretrained tag, a weights file or a seed;
            `hf-hub:ORG/REPO` or a directory, in open_clip's or transformers' layout; `timm:BACKBONE`; or 'demo'.
        pre_projection: Let `info` be of the features before the projection.

    Returns:
        The model, its description and its tokenizer. The global random state is left as it was.

    Raises:
        ModelError: anything that keeps the weights from being exactly the ones asked for, used as they were
            trained; or there is no projection.
    """
    loaded = _load_backbone(spec) if spec.name.startswith(TIMM_PREFIX) else _load_clip(spec)
    return replace(loaded, info=loaded.before_projection()) if pre_projection else loaded


def load_model_of(folder: Path, found: ModelInfo, spec: ModelSpec | None = None) -> LoadedModel:
    """Load the model that made a directory's embeddings.

    Args:
        folder: The directory.
        found: What it says of its model.
        spec: How to load it, where what it says does not lead to the weights on this machine.

    Raises:
        ModelError: as `load_model`.
        FingerprintError: it is another model.
    """
    loaded = load_model(spec or found.spec, pre_projection=found.features == "pre-projection")
    check_fingerprint(folder, found, loaded.info)
    return loaded


def _load_backbone(spec: ModelSpec) -> LoadedModel:
    model, info = load_backbone(spec)

    def tokenize(texts: Sequence[str]) -> torch.Tensor:
        raise ModelError(f"{spec.name} knows no texts")

    return LoadedModel(model=model, info=info, pre_projection=None, tokenize=tokenize)


def _load_clip(spec: ModelSpec) -> LoadedModel:
    try:
        recipe = resolve(spec)
        model = _build(recipe)
        preprocess = _preprocess(model, recipe)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        if isinstance(error, ModelError):
            raise
        # A config may hold any JSON at all; what it means by that only its author knows.
        raise ModelError(f"{spec.name}: its config cannot be understood ({type(error).__name__}: {error})") from error
    if recipe.weights:
        _fit(model, recipe)
    model.eval().requires_grad_(False)
    scale, bias = model.logit_scale, model.logit_bias
    info = ModelInfo(
        spec=recipe.spec,
        fingerprint=_fingerprint(recipe, model, preprocess),
        dim=recipe.model_cfg["embed_dim"],
        preprocess=preprocess,
        logit_scale=float(scale.exp()),
        logit_bias=None if bias is None else float(bias),
    )
    return LoadedModel(
        model=model, info=info, pre_projection=_before_projection(model, info), tokenize=_lazy_tokenize(recipe)
    )


def _before_projection(model: open_clip.CLIP, info: ModelInfo) -> ModelInfo | None:
    width = projected_width(model.visual)
    if width is None:
        return None
    identity = hashlib.sha256(f"{info.fingerprint} pre-projection".encode()).hexdigest()
    return replace(info, dim=width, fingerprint=identity, features="pre-projection")


def _fingerprint(recipe: Recipe, model: torch.nn.Module, preprocess: Preprocess) -> str:
    # One tower class prefixes its text weights and the other does not.
    weights = {name.removeprefix("text."): tensor for name, tensor in model.state_dict().items()}
    return fingerprint(canonical_architecture(recipe.model_cfg), weights, preprocess)


def _build(recipe: Recipe) -> open_clip.CLIP:
    config = deepcopy(recipe.model_cfg)
    # Either would fetch ImageNet or language-model weights that the checkpoint overwrites at once.
    config["vision_cfg"]["timm_model_pretrained"] = False
    config["text_cfg"]["hf_model_pretrained"] = False
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    kind = open_clip.CLIP
    if custom:
        kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    with drawing(recipe.spec.random_init):
        try:
            return kind(**config).float()
        except Exception as error:  # open_clip asserts, and timm and transformers raise their own kinds
            raise ModelError(_cannot_build(recipe, error)) from error


def _cannot_build(recipe: Recipe, error: Exception) -> str:
    message = f"{recipe.origin}: open_clip cannot build this architecture ({type(error).__name__}: {error})"
    text_tower = recipe.model_cfg["text_cfg"].get("hf_model_name")
    if text_tower:
        message += f"; its text tower needs pip install transformers, and {text_tower} from the Hugging Face Hub"
    return message


def _fit(model: open_clip.CLIP, recipe: Recipe) -> None:
    tensors = read_tensors(recipe.weights)
    file = recipe.weights[0]
    if recipe.convert is not None:
        tensors = recipe.convert(tensors)
    elif is_transformers_layout(tensors):
        raise ModelError(f"{file}: weights in transformers' layout; give local-dir:{file.parent} with its config.json")
    tensors = _in_spelling_of(model, tensors)
    if recipe.may_resize:
        open_clip.model.resize_pos_embed(tensors, model)
        open_clip.model.resize_text_pos_embed(tensors, model)
    fill(model, tensors, f"{file} does not fit {recipe.origin}")


def _in_spelling_of(model: open_clip.CLIP, tensors: Tensors) -> Tensors:
    """Undo differences of spelling between versions of open_clip; no number changes."""
    tensors = open_clip.convert.convert_state_dict(model, tensors)
    expected = model.state_dict()
    if "positional_embedding" in tensors and "text.positional_embedding" in expected:
        tensors = open_clip.model.convert_to_custom_text_state_dict(tensors)
    for name in ("logit_scale", "logit_bias"):  # a scalar or a vector of one
        if name in tensors and name in expected and tensors[name].numel() == 1:
            tensors[name] = tensors[name].reshape(expected[name].shape)
    return {name: t for name, t in tensors.items() if name in expected or not name.endswith(".position_ids")}


def _preprocess(model: open_clip.CLIP, recipe: Recipe) -> Preprocess:
    config = open_clip.transform.merge_preprocess_dict(open_clip.transform.PreprocessCfg(), recipe.preprocess_cfg)
    # As in open_clip: the pixels that the tower takes, whatever size the config names.
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    mode, interpolation = config["resize_mode"], config["interpolation"]
    if mode not in ("shortest", "longest", "squash") or interpolation not in (
        "bicubic",
        "bilinear",
        "random",
    ):
        raise ModelError(f"{recipe.origin}: preprocessing {mode!r} with {interpolation!r} is not one of open_clip's")
    # open_clip ignores the interpolation in two cases: 'random' means bicubic outside training, and its
    # resize of the shortest edge to a target that is not square is always bicubic.
    if interpolation == "random" or (mode == "shortest" and height != width):
        interpolation = "bicubic"
    return Preprocess(
        size=(int(height), int(width)),
        resize_mode=mode,
        interpolation=interpolation,
        mean=_per_channel(config["mean"]),
        std=_per_channel(config["std"]),
        fill_color=int(config["fill_color"]),
    )


def _per_channel(value: float | Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (value,) * 3 if isinstance(value, (int, float)) else value
    return float(red), float(green), float(blue)


def _lazy_tokenize(recipe: Recipe) -> Tokenize:
    """A tokenize function that builds its tokenizer when first called, and holds no model."""
    text_cfg, source = recipe.model_cfg["text_cfg"], recipe.tokenizer

    @cache
    def tokenizer() -> open_clip.SimpleTokenizer:
        return _make_tokenizer(text_cfg, source)

    def tokenize(texts: Sequence[str]) -> torch.Tensor:
        tokens: torch.Tensor = tokenizer()(list(texts))
        _warn_of_truncation(tokenizer(), texts, tokens)
        return tokens

    return tokenize


def _make_tokenizer(text_cfg: Config, source: str | None) -> open_clip.SimpleTokenizer:
    """The tokenizer that open_clip.get_tokenizer would choose."""
    context_length = text_cfg.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    options = text_cfg.get("tokenizer_kwargs") or {}
    if source is None:
        return open_clip.SimpleTokenizer(context_length=context_length, **options)
    mode = text_cfg.get("tokenizer_mode")
    try:
        return open_clip.tokenizer.HFTokenizer(source, context_length=context_length, tokenizer_mode=mode, **options)
    except ImportError as error:
        raise ModelError(
            f"{source}: this model's tokenizer needs more packages ({error}); pip install transformers"
        ) from error
    except Exception as error:  # transformers and the Hub's client each raise their own kinds
        raise ModelError(
            f"{source}: cannot load this model's tokenizer ({type(error).__name__}: {error}); put its "
            "tokenizer files there, or check the network. Embedding images does not need it"
        ) from error


def _warn_of_truncation(tokenizer: open_clip.SimpleTokenizer, texts: Sequence[str], tokens: torch.Tensor) -> None:
    length = tokens.shape[1]
    # A token stands for at least one byte, so most texts need no second look.
    for row, text in enumerate(texts):
        if len(text.encode()) + 2 <= length:
            continue
        longer = tokenizer([text], context_length=length + 1)[0]
        # With room for one more token, a text that was cut shows another one where its end had been put.
        if not torch.equal(longer[:length], tokens[row]):
            log.warning("text %d is cut to %d tokens: %.80r", row, length, text)
            return
