"""Hugging Face transformers' CLIP layout (`openai/clip-vit-base-patch32`) mapped onto open_clip's CLIP.

The mapping follows the two public definitions, `transformers/models/clip/modeling_clip.py` and
`open_clip/transformer.py`; it gives the same numbers or refuses. The transformers package is not needed.
"""

import gzip
import re
from collections.abc import Mapping, Sequence

import open_clip
import torch
from open_clip.tokenizer import default_bpe

from clipindex.errors import ModelError
from clipindex.models.checkpoints import Config, Files, Tensors, read_json

WEIGHT_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# Defaults of transformers' CLIPTextConfig, CLIPVisionConfig and CLIPImageProcessor: files may leave them out.
_TEXT_DEFAULTS: Config = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
_VISION_DEFAULTS: Config = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_PROCESSOR_DEFAULTS: Config = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": open_clip.OPENAI_DATASET_MEAN,
    "image_std": open_clip.OPENAI_DATASET_STD,
}

_QUICK_GELU = {"quick_gelu": True, "gelu": False}
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's Image.Resampling numbers
_VOCABULARY = 49408
_END_OF_TEXT = 49407
_OPEN_CLIP_EPS = 1e-5

_INSTEAD = {
    "siglip": "open_clip's export of the same weights, such as hf-hub:timm/ViT-B-16-SigLIP",
    "siglip2": "open_clip's export of the same weights, such as hf-hub:timm/ViT-B-16-SigLIP2-256",
    "metaclip_2": "open_clip's architecture ViT-H-14-worldwide with --pretrained metaclip2_worldwide",
    "clip_vision_model": "a repository with both towers (model_type 'clip')",
    "clip_text_model": "a repository with both towers (model_type 'clip')",
}

