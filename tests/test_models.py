import gzip
import json
import logging
import random
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from open_clip import factory, pretrained
from safetensors.torch import load_file, save_file

from clipindex.errors import ModelError
from clipindex.models import load_model, recipes
from clipindex.types import ModelSpec

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
SIGLIP = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "none"},
    "text_cfg": {
        "context_length": 64,
        "vocab_size": 100,
        "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "width": 32,
        "heads": 2,
        "layers": 1,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
    },
}
HALF = (0.5, 0.5, 0.5)
SQUASH = {"mean": HALF, "std": HALF, "interpolation": "bicubic", "resize_mode": "squash"}
OPENAI = {
    "mean": open_clip.OPENAI_DATASET_MEAN,
    "std": open_clip.OPENAI_DATASET_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def build(model_cfg, seed=0):
    cfg = json.loads(json.dumps(model_cfg))
    kind = open_clip.CustomTextCLIP if cfg.pop("custom_text", False) else open_clip.CLIP
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(**cfg).eval()


def halved(model):
    """The weights rounded to what fp16 holds exactly, so that every storage dtype holds the same ones."""
    return {name: t.half().float() if t.is_floating_point() else t for name, t in model.state_dict().items()}


def write_dir(folder, model_cfg=TINY, preprocess_cfg=None, tensors=None, name="open_clip_model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg or OPENAI}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if name:
        save(tensors if tensors is not None else halved(build(model_cfg)), folder / name)
    return folder


def save(tensors, path):
    if path.suffix == ".safetensors":
        save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


def same_weights(loaded, tensors):
    state = loaded.model.state_dict()
    return state.keys() == tensors.keys() and all(torch.equal(state[name], tensors[name]) for name in state)


@pytest.fixture(scope="module")
def tensors():
    return halved(build(TINY))


@pytest.fixture
def registry(monkeypatch):
    """Tiny architectures among open_clip's own, with tags."""
    for name, config in (
        ("Tiny", TINY),
        ("Tiny-quickgelu", TINY | {"quick_gelu": True}),
        ("Plain", TINY),
        ("Says-quick", TINY | {"quick_gelu": True}),
        ("Tiny-SigLIP", SIGLIP),
    ):
        monkeypatch.setitem(factory._MODEL_CONFIGS, name, config)
    for name, tags in (
        ("Tiny", {"openai": OPENAI | {"quick_gelu": True, "hf_hub": "org/tiny/"}, "laion": OPENAI}),
        ("Tiny-quickgelu", {"openai": OPENAI | {"quick_gelu": True}}),
        ("Says-quick", {"silent": OPENAI}),
        ("Plain", {"one": SQUASH, "two": SQUASH | {"mean": (0.4, 0.4, 0.4)}}),
        ("Tiny-SigLIP", {"webli": SQUASH}),
    ):
        monkeypatch.setitem(pretrained._PRETRAINED, name, tags)


@pytest.fixture
def downloads(monkeypatch, tmp_path, tensors):
    """Let every tag download the tiny weights."""
    path = save(tensors, tmp_path / "downloaded.safetensors")
    monkeypatch.setattr(pretrained, "download_pretrained", lambda cfg, **_: str(path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


# --- ways of naming a model


@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "weights.pt", "open_clip_pytorch_model.bin", "a.pth"])
@pytest.mark.parametrize("spelling", ["local-dir:{}", "{}"])
def test_open_clip_directory_loads_exactly_its_weights(tmp_path, tensors, file, spelling):
    folder = write_dir(tmp_path / "model", tensors=tensors, name=file)
    loaded = load_model(ModelSpec(name=spelling.format(folder)))
    assert same_weights(loaded, tensors)
    assert loaded.info.spec.name == f"local-dir:{folder}"
    assert loaded.info.dim == 16
    assert loaded.info.preprocess.size == (32, 32)
    assert loaded.info.logit_scale == pytest.approx(float(tensors["logit_scale"].exp()))
    assert loaded.info.logit_bias is None
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert {t.dtype for t in loaded.model.parameters()} == {torch.float32}


def test_relative_directory_is_recorded_absolute(tmp_path, monkeypatch):
    write_dir(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert load_model(ModelSpec(name="local-dir:model")).info.spec.name == f"local-dir:{tmp_path / 'model'}"


def test_demo_is_the_shipped_directory(tmp_path, monkeypatch, tensors):
    monkeypatch.setattr(recipes, "DEMO_DIR", write_dir(tmp_path / "demo", tensors=tensors))
    loaded = load_model(ModelSpec(name="demo"))
    assert same_weights(loaded, tensors)
    assert loaded.info.spec.name == "demo"
    monkeypatch.setattr(recipes, "DEMO_DIR", tmp_path / "gone")
    with pytest.raises(ModelError, match="gone: no such directory"):
        load_model(ModelSpec(name="demo"))


def wrapped(tensors):
    return {"epoch": 3, "state_dict": {f"module.{name}": t for name, t in tensors.items()}}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_architecture_with_a_weights_file(tmp_path, registry, tensors, suffix):
    path = save(tensors, tmp_path / f"weights{suffix}")
    loaded = load_model(ModelSpec(name="Plain", pretrained=str(path)))
    assert same_weights(loaded, tensors)
    assert loaded.info.spec.pretrained == str(path)


def test_weights_linked_from_a_hub_cache(tmp_path, registry, tensors):
    save(tensors, tmp_path / "w.safetensors").rename(tmp_path / "blob")
    (tmp_path / "w.safetensors").symlink_to(tmp_path / "blob")
    path = str(tmp_path / "w.safetensors")
    assert load_model(ModelSpec(name="Plain", pretrained=path)).info.spec.pretrained == path


def test_training_checkpoints_and_old_spellings_are_read(tmp_path, registry, tensors):
    spelled = dict(tensors) | {
        "logit_scale": tensors["logit_scale"].reshape(1),
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(77),
        "vocab_size": torch.tensor(49408),
    }
    path = save(wrapped(spelled), tmp_path / "epoch_3.pt")
    assert same_weights(load_model(ModelSpec(name="Plain", pretrained=str(path))), tensors)


def test_known_tag(registry, downloads, tensors):
    loaded = load_model(ModelSpec(name="Tiny", pretrained="laion"))
    assert same_weights(loaded, tensors)
    assert loaded.info.spec == ModelSpec(name="Tiny", pretrained="laion")


def test_failed_download_names_what_was_tried(registry, monkeypatch):
    def fail(cfg, **_):
        raise FileNotFoundError("no route to host")

    monkeypatch.setattr(pretrained, "download_pretrained", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"Tiny.*openai from org/tiny/.*no route to host.*check the network"):
        load_model(ModelSpec(name="Tiny", pretrained="openai"))


def hub(monkeypatch, folder, reachable=True):
    def download(repo, name, **_):
        if not reachable:
            raise LocalEntryNotFoundError("no connection")
        if not (folder / name).is_file():
            raise EntryNotFoundError(f"404: {name}")
        return str(folder / name)

    def ask(url, **_):
        if not reachable:
            raise ConnectionError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "hf-hub:org/repo"}, "hf-hub:org/repo: cannot reach the Hugging Face Hub .*refused"),
        ({"name": "hf-hub:org/repo/more"}, "hf-hub:org/repo/more: cannot fetch .*check the repository's name"),
        (
            {"name": "Tiny", "pretrained": "openai"},
            "openai are not cached, and .* does not answer for org/tiny/ .*refused",
        ),
    ],
)
def test_a_hub_that_does_not_answer_is_not_waited_for(registry, monkeypatch, tmp_path, spec, message):
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)
    template = nobody + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(ModelError, match=message):
        load_model(ModelSpec(**spec))
    assert time.monotonic() - started < 10


