"""Ways of running an image tower: what takes the place of its layers, and what runs it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from low_precision import Bf16Linear, Fp8Linear, Int8Linear, MakeLinear
from open_clip.transformer import ResidualAttentionBlock
from torch import nn

SHIPPED = "eager (as shipped)"

Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One way of running a tower."""

    name: str
    make: MakeLinear | None = None
    """What takes the place of its linear layers; None leaves them and the attention as they are."""
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
    """All blocks share one compiled block: a twelfth of the work for a ViT-B."""
    for part in module.modules():
        if isinstance(part, ResidualAttentionBlock):
            part.compile(dynamic=False)
    return module


def frozen(module: nn.Module) -> Run:
    """Weights as constants, which on a CPU are laid out once as its products want them."""
    return _whole(module, options={"freezing": True})


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
    Way(name="eager, two batches at once", device="cuda", at_once=2),
    Way(name="CUDA graph", wrap=_graphed, device="cuda"),
    Way(name="compiled by block", wrap=_by_block, compiles=True),
    Way(name="own attention, compiled by block", make=Bf16Linear, wrap=_by_block, compiles=True),
    Way(name="fp8, compiled by block", make=Fp8Linear, wrap=_by_block, compiles=True),
    Way(name="int8, compiled by block", make=Int8Linear, wrap=_by_block, compiles=True),
    Way(name="own attention", make=Bf16Linear),
    Way(name="fp16", precision="fp16"),
    Way(name="fp8", make=Fp8Linear),
    Way(name="int8", make=Int8Linear),
    Way(name="compiled", wrap=_whole, compiles=True),
    Way(name="own attention, compiled, weights frozen", make=Bf16Linear, wrap=frozen, compiles=True, device="cpu"),
    Way(
        name="own attention, compiled, reduce-overhead",
        make=Bf16Linear,
        wrap=lambda module: _whole(module, mode="reduce-overhead"),
        compiles=True,
        device="cuda",
    ),
    Way(
        name="own attention, compiled, max-autotune",
        make=Bf16Linear,
        wrap=lambda module: _whole(module, mode="max-autotune-no-cudagraphs"),
        compiles=True,
        device="cuda",
        is_costly=True,
    ),
)
"""Those that may be worth most for their time first, in case it is up. Where nn.MultiheadAttention is compiled, it
takes its slow path, whose first layer is a product for every token in the graph of weights without gradients."""