_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
        (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
        (r"^text_model\.final_layer_norm\.", "ln_final."),
        (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
        (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
        (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
        (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
        (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),  # the misspelling is the layout's own
        (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
        (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
        (r"^text_projection\.weight$", "text_projection"),
        (r"^visual_projection\.weight$", "visual.proj"),
        (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
        (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
        (r"\.layer_norm([12])\.", r".ln_\1."),
        (r"\.mlp\.fc1\.", ".mlp.c_fc."),
        (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    )
)
_TRANSPOSED = (
    "text_projection",
    "visual.proj",
)  # Linear weights [out, in] here, plain matrices [in, out] there


def is_transformers_layout(names: Mapping[str, object]) -> bool:
    """Whether a state dict's names are those of this layout."""
    return any(name.startswith(("text_model.", "vision_model.")) for name in names)


def quick_gelu_of(config: Config) -> bool | None:
    """What a config.json says of the activation; None where it is not a CLIP's or names another one."""
    if config.get("model_type") != "clip":
        return None
    return _QUICK_GELU.get(_section(config, "vision", _VISION_DEFAULTS)["hidden_act"])


def to_open_clip_config(config: Config, origin: str) -> Config:
    """Open_clip's model_cfg of a transformers CLIP.

    Args:
        config: The parsed config.json.
        origin: How messages name it.

    Returns:
        `embed_dim`, `quick_gelu`, `vision_cfg` and `text_cfg` as open_clip's CLIP takes them.

    Raises:
        ModelError: another kind of model, or a feature that open_clip's CLIP cannot represent.
    """
    _refuse_other_models(config, origin)
    text = _section(config, "text", _TEXT_DEFAULTS)
    vision = _section(config, "vision", _VISION_DEFAULTS)
    _check(origin, "vision num_channels", vision["num_channels"], vision["num_channels"] == 3)
    for key in ("image_size", "patch_size"):
        _check(origin, f"vision {key}", vision[key], isinstance(vision[key], int))
    _check(origin, "text vocab_size", text["vocab_size"], text["vocab_size"] == _VOCABULARY)
    # transformers pools at the highest token for the historical eos_token_id 2, and at the first eos_token_id
    # otherwise. CLIP's end of text is its highest token, so for 49407 both are open_clip's argmax; for any
    # other number transformers would pool a token that stands elsewhere.
    _check(origin, "text eos_token_id", text["eos_token_id"], text["eos_token_id"] in (2, _END_OF_TEXT))
    heads = vision["num_attention_heads"]
    _check(origin, "vision num_attention_heads", heads, vision["hidden_size"] % heads == 0)
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": _activation(origin, text, vision),
        "vision_cfg": _tower(vision)
        | {
            "head_width": vision["hidden_size"] // heads,
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        "text_cfg": _tower(text)
        | {
            "heads": text["num_attention_heads"],
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
        },
    }


def to_open_clip_tensors(tensors: Tensors) -> Tensors:
    """Rename a transformers CLIP's state dict to open_clip's names, in-projections stacked as q, k, v.

    Names that the layout does not have pass through unchanged, so that whoever loads them reports them.
    """
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(".position_ids"):
            continue
        for pattern, replacement in _RENAMES:
            name = pattern.sub(replacement, name)
        renamed[name] = tensor.t() if name in _TRANSPOSED else tensor
    for name in [n for n in renamed if ".attn.q." in n]:
        parts = [name.replace(".attn.q.", f".attn.{letter}.") for letter in "qkv"]
        if all(part in renamed for part in parts):
            renamed[name.replace(".attn.q.", ".attn.in_proj_")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def to_open_clip_preprocess(files: Files, image_size: int) -> Config:
    """Open_clip's preprocess_cfg of the image processor saved beside a model.

    Args:
        files: Where preprocessor_config.json (or processor_config.json, which newer versions write) may lie;
            without either, CLIPImageProcessor's defaults hold, which are open_clip's.
        image_size: Height and width in pixels that the model takes.

    Raises:
        ModelError: a chain of steps other than resize, centre crop, scale by 1/255 and normalise.
    """
    found = _image_processor(files)
    if found is None:
        return {}
    origin, stated = found
    config = _PROCESSOR_DEFAULTS | stated
    kind = str(stated.get("image_processor_type") or stated.get("feature_extractor_type") or "CLIP")
    _check(origin, "image_processor_type", kind, kind.startswith("CLIP"))
    for step in ("do_resize", "do_rescale"):
        _check(origin, step, config[step], config[step])
    _check(origin, "rescale_factor", config["rescale_factor"], abs(config["rescale_factor"] * 255 - 1) < 1e-6)
    _check(origin, "resample", config["resample"], config["resample"] in _INTERPOLATIONS)
    return {
        "resize_mode": _resize_mode(origin, config, image_size),
        "interpolation": _INTERPOLATIONS[config["resample"]],
        "mean": tuple(config["image_mean"]) if config["do_normalize"] else (0.0, 0.0, 0.0),
        "std": tuple(config["image_std"]) if config["do_normalize"] else (1.0, 1.0, 1.0),
    }


def check_tokenizer(files: Files) -> None:
    """Make sure that a model's tokenizer files, where there are any, are CLIP's standard byte-pair encoding.

    Raises:
        ModelError: merges or vocabulary differ from open_clip's, so its token numbers would mean other words.
    """
    merges, vocabulary = files.get("merges.txt"), files.get("vocab.json")
    whole = files.get("tokenizer.json")
    if merges is not None:
        lines = merges.read_text(encoding="utf-8").splitlines()
        _check_merges(str(merges), [line for line in lines if line and not line.startswith("#version")])
    if vocabulary is not None:
        _check_vocabulary(str(vocabulary), read_json(vocabulary))
    if whole is not None:
        bpe = read_json(whole).get("model") or {}
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe.get("merges") or ()]
        _check_merges(str(whole), pairs)
        _check_vocabulary(str(whole), bpe.get("vocab") or {})


def _check(origin: str, name: str, value: object, holds: bool) -> None:
    if not holds:
        raise ModelError(
            f"{origin}: {name} {value!r} cannot be represented by open_clip's CLIP with the same numbers; "
            "use an open_clip export of this model (a directory with open_clip_config.json)"
        )


def _refuse_other_models(config: Config, origin: str) -> None:
    kind = config.get("model_type")
    if kind != "clip":
        instead = _INSTEAD.get(str(kind), "an open_clip export of it (a directory with open_clip_config.json)")
        raise ModelError(f"{origin}: model_type {kind!r} is not a transformers CLIP; use {instead}")


def _section(config: Config, tower: str, defaults: Config) -> Config:
    section = defaults | (config.get(f"{tower}_config") or {})
    legacy = config.get(f"{tower}_config_dict")
    # Old files carry a second copy; transformers lets it win, filled up with defaults, over the first.
    return section if legacy is None else section | defaults | legacy


def _activation(origin: str, text: Config, vision: Config) -> bool:
    names = {text["hidden_act"], vision["hidden_act"]}
    _check(origin, "hidden_act", sorted(names), len(names) == 1 and names <= _QUICK_GELU.keys())
    return _QUICK_GELU[names.pop()]


def _tower(section: Config) -> Config:
    width, mlp_width = section["hidden_size"], section["intermediate_size"]
    tower: Config = {"width": width, "layers": section["num_hidden_layers"], "mlp_ratio": mlp_width / width}
    # open_clip floors width * ratio; half a unit keeps rounding from losing the last one.
    if int(width * tower["mlp_ratio"]) != mlp_width:
        tower["mlp_ratio"] = (mlp_width + 0.5) / width
    if section["layer_norm_eps"] != _OPEN_CLIP_EPS:
        tower["norm_kwargs"] = {"eps": section["layer_norm_eps"]}
    return tower


def _image_processor(files: Files) -> tuple[str, Config] | None:
    path = files.get("preprocessor_config.json")
    if path is not None:
        return str(path), read_json(path)
    path = files.get("processor_config.json")
    nested = read_json(path).get("image_processor") if path is not None else None
    return (str(path), nested) if isinstance(nested, dict) else None


def _edges(size: object) -> tuple[int | None, tuple[int, int] | None]:
    """The shortest edge, or the fixed height and width, that a processor's `size` asks for."""
    if isinstance(size, int):
        return size, None
    if isinstance(size, dict) and size.keys() == {"shortest_edge"}:
        return size["shortest_edge"], None
    if isinstance(size, dict) and size.keys() == {"height", "width"}:
        return None, (size["height"], size["width"])
    return None, None


def _resize_mode(origin: str, config: Config, image_size: int) -> str:
    square = (image_size, image_size)
    shortest, fixed = _edges(config["size"])
    if fixed is not None:
        _check(origin, "size", config["size"], fixed == square)
        return "squash"
    _check(origin, "size", config["size"], shortest == image_size)
    _check(origin, "do_center_crop", config["do_center_crop"], config["do_center_crop"])
    crop_edge, crop = _edges(config["crop_size"])
    _check(origin, "crop_size", config["crop_size"], crop_edge == image_size or crop == square)
    return "shortest"


def _check_merges(origin: str, merges: Sequence[str]) -> None:
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as stream:
        # open_clip uses the lines after the header up to the size of its vocabulary: 49152 less bytes and
        # specials.
        standard = stream.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    _check_standard(origin, list(merges) == standard)


def _check_vocabulary(origin: str, vocabulary: Mapping[str, int]) -> None:
    standard = open_clip.SimpleTokenizer().encoder
    # The two special tokens are spelled differently; their numbers are the last two in both.
    words = {word: number for word, number in standard.items() if number < _END_OF_TEXT - 1}
    _check_standard(origin, all(vocabulary.get(word) == number for word, number in words.items()))


def _check_standard(origin: str, holds: bool) -> None:
    if not holds:
        raise ModelError(
            f"{origin}: not CLIP's standard byte-pair encoding, the only one used for this layout; use an "
            "open_clip export of this model (a directory with open_clip_config.json)"
        )
