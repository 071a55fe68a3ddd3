"""Parameter groups and the optimizer over them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

HEADS = "heads"
LAST_LAYER = "last_layer"
# Ends the name of a group whose tensors have no weight decay.
VECTORS = "_vectors"


@dataclass
class OptimConfig:
    """AdamW, as MoCo-v3 uses it unless told otherwise."""

    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    # Where a cosine takes the weight decay over the run; leave it out to keep it as it is.
    weight_decay_end: float | None = None
    # Whether biases and all other tensors of one dimension decay too, as in MoCo-v3; not so in DINO and LocalMIM.
    decay_vectors: bool = True
    # Global gradient norm above which gradients are scaled down; 0 never clips.
    clip: float = 0.0
    # The same for the gradient of each tensor on its own (DINO: 3); 0 never clips.
    clip_each: float = 0.0

    def __post_init__(self) -> None:
        if not all(0 <= value < math.inf for value in (self.weight_decay, self.clip, self.clip_each)):
            raise ValueError(
                "optim.weight_decay, optim.clip and optim.clip_each must be finite numbers of at least 0, "
                f"got {self.weight_decay:g}, {self.clip:g} and {self.clip_each:g}."
            )
        if self.weight_decay_end is not None and not 0 <= self.weight_decay_end < math.inf:
            raise ValueError(
                f"optim.weight_decay_end must be a finite number of at least 0, got {self.weight_decay_end:g}; "
                "leave it out to keep optim.weight_decay."
            )
        if self.clip and self.clip_each:
            raise ValueError(
                "optim.clip (global norm) and optim.clip_each (norm of each tensor) exclude each other, "
                f"got {self.clip:g} and {self.clip_each:g}; set one of them to 0."
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


def attached_name(layer: int) -> str:
    """Return the name of the group of what goes with a freezable layer at the global rate."""
    return f"attached{layer:02d}"


def parameter_groups(
    layers: Sequence[Iterable[nn.Parameter]],
    parameters: Iterable[nn.Parameter],
    last_layer: Iterable[nn.Parameter] = (),
    attached: Mapping[int, Iterable[nn.Parameter]] | None = None,
    *,
    decay_vectors: bool = True,
    undecayed: Iterable[nn.Parameter] = (),
) -> list[dict[str, Any]]:
    """Return one named group per freezable layer, one for what is attached to it, for the last layer, and for the rest.

    Trainable parameters only. Those of `undecayed`, and without `decay_vectors` all of at most one dimension, are
    groups of their own, whose names end in `VECTORS`. ZeRO talks once per group, so there are no more than have to be.
    """
    members = {layer_name(i): list(layer) for i, layer in enumerate(layers)}
    members |= {attached_name(i): list(each) for i, each in (attached or {}).items()}
    members[LAST_LAYER] = list(last_layer)
    taken = {id(p) for group in members.values() for p in group}
    members[HEADS] = [p for p in parameters if id(p) not in taken]
    exempt = {id(p) for p in undecayed}
    groups = []
    for name, group in members.items():
        learning = [p for p in group if p.requires_grad]
        vectors = [p for p in learning if id(p) in exempt or (not decay_vectors and _is_vector(p))]
        kept = {id(p) for p in vectors}
        others = [p for p in learning if id(p) not in kept]
        groups += [{"name": name, "params": others}, {"name": name + VECTORS, "params": vectors}]
    return [group for group in groups if group["params"]]


def _is_vector(parameter: nn.Parameter) -> bool:
    # Under ZeRO 3 a parameter that is not gathered is empty, and remembers its shape.
    return len(getattr(parameter, "ds_shape", parameter.shape)) <= 1


def adamw(groups: list[dict[str, Any]], config: OptimConfig, *, on_host: bool = False) -> torch.optim.AdamW:
    """Return the optimizer; the learning rate of each group is written at every step.

    `on_host`: what it steps will be there, wherever the parameters are.
    """
    first, second = config.betas
    on_host = on_host or all(p.device.type == "cpu" for group in groups for p in group["params"])
    # On a CPU the default is several passes over the memory, which is what the step waits for; of a GPU it is up to
    # PyTorch.
    fused = True if on_host else None
    return torch.optim.AdamW(groups, lr=0.0, betas=(first, second), weight_decay=config.weight_decay, fused=fused)
