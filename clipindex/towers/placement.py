"""A module's tensors on a device, in a precision."""

import copy
from collections.abc import Iterator, Sequence

import torch
from open_clip.transformer import QuickGELU
from torch import nn

_QUICK_GELU_SLOPE = 1.702  # QuickGELU(x) = x * sigmoid(1.702 x), Hendrycks & Gimpel 2016


def placed(module: nn.Module, device: torch.device, dtype: torch.dtype, without: Sequence[nn.Module] = ()) -> nn.Module:
    """A copy of a module whose tensors are on a device in a precision; tensors that need no change are shared.

    The tensors are put where deepcopy looks for what it has copied already, so there is never a second fp32
    copy, and the modules in `without` are replaced by nothing in the same way.

    Args:
        module: Of floating-point tensors in fp32.
        device: Where to.
        dtype: Of those that may be of few bits; normalisations stay in fp32 where that costs nothing.
        without: Parts of it that are not wanted.
    """
    if device.type == "cuda" and dtype == torch.float32:
        # PyTorch lets convolutions round their float32 inputs to 10 bits, for the whole process or not at all.
        torch.backends.cudnn.allow_tf32 = False
    left_out = {id(part) for root in without for part in root.modules()}
    memo: dict[int, object] = {id(root): nn.Identity() for root in without}
    scales = {} if dtype == torch.float32 else dict(_fold_quick_gelu(module, memo))
    for part in module.modules():
        if id(part) in left_out:
            continue
        kept = dtype if _takes_low_precision(part, device) else torch.float32
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            scale = scales.get(id(tensor), 1.0)
            memo[id(tensor)] = _converted(tensor, device, kept, scale)
    return copy.deepcopy(module, memo)


def _takes_low_precision(part: nn.Module, device: torch.device) -> bool:
    """Whether a module's own tensors may be of 16 bits.

    All do but those of normalisations, whose arithmetic is in fp32 in every case. BatchNorm takes 16-bit
    pixels with fp32 statistics on every device. LayerNorm and GroupNorm do so on the CPU in one pass; CUDA
    wants one dtype, and its kernels widen to fp32 inside, so there rounding the two vectors is all that 16
    bits cost, where widening the input by hand would move five times the bytes.
    """
    if isinstance(part, nn.modules.batchnorm._BatchNorm):
        return False
    if isinstance(part, (nn.LayerNorm, nn.GroupNorm)):
        return device.type == "cuda" and not type(part).__name__.endswith("Fp32")
    return True


def _fold_quick_gelu(module: nn.Module, memo: dict[int, object]) -> Iterator[tuple[int, float]]:
    """Turn each QuickGELU into one fused SiLU by scaling the two layers around it, before they are rounded.

    x sigmoid(a x) = silu(a x) / a, so a goes into the layer before and 1/a into the layer after. QuickGELU
    is three passes over the widest activation: 2 % of a bf16 ViT-B/32's time on a CPU, and by the bytes they
    move about a fifth of it on a GPU whose matrix products are faster.
    """
    for part in module.modules():
        if not isinstance(part, nn.Sequential) or not isinstance(getattr(part, "gelu", None), QuickGELU):
            continue
        layers = [layer for layer in part if not isinstance(layer, (nn.Identity, QuickGELU))]
        if len(layers) != 2 or not all(isinstance(layer, nn.Linear) for layer in layers):
            continue
        before, after = layers
        memo[id(part.gelu)] = nn.SiLU(inplace=True)
        yield id(before.weight), _QUICK_GELU_SLOPE
        yield id(before.bias), _QUICK_GELU_SLOPE
        yield id(after.weight), 1 / _QUICK_GELU_SLOPE


def _converted(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """The tensor itself where nothing changes; integers keep their dtype."""
    kept = dtype if tensor.is_floating_point() else tensor.dtype
    if scale == 1 and tensor.device == device and tensor.dtype == kept:
        return tensor
    moved = (tensor if scale == 1 else tensor * scale).to(device, kept)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
