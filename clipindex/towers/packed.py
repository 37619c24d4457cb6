"""Layers on a CPU with their weights laid out once, as oneDNN wants them."""

import platform
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

_ROWS = 1024
"""Tokens of a batch, about: what weights are laid out for. With others products are right, and nearly as fast."""
FUSED: dict[type[nn.Module], str] = {nn.GELU: "gelu", nn.SiLU: "swish", nn.ReLU: "relu"}
"""Activations that oneDNN computes with the product, as PyTorch's operator names them."""


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether PyTorch's operators for oneDNN are those known here, and multiply such numbers; measured on x86 alone."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        with torch.inference_mode():
            one = torch.ones(1, 1, dtype=dtype)
            return float(PackedLinear(one, one[0], nn.ReLU())(one)) == 2
    except (AttributeError, RuntimeError, TypeError):  # of another version, or for other processors
        return False


def pack_layers(tower: nn.Module) -> None:
    """Pack linear layers and convolutions of patches, each when it is first called.

    They stay what they are, and keep their tensors, since other modules ask for either; some are never called. So their
    weights are in memory twice.
    """
    for layer in tower.modules():
        if type(layer) is nn.Linear:
            _pack_when_called(layer, lambda layer: PackedLinear(layer.weight, layer.bias))
        elif is_of_patches(layer):
            _pack_when_called(layer, PackedPatches)


def _pack_when_called(layer: Any, pack: Callable[[Any], nn.Module]) -> None:  # noqa: ANN401
    def forward(x: torch.Tensor) -> torch.Tensor:
        layer.forward = pack(layer).forward
        result: torch.Tensor = layer.forward(x)
        return result

    layer.forward = forward


class PackedLinear(nn.Module):
    """A linear layer on a CPU whose weights oneDNN has laid out once, with the activation in the same pass.

    PyTorch lays weights of 16 bits out anew for each product, and gives float32 to MKL, which on AMD's processors does
    less than half of what they can: measured on Zen 5, 1.2 and 2.2 times as fast. The operators are those that
    PyTorch's own compiler puts in (torch._inductor.mkldnn_ir), which takes 16 s to do so.

    Args:
        weight: [N, K].
        bias: [N].
        activation: nn.GELU, nn.SiLU, nn.ReLU or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: nn.Module | None = None) -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)
        self._bias = None if bias is None else bias.detach().clone()  # no view, which would keep what it is a part of
        self._activation = "none" if activation is None else FUSED[type(activation)]
        self._algorithm = getattr(activation, "approximate", "")  # of GELU

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] to [..., N]."""
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self._bias, self._activation, [], self._algorithm
        )
        return product


class PackedPatches(nn.Module):
    """A convolution on a CPU whose windows do not overlap, as a linear layer of patches: half of its time, or less.

    Args:
        convolution: One of which `is_of_patches` holds.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self._size = convolution.kernel_size
        self._linear = PackedLinear(convolution.weight.permute(0, 2, 3, 1).flatten(1), convolution.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] to [N, D, rows, columns], both channels_last."""
        height, width = self._size
        rows, columns = x.shape[2] // height, x.shape[3] // width
        whole = x[:, :, : rows * height, : columns * width].permute(0, 2, 3, 1)
        patches = whole.reshape(len(x), rows, height, columns, width, -1).transpose(2, 3)
        projected: torch.Tensor = self._linear(patches.reshape(len(x), rows, columns, -1))
        return projected.permute(0, 3, 1, 2)


def is_of_patches(layer: nn.Module) -> bool:
    """Whether a layer is a convolution of windows that lie side by side, and cover all but an edge.

    Windows of one pixel are left out: as a convolution they are as fast.
    """
    if type(layer) is not nn.Conv2d or layer.kernel_size == (1, 1):
        return False
    sizes = layer.stride == layer.kernel_size and layer.dilation == (1, 1)
    return sizes and layer.padding in ((0, 0), "valid") and layer.groups == 1
