import gc
import json
import subprocess
import sys
import weakref

import numpy as np
import open_clip
import pytest
import torch
from conftest import CUDA
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from clipindex import devices, encode
from clipindex.devices import choose_device, choose_precision
from clipindex.encode import ImageTower, TextTower
from clipindex.errors import ModelError, UsageError
from clipindex.models import load_model
from clipindex.types import ModelSpec

CPU = torch.device("cpu")
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 4}
VIT = {"image_size": 64, "layers": 4, "width": 128, "head_width": 32, "patch_size": 16}
TIMM_TEXT = TEXT | {"pool_type": "last", "no_causal_mask": True, "proj_bias": True}
MODELS = {
    "vit": {"embed_dim": 64, "vision_cfg": VIT, "text_cfg": TEXT},
    "vit-quickgelu": {"embed_dim": 64, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "custom": {
        "embed_dim": 64,
        "vision_cfg": VIT | {"qk_norm": True, "scale_fc": True, "pool_type": "avg", "ls_init_value": 0.5},
        "text_cfg": TEXT | {"scale_attn": True, "pool_type": "last"},
        "quick_gelu": True,
        "custom_text": True,
    },
    "average": {
        "embed_dim": 64,
        "vision_cfg": VIT | {"pool_type": "avg", "ls_init_value": 0.5, "final_ln_after_pool": True},
        "text_cfg": TEXT | {"pool_type": "last"},
    },
    "last-norm-first": {
        "embed_dim": 64,
        "vision_cfg": VIT | {"pool_type": "tok", "ls_init_value": 0.5, "final_ln_after_pool": True},
        "text_cfg": TEXT | {"no_causal_mask": True},
        "custom_text": True,
    },
    "resnet": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
        "text_cfg": TEXT,
    },
    "siglip": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "none"},
        "text_cfg": TIMM_TEXT,
    },
    "convnext": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"},
        "text_cfg": TEXT,
    },
    "batchnorm": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_byobnet", "timm_pool": "", "timm_proj": "linear"},
        "text_cfg": TEXT,
    },
    "coca": {
        "embed_dim": 64,
        "custom_text": True,
        "vision_cfg": VIT | {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
        "text_cfg": TEXT | {"context_length": 76, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 76, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 1},
    },
}
TEXTS = ["red panda", "a photo of a cat", "an aerial view of a very long road through the desert at night", ""]
TREMBLE = 0.25


@pytest.fixture(autouse=True)
def one_thread():
    """On busy cores, threads that wait for each other take twenty times as long over models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def loaded_models(tmp_path_factory):
    """Random models whose normalisations and biases are not trivial: at their start a wrong one would not show."""
    cache = {}

    def load(name):
        if name not in cache:
            folder = tmp_path_factory.mktemp(name)
            config = {"model_cfg": MODELS[name], "preprocess_cfg": {}}
            (folder / "open_clip_config.json").write_text(json.dumps(config))
            cache[name] = load_model(ModelSpec(name=str(folder), random_init=0))
            tremble(cache[name].model)
        return cache[name]

    return load


def tremble(model):
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name in ("weight", "bias", "running_mean", "in_proj_bias"):
            tensor = getattr(module, name, None)
            if isinstance(tensor, torch.Tensor) and ("Norm" in type(module).__name__ or tensor.ndim == 1):
                tensor.add_(TREMBLE * torch.randn(tensor.shape, generator=generator))


def pictures(loaded, number=6):
    """Smooth images of many colours, as photographs are; noise makes all features alike."""
    height, width = loaded.info.preprocess.size
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (number, 5, 5, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC)) for c in coarse])


def plain_loop(loaded, images, texts):
    """What open_clip's own functions give, an image at a time through its own transform."""
    preprocess = loaded.info.preprocess
    transform = open_clip.image_transform(
        preprocess.size, is_train=False, mean=preprocess.mean, std=preprocess.std, resize_mode=preprocess.resize_mode
    )
    model = loaded.model
    with torch.inference_mode():
        pixels = torch.stack([transform(to_pil_image(image)) for image in images])
        image = torch.cat([model.encode_image(p[None], normalize=True) for p in pixels])
        tokens = open_clip.tokenize(texts, context_length=76 if hasattr(model, "text_decoder") else 77)
        return image.numpy(), model.encode_text(tokens, normalize=True).numpy()