def test_hub_repository(tmp_path, monkeypatch, tensors):
    folder = write_dir(tmp_path / "repo", tensors=tensors)
    hub(monkeypatch, folder)
    loaded = load_model(ModelSpec(name="hf-hub:org/repo"))
    assert same_weights(loaded, tensors)
    assert loaded.info.spec == ModelSpec(name="hf-hub:org/repo")
    assert loaded.info.fingerprint == load_model(ModelSpec(name=str(folder))).info.fingerprint


def test_unreachable_hub_is_not_taken_for_a_missing_file(tmp_path, monkeypatch):
    hub(monkeypatch, tmp_path, reachable=False)
    with pytest.raises(ModelError, match=r"hf-hub:org/repo: cannot reach the Hugging Face Hub.*HF_HUB_OFFLINE"):
        load_model(ModelSpec(name="hf-hub:org/repo"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="only what is cached.*holds neither open_clip_config.json"):
        load_model(ModelSpec(name="hf-hub:org/repo"))


def test_random_init_depends_on_the_seed_alone(registry):
    def load(seed):
        return load_model(ModelSpec(name="Tiny", random_init=seed)).info.fingerprint

    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    first = load(7)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    torch.manual_seed(2)
    assert load(7) == first
    assert load(8) != first


def test_random_init_of_a_directory_without_weights(tmp_path, caplog):
    folder = write_dir(tmp_path / "bare", name=None)
    assert load_model(ModelSpec(name=str(folder), random_init=3)).info.spec.random_init == 3
    assert not caplog.records


# --- what is refused


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ModelSpec(name="Tiny"), "no weights named.*openai, laion.*--random-init"),
        (ModelSpec(name="Tiny", pretrained="openai", random_init=0), "both weights .openai. and a random seed"),
        (ModelSpec(name="Tinny"), "Tinny: neither an architecture.*nearest names: Tiny"),
        (ModelSpec(name="openai/clip-vit-base-patch32"), "say hf-hub:openai/clip-vit-base-patch32"),
        (ModelSpec(name="Tiny", pretrained="laoin"), "laoin: neither a file nor a known tag; known: openai, laion"),
        (ModelSpec(name="Tiny", pretrained="gone.pt"), "gone.pt: no such file"),
        (ModelSpec(name="local-dir:/no/where"), "/no/where: no such directory"),
        (ModelSpec(name="hf-hub:org/repo", random_init=0), "hf-hub:org/repo brings its own weights"),
        (ModelSpec(name="hf-hub:org/repo", pretrained="openai"), "--pretrained openai contradicts it"),
    ],
)
def test_contradictions_and_unknown_names(registry, spec, message):
    with pytest.raises(ModelError, match=message):
        load_model(spec)


