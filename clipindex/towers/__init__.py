"""A model's towers made for a device: in its precision, with layers that it is fast at."""

from clipindex.towers.blocks import plain_linear, replace_blocks, use_fast_layers
from clipindex.towers.packed import PackedLinear, can_pack
from clipindex.towers.placement import placed

__all__ = ["PackedLinear", "can_pack", "placed", "plain_linear", "replace_blocks", "use_fast_layers"]