def cosines(ours, theirs):
    assert ours.shape == theirs.shape
    return (ours * theirs).sum(1)


# Lowest cosines measured: fp32 0.9999998, bf16 0.99994 for images and 0.99985 for texts, fp16 0.999998.
@pytest.mark.parametrize("name", MODELS)
def test_towers_agree_with_open_clip(loaded_models, name):
    loaded = loaded_models(name)
    images = pictures(loaded)
    image, text = plain_loop(loaded, images, TEXTS)
    for precision, bound in (("fp32", 0.999999), ("bf16", 0.9997), ("fp16", 0.99999)):
        embeddings, norms, _ = ImageTower(loaded, device=CPU, precision=precision).encode(images)
        texts = TextTower(loaded, device=CPU, precision=precision).encode(TEXTS)
        assert embeddings.dtype == norms.dtype == texts.dtype == np.float32
        assert cosines(embeddings, image).min() >= bound, precision
        assert cosines(texts, text).min() >= bound, precision
        for unit in (embeddings, texts):
            np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-5)


def test_norm_is_that_of_the_raw_feature(loaded_models):
    loaded = loaded_models("vit")
    images = pictures(loaded)
    embeddings, norms, _ = ImageTower(loaded, device=CPU, precision="fp32").encode(images)
    mean, std = (torch.tensor(v)[:, None, None] for v in (loaded.info.preprocess.mean, loaded.info.preprocess.std))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.inference_mode():
        raw = loaded.model.encode_image(pixels).numpy()
    np.testing.assert_allclose(embeddings * norms[:, None], raw, atol=1e-4)


@pytest.mark.parametrize("name", ["vit", "resnet", "siglip"])
def test_low_precision_is_of_weights_but_not_of_normalisations(loaded_models, name):
    tower = ImageTower(loaded_models(name), device=CPU, precision="bf16")._tower
    for module in tower.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                expected = torch.float32 if "Norm" in type(module).__name__ else torch.bfloat16
                assert tensor.dtype == expected, type(module)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_towers_leave_the_model_alone_and_let_the_rest_go(tmp_path, precision):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODELS["vit-quickgelu"]}))
    loaded = load_model(ModelSpec(name=str(folder), random_init=0))
    before = {name: t.clone() for name, t in loaded.model.state_dict().items()}
    image = ImageTower(loaded, device=CPU, precision=precision)
    text = TextTower(loaded, device=CPU, precision=precision)
    images = pictures(loaded)
    first = image.encode(images)[0], text.encode(TEXTS)
    again = plain_loop(loaded, images, TEXTS)
    for ours, theirs in zip(first, again, strict=True):
        assert cosines(ours, theirs).min() > 0.9995
    after = loaded.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    shared = image._tower.get_parameter("conv1.weight") is loaded.model.visual.conv1.weight
    assert shared is (precision == "fp32")

    kept = {"visual": weakref.ref(loaded.model.visual.proj), "text": weakref.ref(loaded.model.text_projection)}
    del loaded, text, after
    gc.collect()
    assert kept["text"]() is None
    assert (kept["visual"]() is None) is (precision == "bf16")
    np.testing.assert_array_equal(image.encode(images)[0], first[0])


@pytest.mark.parametrize(
    "exhausted",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["allocator", "driver", "cuBLAS", "cuDNN", "CPU"],
)
def test_memory_that_is_too_small_halves_the_batch_and_loses_no_row(tmp_path, caplog, exhausted):
    """The limit stands in for a device's memory, whose end PyTorch reports by these very exceptions."""
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODELS["vit"]}))
    loaded = load_model(ModelSpec(name=str(folder), random_init=0))
    images = pictures(loaded, 11)
    whole, norms, _ = ImageTower(loaded, device=CPU, precision="fp32").encode(images)

    def refuse_more_than(limit):
        def hook(module, arguments):
            if len(arguments[0]) > limit:
                raise exhausted

        return loaded.model.visual.register_forward_pre_hook(hook)

    handle = refuse_more_than(3)
    tower = ImageTower(loaded, device=CPU, precision="fp32")
    embeddings, lengths, _ = tower.encode(images)
    np.testing.assert_allclose(embeddings, whole, atol=1e-6)
    np.testing.assert_allclose(lengths, norms, rtol=1e-5)
    assert [record.args[1:] for record in caplog.records] == [(11, 5), (5, 2)]
    tower.encode(images)
    assert len(caplog.records) == 2  # it remembers what fits
    handle.remove()

    refuse_more_than(0)
    with pytest.raises(UsageError, match="no memory for one image") as refused:
        ImageTower(loaded, device=CPU, precision="fp32").encode(images)
    assert str(exhausted) in str(refused.value)