def test_directory_without_weights_or_with_both(tmp_path):
    bare = write_dir(tmp_path / "bare", name=None)
    with pytest.raises(ModelError, match="a config but no weights"):
        load_model(ModelSpec(name=str(bare)))
    full = write_dir(tmp_path / "full")
    with pytest.raises(ModelError, match="holds weights .open_clip_model.safetensors.; leave the random seed out"):
        load_model(ModelSpec(name=str(full), random_init=0))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty: holds neither"):
        load_model(ModelSpec(name=str(tmp_path / "empty")))


def test_ambiguous_weights_are_not_guessed(tmp_path, tensors):
    folder = write_dir(tmp_path / "model", tensors=tensors, name="epoch_1.pt")
    save(tensors, folder / "epoch_2.pt")
    with pytest.raises(ModelError, match="cannot tell which file holds the weights .epoch_1.pt, epoch_2.pt"):
        load_model(ModelSpec(name=str(folder)))


def test_architecture_that_open_clip_cannot_build(tmp_path):
    odd = write_dir(tmp_path / "odd", TINY | {"vision_cfg": TINY["vision_cfg"] | {"rotary": True}}, name=None)
    with pytest.raises(ModelError, match="odd/open_clip_config.json.*rotary"):
        load_model(ModelSpec(name=str(odd), random_init=0))


