"""Parameter groups and the optimizer over them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

HEADS = "heads"


@dataclass
class OptimConfig:
    """AdamW. Weight decay applies to every trainable parameter, as in MoCo-v3."""

    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    # Where a cosine takes the weight decay over the run; leave it out to keep it as it is.
    weight_decay_end: float | None = None
    # Global gradient norm above which gradients are scaled down; 0 never clips.
    clip: float = 0.0

    def __post_init__(self) -> None:
        if self.weight_decay < 0 or self.clip < 0:
            raise ValueError(
                f"optim.weight_decay and optim.clip must not be negative, got {self.weight_decay:g} and {self.clip:g}."
            )
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"optim.betas must be two numbers in [0, 1), got {self.betas}; 0.9 and 0.999 are usual.")

    def weight_decay_at(self, progress: float) -> float:
        """Return the weight decay at `progress`: constant, or a cosine from the first value to the last."""
        if self.weight_decay_end is None:
            return self.weight_decay
        return self.weight_decay_end + (self.weight_decay - self.weight_decay_end) * (
            0.5 * (1 + math.cos(math.pi * progress))
        )


def layer_name(layer: int) -> str:
    """Return the name of a freezable layer's parameter group."""
    return f"layer{layer:02d}"


def parameter_groups(
    layers: Sequence[Iterable[nn.Parameter]], parameters: Iterable[nn.Parameter]
) -> list[dict[str, Any]]:
    """Return one named group per freezable layer and one for the rest, trainable parameters only."""
    groups = {layer_name(i): [p for p in layer if p.requires_grad] for i, layer in enumerate(layers)}
    in_layers = {id(p) for layer in layers for p in layer}
    groups[HEADS] = [p for p in parameters if p.requires_grad and id(p) not in in_layers]
    return [{"name": name, "params": members} for name, members in groups.items() if members]


def adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """Return the optimizer; the learning rate of each group is written at every step."""
    first, second = config.betas
    return torch.optim.AdamW(groups, lr=0.0, betas=(first, second), weight_decay=config.weight_decay)