def test_what_is_no_want_of_memory_is_raised_as_it_is(loaded_models):
    loaded = loaded_models("vit")

    def fail(module, arguments):
        raise RuntimeError("device lost")

    handle = loaded.model.visual.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="device lost"):
            ImageTower(loaded, device=CPU, precision="fp32").encode(pictures(loaded, 2))
    finally:
        handle.remove()


def test_text_towers_hold_no_images(loaded_models):
    for name in ("vit", "coca"):
        held = dict(TextTower(loaded_models(name), device=CPU, precision="fp32")._model.named_parameters())
        assert not [key for key in held if key.startswith(("visual", "text_decoder"))]


def test_text_does_not_depend_on_its_neighbours(loaded_models, monkeypatch):
    # Shortening to the longest text of a batch must not change what a text means.
    monkeypatch.setattr(encode, "_TEXT_BATCH", 2)
    for name in ("vit", "custom", "siglip", "coca"):
        tower = TextTower(loaded_models(name), device=CPU, precision="fp32")
        texts = [*TEXTS, "word " * 100, "red panda"]
        together = tower.encode(texts)
        alone = np.concatenate([tower.encode([text]) for text in texts])
        np.testing.assert_allclose(together, alone, atol=2e-6)
        np.testing.assert_allclose(together[0], together[-1], atol=2e-6)


def test_odd_batches(loaded_models):
    loaded = loaded_models("vit")
    tower = ImageTower(loaded, device=CPU, precision="fp32")
    images = pictures(loaded)
    expected, _, _ = tower.encode(images)
    embeddings, norms, _ = tower.encode(images[:0])
    assert (embeddings.shape, norms.shape) == ((0, 64), (0,))
    assert TextTower(loaded, device=CPU, precision="fp32").encode([]).shape == (0, 64)
    frozen = images.copy()
    frozen.flags.writeable = False
    for view in (frozen, np.asfortranarray(images), images[::-1][::-1]):
        np.testing.assert_allclose(tower.encode(view)[0], expected, atol=1e-6)


def test_not_a_number_passes_through(tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODELS["vit"]}))
    loaded = load_model(ModelSpec(name=str(tmp_path), random_init=0))
    loaded.model.visual.proj[0, 0] = torch.nan
    embeddings, norms, _ = ImageTower(loaded, device=CPU, precision="fp32").encode(pictures(loaded))
    assert np.isnan(norms).all()
    assert np.isnan(embeddings).all()


def test_towers_that_do_not_pool_are_refused(tmp_path):
    config = {"model_cfg": MODELS["vit"] | {"vision_cfg": VIT | {"pool_type": "none"}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    loaded = load_model(ModelSpec(name=str(tmp_path), random_init=0))
    with pytest.raises(ModelError, match=r"gives \[6, 17, 64\] instead of \[N, 64\]"):
        ImageTower(loaded, device=CPU, precision="fp32").encode(pictures(loaded))


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "mps", "gpu 1"])
def test_devices_that_are_not_there(name):
    with pytest.raises(UsageError, match=f"device '{name}'"):
        choose_device(name)