def misfits(tensors):
    rest = {name: t for name, t in tensors.items() if name != "ln_final.weight"}
    yield "missing", rest, r"1 missing \(ln_final.weight\)"
    yield "unexpected", tensors | {f"extra.{i}": torch.ones(1) for i in range(5)}, r"5 unexpected .*extra.2, \.\.\.\)"
    larger = tensors | {"visual.positional_embedding": torch.zeros(26, 32)}
    yield "shape", larger, r"1 of another shape \(visual.positional_embedding is \[26, 32\], not \[17, 32\]\)"


@pytest.mark.parametrize("kind", ["missing", "unexpected", "shape"])
def test_misfitting_weights_name_keys_file_and_architecture(tmp_path, registry, tensors, kind):
    _, wrong, message = next(case for case in misfits(tensors) if case[0] == kind)
    path = save(wrong, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=f"w.safetensors does not fit Plain: {message}"):
        load_model(ModelSpec(name="Plain", pretrained=str(path)))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_but_tensors_is_unpickled(tmp_path, registry, tensors):
    fuse = tmp_path / "exploded"
    path = save(tensors | {"bomb": Bomb(fuse)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="w.pt: holds more than tensors"):
        load_model(ModelSpec(name="Plain", pretrained=str(path)))
    assert not fuse.exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_archives_are_refused_with_the_way_out(tmp_path, registry):
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    with pytest.raises(ModelError, match=r"a TorchScript archive.*torch.jit.load\('ViT-B-32.pt'"):
        load_model(ModelSpec(name="Plain", pretrained=str(path)))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_broken_files_are_named(tmp_path, registry, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match=f"{name}: (not a readable|holds more)"):
        load_model(ModelSpec(name="Plain", pretrained=str(tmp_path / name)))


# --- activation


@pytest.mark.parametrize(
    ("name", "tag", "expected"),
    [
        ("Tiny", "openai", True),  # the tag overrules the architecture's plain name
        ("Tiny", "laion", False),
        ("Tiny-quickgelu", "openai", True),
        ("Says-quick", "silent", True),  # a silent tag leaves the architecture's own config standing
    ],
)
def test_tags_decide_the_activation(registry, downloads, name, tag, expected):
    loaded = load_model(ModelSpec(name=name, pretrained=tag))
    assert has_quick_gelu(loaded) is expected
    with pytest.raises(ModelError, match="contradicts"):
        load_model(ModelSpec(name=name, pretrained=tag, quick_gelu=not expected))


def has_quick_gelu(loaded):
    kinds = {type(m).__name__ for m in loaded.model.modules()} & {"QuickGELU", "GELU"}
    assert len(kinds) == 1
    return kinds == {"QuickGELU"}


def test_weights_file_of_an_ambiguous_architecture_must_say(tmp_path, registry, tensors):
    path = str(save(tensors, tmp_path / "w.safetensors"))
    with pytest.raises(ModelError, match="Tiny exists with two activations.*--quick-gelu"):
        load_model(ModelSpec(name="Tiny", pretrained=path))
    for said in (True, False):
        assert has_quick_gelu(load_model(ModelSpec(name="Tiny", pretrained=path, quick_gelu=said))) is said
    assert has_quick_gelu(load_model(ModelSpec(name="Tiny-quickgelu", pretrained=path)))
    assert not has_quick_gelu(load_model(ModelSpec(name="Plain", pretrained=path)))
    with pytest.raises(ModelError, match="Tiny-quickgelu says quick_gelu true, which --no-quick-gelu contradicts"):
        load_model(ModelSpec(name="Tiny-quickgelu", pretrained=path, quick_gelu=False))


@pytest.mark.parametrize("stated", [True, False])
def test_config_beside_a_weights_file_decides(tmp_path, registry, tensors, stated):
    folder = write_dir(tmp_path / "model", TINY | {"quick_gelu": stated}, SQUASH, tensors)
    path = str(folder / "open_clip_model.safetensors")
    loaded = load_model(ModelSpec(name="Tiny", pretrained=path))
    assert has_quick_gelu(loaded) is stated
    assert loaded.info.preprocess.resize_mode == "squash"
    with pytest.raises(ModelError, match=r"open_clip_config.json says quick_gelu .* contradicts"):
        load_model(ModelSpec(name="Tiny", pretrained=path, quick_gelu=not stated))
    with pytest.raises(ModelError, match="contradicts"):
        load_model(ModelSpec(name=str(folder), quick_gelu=not stated))
    wider = TINY | {"vision_cfg": TINY["vision_cfg"] | {"width": 64}}
    write_dir(folder, wider, name=None)
    with pytest.raises(ModelError, match="describes another architecture"):
        load_model(ModelSpec(name="Tiny", pretrained=path))


# --- preprocessing


def test_preprocess_of_a_directory_with_the_models_own_size(tmp_path):
    folder = write_dir(tmp_path / "m", preprocess_cfg=SQUASH | {"size": 224, "interpolation": "bilinear", "mean": 0.5})
    found = load_model(ModelSpec(name=str(folder))).info.preprocess
    assert (found.size, found.resize_mode, found.interpolation) == ((32, 32), "squash", "bilinear")
    assert found.mean == found.std == HALF


def test_preprocess_without_a_config_is_what_the_tags_agree_on(registry, caplog):
    siglip = load_model(ModelSpec(name="Tiny-SigLIP", random_init=0)).info.preprocess
    assert (siglip.resize_mode, siglip.mean, siglip.size) == ("squash", HALF, (160, 160))
    assert not caplog.records
    plain = load_model(ModelSpec(name="Plain", random_init=0)).info.preprocess
    assert (plain.resize_mode, plain.std, plain.mean) == ("squash", HALF, open_clip.OPENAI_DATASET_MEAN)
    assert "differ in mean" in caplog.text


def test_target_that_is_not_square_is_always_bicubic_when_cropped(tmp_path):
    tall = TINY | {"vision_cfg": TINY["vision_cfg"] | {"image_size": [48, 32]}}
    for mode, expected in (("shortest", "bicubic"), ("squash", "bilinear")):
        folder = write_dir(tmp_path / mode, tall, OPENAI | {"interpolation": "bilinear", "resize_mode": mode})
        found = load_model(ModelSpec(name=str(folder))).info.preprocess
        assert (found.size, found.interpolation) == ((48, 32), expected)


# --- tokenizer


def test_standard_tokens(tmp_path):
    tokens = load_model(ModelSpec(name=str(write_dir(tmp_path / "m")))).tokenize(["red panda", "a cat"])
    assert tokens.shape == (2, 77)
    assert tokens[0, :5].tolist() == [49406, 736, 12952, 49407, 0]
    assert torch.equal(tokens, open_clip.get_tokenizer(f"local-dir:{tmp_path / 'm'}")(["red panda", "a cat"]))


def test_cut_texts_are_logged_once_by_the_first(tmp_path, caplog):
    short = TINY | {"text_cfg": TINY["text_cfg"] | {"context_length": 8}}
    tokenize = load_model(ModelSpec(name=str(write_dir(tmp_path / "m", short)))).tokenize
    fitting = "one two three four five six"
    assert tokenize([fitting, "extraordinary"]).shape == (2, 8)
    assert not caplog.records
    tokenize([fitting, fitting + " seven", fitting + " eight"])
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "text 1 is cut to 8 tokens" in caplog.text


def test_siglip_images_need_no_tokenizer(tmp_path):
    folder = write_dir(tmp_path / "siglip", SIGLIP, SQUASH)
    loaded = load_model(ModelSpec(name=str(folder)))
    assert loaded.info.logit_bias == -10
    assert loaded.info.preprocess.resize_mode == "squash"
    with pytest.raises(
        ModelError, match=f"{folder}: (cannot load this model's tokenizer|this model's tokenizer needs)"
    ):
        loaded.tokenize(["a cat"])


def test_tokenizer_files_in_the_directory_are_used(tmp_path, caplog):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3, "panda": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder = write_dir(tmp_path / "siglip", SIGLIP, SQUASH)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    fast.save_pretrained(folder)
    tokens = load_model(ModelSpec(name=str(folder))).tokenize(["Red, panda!", "red " * 63])
    assert tokens.shape == (2, 64)
    assert tokens[0, :4].tolist() == [3, 4, 1, 0]
    assert not caplog.records
    load_model(ModelSpec(name=str(folder))).tokenize(["Red, panda!", "red " * 64])
    assert "text 1 is cut to 64 tokens" in caplog.text


def test_loading_does_not_import_transformers(tmp_path):
    folder = write_dir(tmp_path / "siglip", SIGLIP, SQUASH)
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "from clipindex.models import load_model; from clipindex.types import ModelSpec\n"
        f"loaded = load_model(ModelSpec(name={str(folder)!r}))\n"
        "from clipindex.errors import ModelError\n"
        "try: loaded.tokenize(['a cat'])\n"
        "except ModelError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install transformers" in done.stdout


# --- fingerprint


def fingerprint(folder):
    return load_model(ModelSpec(name=str(folder))).info.fingerprint


def test_fingerprint_is_of_the_numbers_alone(tmp_path, registry, tensors):
    first = fingerprint(write_dir(tmp_path / "a", tensors=tensors))
    assert len(first) == 64
    half = {name: t.half() for name, t in tensors.items()}
    assert fingerprint(write_dir(tmp_path / "b", tensors=half, name="weights.bin")) == first
    spelled = {
        "embed_dim": 16,
        "quick_gelu": False,
        "custom_text": True,
        "vision_cfg": TINY["vision_cfg"] | {"image_size": [32, 32], "mlp_ratio": 4, "patch_dropout": 0.5},
        "text_cfg": TINY["text_cfg"] | {"pool_type": "argmax", "output_tokens": False},
    }
    assert fingerprint(write_dir(tmp_path / "c", spelled, tensors=tensors)) == first
    path = save(tensors, tmp_path / "w.pt")
    named = ModelSpec(name="Tiny", pretrained=str(path), quick_gelu=False)
    assert load_model(named).info.fingerprint == first


def test_fingerprint_tells_models_apart(tmp_path, tensors):
    nudged = {name: t.clone() for name, t in tensors.items()}
    nudged["visual.conv1.weight"][0, 0, 0, 0] += 2**-10
    variants = [
        write_dir(tmp_path / "a", tensors=tensors),
        write_dir(tmp_path / "weight", tensors=nudged),
        write_dir(tmp_path / "mean", tensors=tensors, preprocess_cfg=OPENAI | {"mean": HALF}),
        write_dir(tmp_path / "resize", tensors=tensors, preprocess_cfg=OPENAI | {"resize_mode": "squash"}),
        write_dir(tmp_path / "gelu", TINY | {"quick_gelu": True}, tensors=tensors),
    ]
    assert len({fingerprint(folder) for folder in variants}) == len(variants)


# --- transformers' layout


HF_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_act": "quick_gelu",
}
HF_VISION = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
}


