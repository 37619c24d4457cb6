"""Ways of running an image tower: what takes the place of its layers, and what runs it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from low_precision import Fp8Linear, Int8Linear
from torch import nn

from clipindex.towers.blocks import Block

SHIPPED = "eager (as shipped)"

Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One way of running a tower."""

    name: str
    layer: type[nn.Module] = nn.Linear
    """What its blocks multiply by."""
    is_open_clips: bool = False
    """Whether the blocks are those of open_clip."""
    wrap: Callable[[nn.Module], Run] | None = None
    """What runs it."""
    compiles: bool = False
    precision: str = "bf16"
    device: str | None = None
    """Type of the only devices that it is for."""
    at_once: int = 1
    """Batches, each in a thread and a stream of its own."""
    is_costly: bool = False


def _whole(module: nn.Module, **options: Any) -> Run:  # noqa: ANN401
    return torch.compile(module, dynamic=False, **options)


def _by_block(module: nn.Module) -> Run:
    """All blocks but the last share one compiled block: a sixth of the work for a ViT-B."""
    for part in module.modules():
        if isinstance(part, Block):
            part.compile(dynamic=False)
    return module


def frozen(module: nn.Module) -> Run:
    """Weights as constants, which on a CPU are laid out once as its products want them."""
    return _whole(module, options={"freezing": True})


def without_cudnn_attention(module: nn.Module) -> Run:
    """Attention by one of PyTorch's own kernels, which prepare for no shape."""

    def run(x: torch.Tensor) -> torch.Tensor:
        before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
        torch.backends.cuda.enable_cudnn_sdp(False)  # of the whole process: the shipped way runs in turn with this one
        try:
            return module(x)  # type: ignore[no-any-return]
        finally:
            torch.backends.cuda.enable_cudnn_sdp(before)

    return run


def _graphed(module: nn.Module) -> Run:
    """Replays the kernels of the first call."""
    held: list[tuple[Any, torch.Tensor, torch.Tensor]] = []

    def run(x: torch.Tensor) -> torch.Tensor:
        if not held:
            held.append(_captured(module, x))
        graph, still, out = held[0]
        still.copy_(x)
        graph.replay()
        return out

    return run


def _captured(module: nn.Module, x: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor]:
    still = x.clone()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            module(still)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(still)
    return graph, still, out


WAYS = (
    Way(name=SHIPPED),
    Way(name="open_clip's blocks", is_open_clips=True),
    Way(name="eager, without cuDNN's attention", wrap=without_cudnn_attention, device="cuda"),
    Way(name="CUDA graph", wrap=_graphed, device="cuda"),
    Way(name="compiled by block", wrap=_by_block, compiles=True),
    Way(name="fp8, compiled by block", layer=Fp8Linear, wrap=_by_block, compiles=True),
    Way(name="int8, compiled by block", layer=Int8Linear, wrap=_by_block, compiles=True),
    Way(name="compiled", wrap=_whole, compiles=True),
    Way(name="eager, two batches at once", device="cuda", at_once=2),
    Way(name="weights not packed", device="cpu"),
    Way(name="fp16", precision="fp16", device="cuda"),
    Way(name="fp8", layer=Fp8Linear),
    Way(name="int8", layer=Int8Linear),
    Way(name="open_clip's blocks, compiled", is_open_clips=True, wrap=_whole, compiles=True),
    Way(name="compiled, weights frozen", wrap=frozen, compiles=True, device="cpu"),
    Way(
        name="compiled, reduce-overhead",
        wrap=lambda module: _whole(module, mode="reduce-overhead"),
        compiles=True,
        device="cuda",
    ),
    Way(
        name="compiled, max-autotune",
        wrap=lambda module: _whole(module, mode="max-autotune-no-cudagraphs"),
        compiles=True,
        device="cuda",
        is_costly=True,
    ),
)
"""Those that may be worth most for their time first, in case it is up. Where open_clip's own blocks are compiled,
nn.MultiheadAttention takes its slow path, whose first layer is a product for every token where weights want no
gradients. On a CPU the shipped blocks have packed weights, and all others plain ones."""
