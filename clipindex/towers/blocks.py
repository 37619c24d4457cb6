"""open_clip's transformers with each product as its device does it fastest.

Nothing is computed that no embedding needs, and nothing else is left out: embeddings differ by rounding alone.
"""

from collections.abc import Callable

import torch
from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer
from torch import nn
from torch.nn import functional

from clipindex.towers.packed import FUSED, PackedLinear, can_pack, pack_layers

MakeLinear = Callable[[torch.Tensor, torch.Tensor, nn.Module | None], nn.Module]
"""Weights [N, K], a bias [N] and an activation to a layer, which takes [..., K] to [..., N]."""

_SCORES_BYTES = 1 << 23
"""Of attention on a CPU at once: they lie in its cache, however many tokens and images there are."""


def use_fast_blocks(tower: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Replace the layers of a tower, which is on its device in its precision, by faster ones that share its tensors.

    On a CPU the linear layers of all other towers are packed, too.

    Args:
        tower: An image tower, or a text tower; changed in place.
        device: Where it is.
        dtype: Of its weights.
    """
    is_packed = device.type == "cpu" and can_pack(dtype)
    replace_blocks(tower, packed_linear if is_packed else plain_linear)
    if is_packed:
        pack_layers(tower)


def replace_blocks(tower: nn.Module, make: MakeLinear) -> None:
    """Replace open_clip's usual residual blocks by `Block`, of linear layers that are made so; in place."""
    for part in tower.modules():
        if not isinstance(part, Transformer):
            continue
        last = len(part.resblocks) - 1
        ends_in_one = isinstance(tower, VisionTransformer) and part is tower.transformer and _pools_first(tower)
        for at, block in enumerate(part.resblocks):
            if type(block) is ResidualAttentionBlock:
                part.resblocks[at] = Block(block, make, first_only=ends_in_one and at == last)


class Block(nn.Module):
    """A residual attention block (Vaswani et al. 2017, normalised before; arXiv:2103.00020, section 2.4).

    Args:
        block: Whose tensors it takes.
        make: Makes its linear layers.
        first_only: Give the first token alone, for a tower that takes no other from its last block. Queries and all
            that comes after the attention are then computed for that one only: of twelve blocks, a fourteenth.
    """

    def __init__(self, block: ResidualAttentionBlock, make: MakeLinear, *, first_only: bool = False) -> None:
        super().__init__()
        attention, dim = block.attn, block.attn.embed_dim
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        self._heads, self._head_dim = attention.num_heads, dim // attention.num_heads
        self._dtype: torch.dtype = weight.dtype
        self._norm_1, self._norm_2 = block.ln_1, block.ln_2
        self._scale_1, self._scale_2 = block.ls_1, block.ls_2
        self._query = make(weight[:dim], bias[:dim], None) if first_only else None
        self._in_proj = make(weight[dim:], bias[dim:], None) if first_only else make(weight, bias, None)
        self._out_proj = make(attention.out_proj.weight, attention.out_proj.bias, None)
        self._widen = make(block.mlp.c_fc.weight, block.mlp.c_fc.bias, block.mlp.gelu)
        self._narrow = make(block.mlp.c_proj.weight, block.mlp.c_proj.bias, None)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens [N, L, D] to the same, or [N, 1, D]; the mask is added to scores, [L, L] or [N * heads, L, L]."""
        normed = self._norm_1(x)
        if self._query is None:
            query, key, value = self._split(self._in_proj(normed))
        else:
            x, first = x[:, :1], normed[:, :1]
            (query,), (key, value) = self._split(self._query(first)), self._split(self._in_proj(normed))
        x = x + self._scale_1(self._out_proj(attend(query, key, value, attn_mask)))
        mixed: torch.Tensor = x + self._scale_2(self._narrow(self._widen(self._norm_2(x))))
        return mixed

    def get_weight_dtype(self) -> torch.dtype:
        """What open_clip's text towers ask their first block for."""
        return self._dtype

    def _split(self, projected: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[N, L, P * heads * d] to P views [N, heads, L, d]."""
        parts = projected.view(*projected.shape[:2], -1, self._heads, self._head_dim)
        return tuple(parts.permute(2, 0, 3, 1, 4))


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """softmax(query key' / sqrt(d) + mask) value, heads side by side: [N, heads, L, d] to [N, L, heads * d].

    On a CPU by two batched products, some images at a time: measured on Zen 5 in bf16, 50 to 1,370 tokens of 64
    dimensions a head, scaled_dot_product_attention takes twice as long; in float32 as long, or longer for few tokens.

    Args:
        query: [N, heads, L, d].
        key: [N, heads, M, d].
        value: [N, heads, M, d].
        mask: Added to scores, [L, M] or [N * heads, L, M].
    """
    if mask is not None:
        mask = mask.to(query.dtype)
    return (_attend_by_products if query.device.type == "cpu" else attend_fused)(query, key, value, mask)


def attend_fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """`attend` by PyTorch's scaled_dot_product_attention."""
    if mask is not None and mask.ndim == 3:
        mask = mask.view(*query.shape[:2], *mask.shape[1:])
    return functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)


def _attend_by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    number, heads, length, dim = query.shape
    mixed = query.new_empty(number, length, heads, dim)
    step = max(1, _SCORES_BYTES // (heads * length * key.shape[2] * query.element_size()))
    offset = query.new_zeros(1) if mask is None else mask
    for at in range(0, number, step):
        # Images and heads in one dimension, as batched products want them.
        flat_query, flat_key, flat_value = (part[at : at + step].flatten(0, 1) for part in (query, key, value))
        some = offset[at * heads : (at + step) * heads] if offset.ndim == 3 else offset
        scores = torch.baddbmm(
            some, flat_query, flat_key.transpose(1, 2), beta=0 if mask is None else 1, alpha=dim**-0.5
        )
        found = torch.bmm(torch.softmax(scores, dim=-1), flat_value)
        mixed[at : at + step] = found.view(-1, heads, length, dim).transpose(1, 2)
    return mixed.flatten(2)


def packed_linear(weight: torch.Tensor, bias: torch.Tensor, activation: nn.Module | None) -> nn.Module:
    """A `MakeLinear` for CPUs of which `can_pack` holds."""
    if activation is None or type(activation) in FUSED:
        return PackedLinear(weight, bias, activation)
    return nn.Sequential(PackedLinear(weight, bias), activation)


def plain_linear(weight: torch.Tensor, bias: torch.Tensor, activation: nn.Module | None) -> nn.Module:
    """A `MakeLinear` for all devices."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias))
    return layer if activation is None else nn.Sequential(layer, activation)


def _pools_first(tower: VisionTransformer) -> bool:
    """Whether nothing but the first token leaves the tower."""
    return tower.pool_type == "tok" and tower.attn_pool is None and not tower.output_tokens