def hf_model(folder, text=None, vision=None, **saving):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    config = transformers.CLIPConfig(
        text_config=HF_TEXT | (text or {}), vision_config=HF_VISION | (vision or {}), projection_dim=24
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.CLIPModel(config).eval()
        for parameter in model.parameters():
            # Far larger than the usual start, so that every layer and activation shows in the features.
            parameter.data.normal_(0, 0.25)
    model.logit_scale.data.fill_(3.0)
    model.save_pretrained(folder, **saving)
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=HALF
    )
    processor.save_pretrained(folder)
    return model


def edit_json(path, **changes):
    config = json.loads(path.read_text())
    for key, value in changes.items():
        target, keys = config, key.split("__")
        for part in keys[:-1]:
            target = target[part]
        target[keys[-1]] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("eos_token_id", [2, 49407])
@pytest.mark.parametrize(("activation", "eps"), [("quick_gelu", 1e-5), ("gelu", 1e-3)])
def test_transformers_clip_gives_the_same_features(tmp_path, activation, eos_token_id, eps):
    tower = {"hidden_act": activation, "layer_norm_eps": eps}
    model = hf_model(tmp_path, text=tower | {"eos_token_id": eos_token_id}, vision=tower)
    loaded = load_model(ModelSpec(name=str(tmp_path)))
    tokens = loaded.tokenize(["red panda", "a photo of a very small cat, sitting", ""])
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs = model(input_ids=tokens, pixel_values=pixels)
        image = loaded.model.encode_image(pixels, normalize=True)
        text = loaded.model.encode_text(tokens, normalize=True)
    assert (image * theirs.image_embeds).sum(1).min() >= 0.99999
    assert (text * theirs.text_embeds).sum(1).min() >= 0.99999
    # Random towers point much the same way for any input: the differences between inputs must agree too.
    torch.testing.assert_close(image @ text.T, theirs.image_embeds @ theirs.text_embeds.T, atol=2e-6, rtol=0)
    assert loaded.info.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()))
    assert loaded.info.dim == 24
    assert loaded.info.preprocess.mean == HALF
    assert loaded.info.preprocess.std == open_clip.OPENAI_DATASET_STD
    assert has_quick_gelu(loaded) is (activation == "quick_gelu")


