"""What a self-supervised method is to the rest of the house."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor, nn

from data.views import ViewSpec
from pipeline.compression import Compression
from pipeline.models.vit import ViT
from pipeline.schedules import StepPlan


class Batch(Protocol):
    """What a method reads of a batch."""

    @property
    def views(self) -> tuple[Tensor, ...]:
        """Return one [B, 3, S, S] per declared view."""

    @property
    def index(self) -> Tensor:
        """Return the global sample indices [B]."""


@dataclass(frozen=True)
class StepOutput:
    """The loss to minimize and what is worth logging, both of this process's part of the batch."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Method(nn.Module):
    """A self-supervised objective around a backbone.

    Owns no optimizer, logger or loader, and `forward` has no side effect, so that it can be called to
    look at gradients without training.
    """

    encoder: ViT

    def views(self) -> Sequence[ViewSpec]:
        """Return the augmented views that a batch must bring."""
        raise NotImplementedError

    def forward(self, batch: Batch, plan: StepPlan) -> StepOutput:
        """Return the loss of this process's part of the global batch."""
        raise NotImplementedError

    def after_step(self, plan: StepPlan) -> None:
        """Do what follows an applied optimizer step."""

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move what the engine does not own to where it computes."""

    def layers(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each layer that can freeze, in freezing order."""
        return self.encoder.layers()

    def momentum(self, progress: float) -> float:
        """Return the momentum of the target network at `progress`."""
        return 1.0

    def key_compression(self, query: Compression) -> Compression:
        """Return the compression of the target side, given the query side's."""
        return query

    def sample_cost(self, plan: StepPlan) -> float:
        """Return the forwards of the reference sequence that one sample costs, by real token counts."""
        raise NotImplementedError

    def nominal_sample_cost(self, plan: StepPlan) -> float:
        """Return the same by the paper's formula: lengths not rounded, nothing frozen."""
        raise NotImplementedError

    def tokens(self, plan: StepPlan) -> int:
        """Return the tokens that enter backbones for one sample, all forwards together."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Return the state outside the engine's reach, by name, equal on every process."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        assert not state


def frozen_share(plan: StepPlan, num_blocks: int) -> Fraction:
    """Return the share of the blocks that lie in the frozen prefix; the embedding is not counted."""
    return Fraction(max(0, plan.frozen_layers - 1), num_blocks)
