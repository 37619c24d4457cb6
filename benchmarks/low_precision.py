"""Layers of 8 bits for a vision transformer of open_clip's, and weights that are hard on them; for `encode_paths.py`.

W8A8: weights have a scale for each output channel, activations one for each token, found anew at each call, so that
nothing has to be calibrated. Both the scale and the bias are applied to the product's wide result.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import nn
from torch.nn import functional

OUTLIER_CHANNELS = 4
OUTLIER_FACTOR = 30.0

_INT8_MAX = 127.0
_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max
_LEAST_SCALE = 1e-12  # of a token of zeros

MakeLinear = Callable[[torch.Tensor, torch.Tensor], nn.Module]
"""Weights [N, K] and bias [N] to a layer."""


class Bf16Linear(nn.Module):
    """As nn.Linear; so that what another attention brings, compiled above all, can be told from what 8 bits bring."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] to [..., N]."""
        return functional.linear(x, self.get_buffer("weight"), self.get_buffer("bias"))


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


class Attention(nn.Module):
    """Self-attention without a mask, as a ResidualAttentionBlock calls it, of layers that may be replaced."""

    def __init__(self, attention: nn.MultiheadAttention, make: MakeLinear) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.in_proj = make(attention.in_proj_weight, attention.in_proj_bias)
        self.out_proj = make(attention.out_proj.weight, attention.out_proj.bias)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: object
    ) -> tuple[torch.Tensor, None]:
        """[N, L, D] to the same and no weights; all three are one tensor, and there is no mask."""
        number, length, dim = query.shape
        projected = self.in_proj(query).view(number, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = projected.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.out_proj(mixed.transpose(1, 2).reshape(number, length, dim)), None


def rewritten(tower: nn.Module, make: MakeLinear) -> nn.Module:
    """A copy of a tower whose attentions and linear layers, where nearly all of its products are, are made anew.

    Raises:
        ValueError: the tower is not made of open_clip's usual blocks.
    """
    tower = copy.deepcopy(tower)
    blocks = [part for part in tower.modules() if isinstance(part, ResidualAttentionBlock)]
    if not blocks:
        raise ValueError("no vision transformer of open_clip's usual blocks")
    for block in blocks:
        block.attn = Attention(block.attn, make)
        for name in ("c_fc", "c_proj"):
            layer: Any = getattr(block.mlp, name)
            setattr(block.mlp, name, make(layer.weight, layer.bias))
    return tower


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
        ValueError: as `rewritten`.
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