def test_fingerprint_does_not_depend_on_the_layout(tmp_path, monkeypatch):
    hf_model(tmp_path / "hf")
    theirs = load_model(ModelSpec(name=str(tmp_path / "hf")))
    model_cfg = {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 48,
            "head_width": 16,
            "patch_size": 8,
            "mlp_ratio": 1.6667,
        },
        "text_cfg": {"width": 32, "heads": 2, "layers": 2, "mlp_ratio": 1.5},
    }
    tensors = theirs.model.state_dict()
    folder = write_dir(tmp_path / "open_clip", model_cfg, OPENAI | {"mean": HALF}, tensors)
    ours = load_model(ModelSpec(name=str(folder)))
    assert ours.info.fingerprint == theirs.info.fingerprint
    hub(monkeypatch, tmp_path / "hf")
    assert load_model(ModelSpec(name="hf-hub:org/repo")).info.fingerprint == theirs.info.fingerprint


@pytest.mark.parametrize("form", ["sharded", "bin", "sharded bin"])
def test_transformers_weight_files_of_every_form(tmp_path, form):
    hf_model(tmp_path / "one")
    whole = load_file(tmp_path / "one" / "model.safetensors")
    folder = tmp_path / "other"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_text((tmp_path / "one" / name).read_text())
    suffix = ".bin" if "bin" in form else ".safetensors"
    stem = "pytorch_model" if "bin" in form else "model"
    if "sharded" in form:
        names = {key: f"{stem}-0000{1 + i % 2}-of-00002{suffix}" for i, key in enumerate(whole)}
        for shard in set(names.values()):
            save({key: whole[key] for key in whole if names[key] == shard}, folder / shard)
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": names}))
    else:
        save(whole, folder / f"{stem}{suffix}")
    assert fingerprint(folder) == fingerprint(tmp_path / "one")


