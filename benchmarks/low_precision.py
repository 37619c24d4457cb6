"""Layers of 8 bits for a vision transformer of open_clip's, and weights that are hard on them; for `encode_paths.py`.

W8A8: weights have a scale for each output channel, activations one for each token, found anew at each call, so that
nothing has to be calibrated. Both the scale and the bias are applied to the product's wide result.
"""

import copy
from functools import cache
from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import nn

from clipindex.bench.ceilings import best_rate, synchronizer

OUTLIER_CHANNELS = 4
OUTLIER_FACTOR = 30.0
PRODUCT_TRIES = {"cpu": 5, "cuda": 1}
"""Of the bare product, each of some seconds; on cores that others use as well, the best of more."""

_INT8_MAX = 127.0
_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max
_LEAST_SCALE = 1e-12  # of a token of zeros


class Int8Linear(nn.Module):
    """int8 by int8 to int32 by `torch._int_mm`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        quantised, scale = _to_int8(weight.detach())
        # cuBLASLt wants the second matrix column by column; on a CPU row by row is a third faster.
        self.register_buffer("weight", quantised.t() if weight.is_cuda else quantised.t().contiguous())
        self.register_buffer("scale", scale[:, 0])
        self.register_buffer("bias", bias.detach().to(torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] to [..., N]."""
        quantised, scale = _to_int8(x.reshape(-1, x.shape[-1]))
        product = torch._int_mm(quantised, self.get_buffer("weight"))
        wide = product * scale * self.get_buffer("scale") + self.get_buffer("bias")
        return wide.to(x.dtype).reshape(*x.shape[:-1], -1)


class Fp8Linear(nn.Module):
    """e4m3 by e4m3 by `torch._scaled_mm`, with a scale for each row of either."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        quantised, scale = _to_fp8(weight.detach())
        self.register_buffer("weight", quantised.t())
        self.register_buffer("scale", scale.t().contiguous())
        self.register_buffer("bias", bias.detach().to(torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] to [..., N]."""
        quantised, scale = _to_fp8(x.reshape(-1, x.shape[-1]))
        product: torch.Tensor = torch._scaled_mm(
            quantised,
            self.get_buffer("weight"),
            scale_a=scale,
            scale_b=self.get_buffer("scale"),
            out_dtype=torch.bfloat16,
            use_fast_accum=x.is_cuda,
        )
        # The bias is not given to the product: which dtypes it takes beside scales of rows differs between versions.
        return (product + self.get_buffer("bias")).to(x.dtype).reshape(*x.shape[:-1], -1)


def eight_bit_linear(
    kind: type[nn.Module], weight: torch.Tensor, bias: torch.Tensor, activation: nn.Module | None
) -> nn.Module:
    """With the kind first, a `clipindex.towers.blocks.MakeLinear`."""
    layer = kind(weight, bias)
    return layer if activation is None else nn.Sequential(layer, activation)


@cache
def bare_8_bit(is_int8: bool, device: torch.device) -> float:
    """Operations/s of a square product of 8 bits, as `product_flops_per_s` measures it for 16."""
    size = 2048 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    scale = torch.ones(size, 1, device=device)

    def multiply() -> int:
        if is_int8:
            torch._int_mm(ints[0], ints[1])
        else:
            torch._scaled_mm(
                floats[0], floats[1], scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16, use_fast_accum=on_cuda
            )
        return 2 * size**3

    on_cuda = device.type == "cuda"
    ints = [(x * 30).clamp(-127, 127).to(torch.int8) for x in (left, right.t() if on_cuda else right)]
    floats = [left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()]
    return max(best_rate(multiply, synchronizer(device)) for _ in range(PRODUCT_TRIES[device.type]))


def with_outliers(tower: nn.Module, *, are_read: bool) -> nn.Module:
    """A copy of an image tower of random weights that has a few massive channels, as trained ones have.

    Trained transformers carry a handful of channels whose activations are tens of times the others' (Dettmers et al.,
    LLM.int8(), 2022; Sun et al., Massive Activations in Large Language Models, 2024, with CLIP's ViT-L among them);
    a token's largest value sets the scale of 8 bits, so the others lose by them. Here everything that writes to the
    residual stream writes `OUTLIER_FACTOR` times as much to `OUTLIER_CHANNELS` of it. The normalisations divide by
    the spread, which those channels make, so their gains are raised to give the others back the size they had.

    Args:
        tower: In fp32.
        are_read: Whether the layers after a normalisation weigh those channels like any other, so that the embedding
            is mostly theirs; or less by that factor, so that they carry no more than others do and only set scales.
            How much trained models make of theirs lies between the two.

    Raises:
        ValueError: the tower is not made of open_clip's usual blocks.
    """
    changed: Any = copy.deepcopy(tower)
    blocks = [part for part in changed.modules() if isinstance(part, ResidualAttentionBlock)]
    if not blocks:
        raise ValueError("no vision transformer of open_clip's usual blocks")
    width = len(changed.ln_pre.weight)
    massive = torch.arange(OUTLIER_CHANNELS) * (width // OUTLIER_CHANNELS) + width // (2 * OUTLIER_CHANNELS)
    spread = (1 + OUTLIER_CHANNELS * (OUTLIER_FACTOR**2 - 1) / width) ** 0.5
    with torch.no_grad():
        for layer in (changed.ln_pre, *(part for b in blocks for part in (b.attn.out_proj, b.mlp.c_proj))):
            layer.weight[massive] *= OUTLIER_FACTOR
            layer.bias[massive] *= OUTLIER_FACTOR
        for norm in (changed.ln_post, *(part for b in blocks for part in (b.ln_1, b.ln_2))):
            norm.weight *= spread
        if not are_read:
            for weight in (w for b in blocks for w in (b.attn.in_proj_weight, b.mlp.c_fc.weight)):
                weight[:, massive] /= OUTLIER_FACTOR
            changed.proj[massive] /= OUTLIER_FACTOR
    return changed  # type: ignore[no-any-return]


def _to_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [M, K] to int8 and their scales [M, 1]."""
    scale = x.abs().amax(1, keepdim=True).to(torch.float32).clamp_min(_LEAST_SCALE) / _INT8_MAX
    return (x / scale).round().to(torch.int8), scale


def _to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [M, K] to e4m3 and their scales [M, 1]."""
    scale = x.abs().amax(1, keepdim=True).to(torch.float32).clamp_min(_LEAST_SCALE) / _FP8_MAX
    return (x / scale).clamp(-_FP8_MAX, _FP8_MAX).to(_FP8), scale
