"""The last linear layer of an image tower, which brings features into the space shared with texts.

CLIP's linear probes are fitted to the features before it (Radford et al. 2021, arXiv:2103.00020, appendix A.3). In its
ResNets it is the output projection of the attention pooling, as one of the authors says (github.com/openai/CLIP, issue
51); in towers of timm, the layer that open_clip puts on the trunk, or the trunk's own classifier.
"""

from collections.abc import Callable

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn

Project = Callable[[torch.Tensor], torch.Tensor]
"""Features before the projection [N, W] to those after it [N, D]."""


def projected_width(visual: nn.Module) -> int | None:
    """W, dimensions of the features before the projection; None of a tower that ends in none."""
    place = _place(visual)
    if place is None:
        return None
    owner, name = place
    last = getattr(owner, name)
    if isinstance(last, nn.Parameter):
        return last.shape[0]
    return next(layer.in_features for layer in last.modules() if isinstance(layer, nn.Linear))


def cut_projection(visual: nn.Module) -> Project:
    """Take the projection out of a tower, which from then on gives the features before it.

    Returns:
        The projection.
    """
    place = _place(visual)
    assert place is not None
    owner, name = place
    last = getattr(owner, name)
    if isinstance(last, nn.Parameter):
        setattr(owner, name, None)
        return lambda features: features @ last
    setattr(owner, name, _identity(last) if isinstance(visual, ModifiedResNet) else nn.Identity())
    projection: Project = last
    return projection


def _place(visual: nn.Module) -> tuple[nn.Module, str] | None:
    """The module that has the projection, and under what name."""
    if isinstance(visual, VisionTransformer):
        return None if visual.proj is None else (visual, "proj")
    if isinstance(visual, ModifiedResNet):
        return visual.attnpool, "c_proj"
    if not isinstance(visual, TimmModel):
        return None
    for owner, name in ((visual.head, "proj"), (visual.head, "mlp"), (getattr(visual.head, "pool", None), "proj")):
        if isinstance(getattr(owner, name, None), nn.Module):
            assert owner is not None
            return owner, name
    classifier = visual.trunk.get_classifier()
    if not isinstance(classifier, nn.Linear):
        return None
    path = next(path for path, module in visual.named_modules() if module is classifier)
    owner_path, _, name = path.rpartition(".")
    return visual.get_submodule(owner_path), name


def _identity(linear: nn.Linear) -> nn.Linear:
    """A layer that changes nothing: the attention takes weights, not a module. Multiplying with one is exact."""
    width, weight = linear.in_features, linear.weight
    same = nn.Linear(width, width, device=weight.device, dtype=weight.dtype).requires_grad_(False)
    nn.init.eye_(same.weight)
    nn.init.zeros_(same.bias)
    return same
