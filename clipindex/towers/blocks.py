"""open_clip's transformers with each product as its device does it fastest; embeddings differ by rounding alone."""

from collections.abc import Callable

import torch
from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer
from torch import nn
from torch.nn import functional

from clipindex.towers.packed import FUSED, PackedLinear, can_pack, pack_layers

MakeLinear = Callable[[torch.Tensor, torch.Tensor, nn.Module | None], nn.Module]
"""Weights [N, K], a bias [N] and an activation to a layer, which takes [..., K] to [..., N]."""

_SCORES_BYTES = 1 << 22
"""Of attention on a core at once, or of one head: more do not fit into its cache."""


def use_fast_layers(tower: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Let a tower, which is on its device in its precision, use faster layers and blocks.

    Last of all: where layers are packed, it can then be neither copied, moved nor given other weights.

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

    Without a mask on a CPU by two batched products, some heads at a time. On Zen 5, 50 to 1,370 tokens of 64 dimensions
    a head, scaled_dot_product_attention takes twice as long in bf16; in float32 as long, or longer for few tokens. In
    16 bits the scores are rounded, as they are where nn.MultiheadAttention attends.

    Args:
        query: [N, heads, L, d].
        key: [N, heads, M, d].
        value: [N, heads, M, d].
        mask: Added to scores, [L, M] or [N * heads, L, M].
    """
    if mask is None and query.device.type == "cpu":
        return _attend_by_products(query, key, value)
    if mask is not None:
        mask = mask.to(query.dtype)
        mask = mask.view(*query.shape[:2], *mask.shape[1:]) if mask.ndim == 3 else mask
    return functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)


def _attend_by_products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    number, heads, length, dim = query.shape
    # Images and heads in one dimension, as batched products want them.
    queries, keys, values = (part.flatten(0, 1) for part in (query, key, value))
    mixed = torch.empty_like(queries)
    threads = torch.get_num_threads()
    step = max(threads, threads * _SCORES_BYTES // (length * key.shape[2] * query.element_size()))
    unread = query.new_empty(1)  # what would be added to the scores, times nothing
    for at in range(0, number * heads, step):
        some = slice(at, at + step)
        scores = torch.baddbmm(unread, queries[some], keys[some].transpose(1, 2), beta=0, alpha=dim**-0.5)
        torch.bmm(torch.softmax(scores, dim=-1), values[some], out=mixed[some])
    return mixed.view(number, heads, length, dim).transpose(1, 2).flatten(2)


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