def test_device_choice(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto").type == "cuda"
    assert choose_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("flags", "auto", "fp16"),
    [
        ({"avx2", "avx512f"}, "fp32", False),
        ({"avx512_bf16"}, "bf16", False),
        ({"amx_bf16", "amx_fp16"}, "bf16", True),
        ({"asimd", "asimdhp", "bf16"}, "bf16", True),
        (set(), "fp32", False),
    ],
)
def test_precision_on_a_cpu(monkeypatch, flags, auto, fp16):
    monkeypatch.setattr(devices, "_cpu_flags", lambda: frozenset(flags))
    assert choose_precision("auto", CPU) == auto
    assert choose_precision("bf16", CPU) == "bf16"
    if fp16:
        assert choose_precision("fp16", CPU) == "fp16"
    else:
        with pytest.raises(UsageError, match="fp16 on this CPU"):
            choose_precision("fp16", CPU)
    with pytest.raises(UsageError, match="precision 'int8' is unknown"):
        choose_precision("int8", CPU)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_precision_on_cuda(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", torch.device("cuda", 0)) == expected
    assert choose_precision("fp16", torch.device("cuda", 0)) == "fp16"


EXHAUSTED = """
import logging, sys
import numpy as np, torch
from clipindex import ModelSpec, load_model
from clipindex.encode import ImageTower
from clipindex.errors import UsageError

logging.basicConfig(stream=sys.stdout, format="%(message)s")
device = torch.device(sys.argv[2], 0)
tower = ImageTower(load_model(ModelSpec(name=sys.argv[1], random_init=0)), device=device, precision="fp32")
images = np.random.default_rng(0).integers(0, 256, (1024, 64, 64, 3), np.uint8)
few = np.concatenate([tower.encode(images[at : at + 32]).unit for at in range(0, 1024, 32)])

def allow(more):
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + more) / total, device)

allow(64 << 20)  # of the 120 MiB that the pixels alone take in float32
for _ in range(2):
    print("off by", np.abs(tower.encode(images).unit - few).max())

allow(0)
kept, size = [], 1 << 26
while size >= 512:  # all that is left between what there is
    try:
        kept.append(torch.empty(size, dtype=torch.uint8, device=device))
    except torch.OutOfMemoryError:
        size //= 2
try:
    tower.encode(images)
except UsageError as error:
    print("refused:", error)
del kept
allow(64 << 20)
print("again", np.abs(tower.encode(images[:1]).unit - few[:1]).max())
"""


@pytest.mark.cuda
def test_a_cuda_device_whose_memory_is_too_small_encodes_fewer_at_once(tmp_path):
    """In a process of its own, whose share of the device's memory is limited for good."""
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODELS["vit"]}))
    command = [sys.executable, "-c", EXHAUSTED, tmp_path, CUDA]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    first, second = (at for at, line in enumerate(lines) if line.startswith("off by"))
    assert first > 0 and second == first + 1  # it remembers what fits
    assert lines[0].endswith("has no memory for 1024 images at once: going on with 512")
    # Products of other shapes sum in another order.
    assert all(float(line.split()[-1]) < 1e-4 for line in (lines[first], lines[second], lines[-1]))
    assert "no memory for one image" in lines[-2] and lines[-2].startswith("refused: ")


@pytest.mark.cuda
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 0.9999), ("bf16", 0.9995), ("fp16", 0.9999)])
@pytest.mark.parametrize("name", MODELS)
def test_cuda_agrees_with_the_cpu(loaded_models, name, precision, bound):
    loaded = loaded_models(name)
    device = torch.device(CUDA, 0)
    images = pictures(loaded)
    pinned = torch.from_numpy(images).pin_memory()
    image, text = plain_loop(loaded, images, TEXTS)
    embeddings, _, _ = ImageTower(loaded, device=device, precision=precision).encode(pinned.numpy())
    assert cosines(embeddings, image).min() >= bound
    assert cosines(TextTower(loaded, device=device, precision=precision).encode(TEXTS), text).min() >= bound


@pytest.mark.cuda
def test_cuda_batches_that_are_begun_ahead_are_not_mixed_up(loaded_models):
    loaded = loaded_models("vit")
    tower = ImageTower(loaded, device=torch.device(CUDA, 0), precision="fp32")
    rng = np.random.default_rng(0)
    batches = []
    for size in (64, 64, 7, 64, 33, 64, 1, 64) * 4:
        batch = tower.new_batch(64)
        batch[:] = rng.integers(0, 256, batch.shape, np.uint8)
        batches.append(batch[:size])
    expected = [tower.encode(batch) for batch in batches]
    begun = [tower.begin(batch) for batch in batches]
    for finish, (unit, norms, _) in zip(begun, expected, strict=True):
        vectors, seconds = finish()
        np.testing.assert_allclose(vectors.unit, unit, atol=1e-5)
        np.testing.assert_allclose(vectors.norms, norms, rtol=1e-4)
        assert 0 < seconds < 60


