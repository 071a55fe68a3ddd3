"""Running a transformer block: eagerly, or compiled with one graph for each shape."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Beyond it PyTorch would stop compiling. A run has a graph for each of its few shapes, with and without gradient.
MAX_GRAPHS = 4096

log = logging.getLogger(__name__)


def run_block(block: Any, tokens: Tensor, scales: Tensor | None) -> Tensor:
    """Run tokens [B, L, D] through a block; `scales` [2, B] multiply the branches of timm's plain Block, per sample."""
    if scales is None:
        output: Tensor = block(tokens)
        return output
    attention, mlp = scales.to(tokens.dtype)[..., None, None]
    tokens = tokens + attention * block.ls1(block.attn(block.norm1(tokens)))
    tokens = tokens + mlp * block.ls2(block.mlp(block.norm2(tokens)))
    return tokens


class EagerBlocks:
    """Runs blocks as they are."""

    recompiles = 0

    def __call__(self, block: nn.Module, tokens: Tensor, scales: Tensor | None) -> Tensor:
        """Return what `run_block` does."""
        return run_block(block, tokens, scales)


class CompiledBlocks(EagerBlocks):
    """Runs blocks in training mode through torch.compile, and counts its graphs.

    One function is compiled, not each block: equal blocks, and those of a momentum encoder, share the graphs of
    a shape. Modules stay as they are, so that names of parameters and deep copies do, too. In evaluation mode,
    whose batches have sizes of their own, blocks run eagerly.
    """

    def __init__(self, backend: str = "inductor") -> None:
        limits = torch._dynamo.config
        limits.recompile_limit = limits.accumulated_recompile_limit = MAX_GRAPHS
        self.graphs = 0
        self.recompiles = 0
        self._foreseen = True
        self._shape = torch.Size()
        self._backend: Callable[..., Any] = torch._dynamo.lookup_backend(backend)
        self._compiled = torch.compile(run_block, backend=self._compile, dynamic=False, fullgraph=True)

    def __call__(self, block: nn.Module, tokens: Tensor, scales: Tensor | None) -> Tensor:
        """Return what `run_block` does, up to rounding."""
        if not block.training:
            return run_block(block, tokens, scales)
        self._shape = tokens.shape
        return self._compiled(block, tokens, scales)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledBlocks:
        # Copies of a backbone share its graphs.
        return self

    def seal(self) -> None:
        """Say that every foreseen graph is there: what is compiled from now on is counted and logged."""
        self._foreseen = False

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        if not self._foreseen:
            self.recompiles += 1
            log.warning(
                "blocks compiled anew for [rows, tokens, width] = %s %s gradient: a shape that no plan told of",
                list(self._shape),
                "with" if torch.is_grad_enabled() else "without",
            )
        return self._backend(graph, inputs)
