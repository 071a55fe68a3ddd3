"""What a self-supervised method is to the rest of the house."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from data.views import ViewSpec
from pipeline.compression import Compression
from pipeline.models.momentum import MomentumEncoder
from pipeline.models.vit import ViT
from pipeline.schedules import StepPlan


class Batch(Protocol):
    """What a method reads of a batch."""

    @property
    def views(self) -> tuple[Tensor, ...]:
        """Return one [B, 3, S, S] per declared view."""

    @property
    def labels(self) -> Tensor | None:
        """Return the classes [B], None of an unlabeled set."""

    @property
    def index(self) -> Tensor:
        """Return the global sample indices [B]."""


@dataclass(frozen=True)
class StepOutput:
    """The loss to minimize and what is worth logging, both of this process's part of the batch.

    ``pending``: what `Method.after_step` takes over if the step is applied, equal on every process.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    pending: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Forward:
    """One pass of one view of a sample through a backbone; `learns`: a backward follows."""

    image_size: int
    compression: Compression
    learns: bool


@dataclass(frozen=True)
class Message:
    """So many fp32 numbers that each process brings to a collective of a forward.

    What is gathered comes as it is, else as a sum; `learns`: gradients of what was gathered return by a reduction.
    """

    numbers: int
    gathered: bool = True
    learns: bool = False


class Method(nn.Module):
    """An objective around a backbone: self-supervised as a rule, and then it does not look at labels.

    Owns no optimizer, logger or loader, and `forward` has no side effect, so that it can be called to
    look at gradients without training.
    """

    encoder: ViT
    # Why there is no compressing its sequences; empty where there is.
    incompressible: ClassVar[str] = ""
    # How many classes it learns to tell apart; 0 where it takes no labels.
    classes: int = 0
    # Why the loss of a batch is not the mean of those of its parts; empty where it is.
    whole_batch: str = ""
    # Of this many samples is what goes through the networks at once a multiple.
    multiple: int = 1

    def views(self) -> Sequence[ViewSpec]:
        """Return the augmented views that a batch must bring."""
        raise NotImplementedError

    def forward(self, batch: Batch, plan: StepPlan) -> StepOutput:
        """Return the loss of this process's part of the global batch."""
        raise NotImplementedError

    def after_step(self, plan: StepPlan, output: StepOutput) -> None:
        """Do what follows an applied optimizer step; `output` is what `forward` returned."""

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move what the engine does not own to where it computes."""

    def forwards(self, plan: StepPlan) -> Sequence[Forward]:
        """Return every pass through a backbone that one sample takes; costs follow from it."""
        raise NotImplementedError

    def head_flops(self, plan: StepPlan) -> int:
        """Return the FLOPs of one sample behind the backbones, forward and backward: heads, decoders."""
        raise NotImplementedError

    def messages(self, samples: int) -> Sequence[Message]:
        """Return what each process tells the others in a step, where each of them has so many samples."""
        return ()

    def shared_layers(self, plan: StepPlan) -> int:
        """Return the first layers whose output a momentum encoder takes over instead of computing it again."""
        return 0

    def layers(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each layer that can freeze, in freezing order."""
        return self.encoder.layers()

    def attached(self) -> dict[int, list[nn.Parameter]]:
        """Return, by layer, parameters outside the layers that learn at the global rate until that layer freezes."""
        return {}

    def undecayed(self) -> list[nn.Parameter]:
        """Return parameters without weight decay, whatever their shape."""
        return []

    def last_layer(self) -> list[nn.Parameter]:
        """Return the parameters that learn at `StepPlan.last_layer_rate`."""
        return []

    @property
    def representation(self) -> ViT:
        """Return the backbone whose features are evaluated."""
        return self.encoder

    def momentum(self, progress: float) -> float:
        """Return the momentum of the target network at `progress`."""
        return 1.0

    def teacher_temperature(self, progress: float) -> float:
        """Return the softmax temperature of the teacher at `progress`."""
        return 1.0

    def last_layer_learns(self, progress: float) -> bool:
        """Return whether the last layer has started to learn at `progress`."""
        return True

    def key_compression(self, query: Compression) -> Compression:
        """Return the compression of the key side by the method's own rule, given the query side's."""
        return query

    def momentum_encoders(self) -> Sequence[MomentumEncoder]:
        """Return the averages of networks that this method keeps; `state` has their parameters by the same names."""
        return ()

    def state(self) -> dict[str, Tensor]:
        """Return the state outside the engine's reach, by name, equal on every process.

        Of a momentum encoder that is cut it is this process's part.
        """
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        assert not state

    def sample_cost(self, plan: StepPlan) -> float:
        """Return the forwards of the reference sequence that one sample costs, by real token counts.

        A backward is two forwards (Table 1 of Lin et al., 2024); that of the frozen prefix is not run.
        """
        learning = 3 - 2 * _frozen_share(plan, len(self.encoder.blocks))
        vit = self.encoder.config
        total = sum(
            (learning if each.learns else 1) * each.compression.sequence_length(each.image_size, vit.patch_size)
            for each in self.forwards(plan)
        )
        return float(total / Fraction(vit.reference_length))

    def nominal_sample_cost(self, plan: StepPlan) -> float:
        """Return the same by the formula of Table 1 of Lin et al., 2024: lengths not rounded, nothing frozen."""
        vit = self.encoder.config
        total = sum(
            (3 if each.learns else 1) * each.compression.nominal_length(each.image_size, vit.patch_size)
            for each in self.forwards(plan)
        )
        return float(total / Fraction(vit.reference_length))

    def uncompressed_sample_cost(self, plan: StepPlan) -> float:
        """Return what a sample would cost with nothing compressed and nothing frozen."""
        whole = Compression()
        learning = tuple(1.0 for _ in plan.layer_rates)
        return self.sample_cost(replace(plan, query=whole, key=self.key_compression(whole), layer_rates=learning))

    def lengths(self, plan: StepPlan) -> tuple[int, int]:
        """Return the sequence lengths of a query's and a key's forward; a method without keys has 0 of them."""
        vit = self.encoder.config
        query, key = (c.sequence_length(vit.image_size, vit.patch_size) for c in (plan.query, plan.key))
        return query, key

    def tokens(self, plan: StepPlan) -> int:
        """Return the tokens that enter backbones for one sample, all forwards together."""
        base = self.encoder.config.patch_size
        return sum(each.compression.sequence_length(each.image_size, base) for each in self.forwards(plan))


def _frozen_share(plan: StepPlan, num_blocks: int) -> Fraction:
    """Return the share of the blocks that lie in the frozen prefix; the embedding is not counted."""
    return Fraction(max(0, plan.frozen_layers - 1), num_blocks)