def features_before_projection(loaded, images):
    """What goes into the last layer, seen from outside: by a hook, by open_clip's own switch, or undone."""
    visual = loaded.model.visual
    preprocess = loaded.info.preprocess
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocess.mean, preprocess.std))
    seen = []
    linear = next((getattr(getattr(visual, "head", None), name, None) for name in ("proj", "mlp")), None)
    if linear is not None:
        handle = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    projection = getattr(visual, "proj", None)
    try:
        if projection is not None:
            visual.proj = None
        with torch.inference_mode():
            found = visual((pixels - mean) / std)
    finally:
        if projection is not None:
            visual.proj = projection
        if linear is not None:
            handle.remove()
    if seen:
        return seen[0].numpy()
    return (found[0] if isinstance(found, tuple) else found).numpy()


@pytest.mark.parametrize("name", ["vit", "custom", "coca", "convnext", "batchnorm"])
def test_features_before_the_projection_are_what_goes_into_it(loaded_models, name):
    loaded = loaded_models(name)
    images = pictures(loaded)
    expected = features_before_projection(loaded, images)
    both = ImageTower(loaded, device=CPU, precision="fp32", with_pre_projection=True).encode(images)
    raw = both.pre_projection.unit * both.pre_projection.norms[:, None]
    assert loaded.pre_projection.dim == expected.shape[1]
    np.testing.assert_allclose(raw, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())
    alone = load_model(loaded.info.spec, pre_projection=True)
    alone.model.load_state_dict(loaded.model.state_dict())
    again = ImageTower(alone, device=CPU, precision="fp32").encode(images)
    np.testing.assert_array_equal(again.unit, both.pre_projection.unit)
    assert again.pre_projection is None


@pytest.mark.parametrize("name", ["vit", "resnet", "coca", "convnext", "batchnorm"])
def test_both_kinds_of_features_cost_the_projected_ones_nothing(loaded_models, name):
    loaded = loaded_models(name)
    images = pictures(loaded)
    for precision, bound in (("fp32", 0.9999999), ("bf16", 0.9999)):
        plain = ImageTower(loaded, device=CPU, precision=precision).encode(images)
        both = ImageTower(loaded, device=CPU, precision=precision, with_pre_projection=True).encode(images)
        assert cosines(both.unit, plain.unit).min() >= bound
        np.testing.assert_allclose(both.norms, plain.norms, rtol=1e-6 if precision == "fp32" else 1e-2)


def test_attention_pooling_ends_in_the_projection(loaded_models):
    """Of a ResNet: the projection of the features before it is what the tower gives."""
    loaded = loaded_models("resnet")
    images = pictures(loaded)
    both = ImageTower(loaded, device=CPU, precision="fp32", with_pre_projection=True).encode(images)
    last = loaded.model.visual.attnpool.c_proj
    raw = torch.from_numpy(both.pre_projection.unit * both.pre_projection.norms[:, None])
    assert raw.shape[1] == last.in_features == loaded.pre_projection.dim
    np.testing.assert_allclose(last(raw).numpy(), both.unit * both.norms[:, None], rtol=1e-4, atol=1e-4)


def test_features_before_a_projection_that_is_none(loaded_models):
    with pytest.raises(ModelError, match="ends in no projection.* leave --features out"):
        load_model(loaded_models("siglip").info.spec, pre_projection=True)


def test_kinds_of_features_are_told_apart(loaded_models):
    loaded = loaded_models("vit")
    before = load_model(loaded.info.spec, pre_projection=True)
    assert before.info.features == "pre-projection"
    assert before.info.fingerprint != load_model(loaded.info.spec).info.fingerprint
    with pytest.raises(ModelError, match="pre-projection features, which share no space with texts"):
        TextTower(before, device=CPU, precision="fp32")