def test_shard_index_cannot_reach_outside(tmp_path):
    hf_model(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"logit_scale": "../outside.safetensors"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="lists '../outside.safetensors', which is not in"):
        load_model(ModelSpec(name=str(tmp_path / "m")))


def test_old_config_copies_win_as_in_transformers(tmp_path):
    hf_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    stale = config["vision_config"] | {"hidden_act": "gelu"}
    edit_json(tmp_path / "config.json", vision_config=stale, vision_config_dict=HF_VISION)
    assert has_quick_gelu(load_model(ModelSpec(name=str(tmp_path))))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"model_type": "siglip"}, "model_type 'siglip'.*hf-hub:timm/ViT-B-16-SigLIP"),
        ("config.json", {"model_type": "clipseg"}, "model_type 'clipseg' is not a transformers CLIP"),
        ("config.json", {"text_config__hidden_act": "relu", "vision_config__hidden_act": "relu"}, "hidden_act .'relu'"),
        ("config.json", {"text_config__hidden_act": "gelu"}, "hidden_act .'gelu', 'quick_gelu'"),
        ("config.json", {"text_config__eos_token_id": 49406}, "text eos_token_id 49406"),
        ("config.json", {"text_config__vocab_size": 1000}, "text vocab_size 1000"),
        ("config.json", {"vision_config__num_channels": 1}, "vision num_channels 1"),
        ("preprocessor_config.json", {"do_center_crop": False}, "do_center_crop False"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 40}}, "size {'shortest_edge': 40}"),
        ("preprocessor_config.json", {"crop_size": 28}, "crop_size 28"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize False"),
        ("preprocessor_config.json", {"resample": 1}, "resample 1"),
        ("preprocessor_config.json", {"rescale_factor": 1.0}, "rescale_factor 1.0"),
        ("preprocessor_config.json", {"image_processor_type": "ViTImageProcessor"}, "'ViTImageProcessor'"),
    ],
)
def test_transformers_features_that_cannot_be_represented(tmp_path, file, changes, message):
    hf_model(tmp_path)
    edit_json(tmp_path / file, **changes)
    with pytest.raises(ModelError, match=f"{file}: .*{message}"):
        load_model(ModelSpec(name=str(tmp_path)))


