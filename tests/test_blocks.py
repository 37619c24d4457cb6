import copy

import open_clip
import pytest
import torch
from conftest import CUDA
from open_clip.transformer import CustomTransformer, Transformer, VisionTransformer
from torch import nn

from clipindex.towers import blocks
from clipindex.towers.blocks import Block, attend, plain_linear, replace_blocks
from clipindex.towers.packed import PackedLinear, PackedPatches, can_pack, is_of_patches


def tower(**changes):
    torch.manual_seed(0)
    options = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "heads": 4, "mlp_ratio": 4.0}
    made = VisionTransformer(**options | changes).eval().requires_grad_(False)
    for parameter in made.parameters():
        if parameter.ndim == 1:
            parameter += 0.25 * torch.randn(len(parameter))
    return made


def reference(query, key, value, mask):
    """In float64, a head at a time."""
    scores = torch.einsum("nhld,nhmd->nhlm", query.double(), key.double()) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + (mask.double().reshape(scores.shape) if mask.ndim == 3 else mask.double())
    return torch.einsum("nhlm,nhmd->nlhd", scores.softmax(-1), value.double()).flatten(2)


def attended(device, length, mask):
    """What is found on a device, and what is right."""
    torch.manual_seed(1)
    projected = torch.randn(5, 9, 3, 4, 8)
    query, key, value = projected.permute(2, 0, 3, 1, 4)
    query = query[:, :, :length]
    masks = {
        "none": None,
        "causal": torch.full((length, 9), float("-inf")).triu(1),
        "for each": torch.randn(20, length, 9),
    }
    given = (None if one is None else one.to(device) for one in (query, key, value, masks[mask]))
    return attend(*given).cpu().double(), reference(query, key, value, masks[mask])


@pytest.mark.parametrize("scores_bytes", [1, 5000, 1 << 23])  # a head at a time, some, all
@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("mask", ["none", "causal", "for each"])
def test_attention_is_that_of_the_reference(monkeypatch, scores_bytes, length, mask):
    monkeypatch.setattr(blocks, "_SCORES_BYTES", scores_bytes)
    torch.testing.assert_close(*attended("cpu", length, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("mask", ["none", "causal", "for each"])
def test_attention_on_cuda_is_that_of_the_reference(length, mask):
    # Fused kernels there are made for speed in float32 too, with exponentials of their own.
    torch.testing.assert_close(*attended(CUDA, length, mask), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"act_layer": open_clip.transformer.QuickGELU},
        {"ls_init_value": 0.3},
        {"pool_type": "avg"},
        {"pool_type": "none"},
        {"pool_type": "tok", "final_ln_after_pool": True},
        {"output_tokens": True},
        {"attentional_pool": True, "attn_pooler_heads": 4},
    ],
)
@pytest.mark.parametrize("make", [plain_linear, blocks.packed_linear])
def test_blocks_give_what_open_clips_give(changes, make):
    theirs = tower(**changes)
    ours = copy.deepcopy(theirs)
    replace_blocks(ours, make)
    pixels = torch.randn(5, 3, 32, 32)
    with torch.inference_mode():
        expected, found = theirs(pixels), ours(pixels)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert sum(isinstance(module, Block) for module in ours.modules()) == 3


def tokens_that_leave(tower):
    left = []
    tower.transformer.register_forward_hook(lambda module, inputs, output: left.append(output.shape[1]))
    with torch.inference_mode():
        tower(torch.zeros(1, 3, 32, 32))
    return left[0]


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [({}, 1), ({"pool_type": "avg"}, 17), ({"output_tokens": True}, 17), ({"attentional_pool": True}, 17)],
)
def test_only_tokens_that_are_pooled_leave_the_last_block(changes, tokens):
    made = tower(**changes)
    replace_blocks(made, plain_linear)
    assert tokens_that_leave(made) == tokens


def test_plain_layers_share_the_towers_tensors():
    made = tower()
    before = {tensor.untyped_storage().data_ptr() for tensor in made.parameters()}
    replace_blocks(made, plain_linear)
    assert {tensor.untyped_storage().data_ptr() for tensor in made.parameters()} == before


def test_masked_transformers_and_custom_ones():
    torch.manual_seed(0)
    mask = torch.full((6, 6), float("-inf")).triu(1)
    for kind, replaced in ((Transformer, 2), (CustomTransformer, 0)):
        theirs = kind(32, 2, 4).eval().requires_grad_(False)
        ours = copy.deepcopy(theirs)
        replace_blocks(ours, plain_linear)
        x = torch.randn(3, 6, 32)
        with torch.inference_mode():
            torch.testing.assert_close(ours(x, attn_mask=mask), theirs(x, attn_mask=mask), atol=1e-5, rtol=1e-5)
        assert sum(isinstance(module, Block) for module in ours.modules()) == replaced


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.ReLU()])
@pytest.mark.parametrize("shape", [(1, 24), (3, 7, 24), (0, 24)])
def test_packed_layers_are_linear_layers(dtype, activation, shape):
    if not can_pack(dtype):
        pytest.skip("oneDNN does not multiply these here")
    torch.manual_seed(0)
    weight, bias, x = (torch.randn(shape).to(dtype) for shape in ((40, 24), (40,), shape))
    with torch.inference_mode():
        found = PackedLinear(weight, bias, activation)(x)
        wide = nn.functional.linear(x.double(), weight.double(), bias.double())
        expected = wide if activation is None else activation(wide)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), expected, atol=bound, rtol=bound)
    assert found.dtype == dtype


@pytest.mark.parametrize("size", [(4, 4), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_patches_are_convolutions(size, bias):
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, size, stride=size, bias=bias)
    pixels = torch.randn(2, 3, 13, 16)  # the last row is in no window of four
    with torch.inference_mode():
        for x in (pixels, pixels.to(memory_format=torch.channels_last)):
            torch.testing.assert_close(PackedPatches(convolution)(x), convolution(x), atol=1e-5, rtol=1e-5)
    assert is_of_patches(convolution)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 8, 1),
        nn.Conv2d(4, 8, 3, stride=2),
        nn.Conv2d(4, 8, 2, stride=2, padding=1),
        nn.Conv2d(4, 8, 2, stride=2, dilation=2),
        nn.Conv2d(4, 8, 2, stride=2, groups=2),
        nn.Linear(4, 8),
    ],
)
def test_what_is_no_convolution_of_patches(layer):
    assert not is_of_patches(layer)