def test_transformers_processors_that_squash_or_do_not_normalise(tmp_path):
    hf_model(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    edit_json(file, size={"height": 32, "width": 32}, do_center_crop=False, resample=2, do_normalize=False)
    found = load_model(ModelSpec(name=str(tmp_path))).info.preprocess
    assert (found.resize_mode, found.interpolation, found.mean, found.std) == ("squash", "bilinear", (0,) * 3, (1,) * 3)
    nested = {"image_processor": json.loads(file.read_text())}
    file.unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert load_model(ModelSpec(name=str(tmp_path))).info.preprocess == found


def test_tokenizer_files_must_be_the_standard_ones(tmp_path):
    hf_model(tmp_path)
    with gzip.open(open_clip.tokenizer.default_bpe(), "rt", encoding="utf-8") as stream:
        merges = stream.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    specials = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {specials.get(w, w): i for w, i in open_clip.SimpleTokenizer().encoder.items()}

    def write(merges, vocab):
        (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        whole = {"model": {"type": "BPE", "vocab": vocab, "merges": [m.split(" ") for m in merges]}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole))

    write(merges, vocab)
    load_model(ModelSpec(name=str(tmp_path)))
    write([merges[1], merges[0], *merges[2:]], vocab)
    with pytest.raises(ModelError, match="merges.txt: not CLIP's standard byte-pair encoding"):
        load_model(ModelSpec(name=str(tmp_path)))
    write(merges, vocab | {"cat</w>": vocab["dog</w>"], "dog</w>": vocab["cat</w>"]})
    with pytest.raises(ModelError, match="vocab.json: not CLIP's standard"):
        load_model(ModelSpec(name=str(tmp_path)))


def test_transformers_weights_beside_an_architecture_name(tmp_path, registry):
    hf_model(tmp_path)
    with pytest.raises(ModelError, match=f"weights in transformers' layout; give local-dir:{tmp_path}"):
        load_model(ModelSpec(name="Tiny", pretrained=str(tmp_path / "model.safetensors")))
