"""SimCLR for Vision Transformers: both views through one network, every other sample a negative."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from data.recipes import simclr_views
from data.views import ViewSpec
from pipeline.losses import nt_xent
from pipeline.methods.base import Batch, Forward, Message, Method, StepOutput
from pipeline.methods.indicators import spread
from pipeline.methods.multicrop import encode
from pipeline.models.flops import linear_flops
from pipeline.models.heads import batch_statistics, mlp_head
from pipeline.models.initialization import initialize_as_moco_v3
from pipeline.models.vit import ViT
from pipeline.schedules import StepPlan


@dataclass
class SimCLRConfig:
    """SimCLR (Chen et al., 2020) as MoCo-v3's authors train it on ViTs.

    Lin et al., 2024 disclose neither temperature nor head nor rate; these are of the recipe that reproduces the
    SimCLR-ViT row of the MoCo-v3 paper.
    """

    temperature: float = 0.1
    out_dim: int = 256
    hidden_dim: int = 4096
    # Both views are anchors; without, only the first is. Both learn in either case, and the cost is the same.
    symmetric: bool = True
    freeze_patch_projection: bool = True
    crop_min: float = 0.08

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"method.temperature must be above 0, got {self.temperature:g}; 0.1 is usual.")
        if min(self.out_dim, self.hidden_dim) < 1:
            raise ValueError(
                f"method.out_dim and method.hidden_dim must be at least 1, got {self.out_dim} and {self.hidden_dim}."
            )
        if not 0 < self.crop_min <= 1:
            raise ValueError(f"method.crop_min must be a share of the image in (0, 1], got {self.crop_min:g}.")


class SimCLR(Method):
    """Contrast two views of one distribution; token dropout and patch scaling apply to both."""

    whole_batch = "its negatives and its head's batch statistics are those of the whole batch"

    def __init__(self, config: SimCLRConfig, encoder: ViT) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        if not encoder.config.weights:
            initialize_as_moco_v3(encoder)
        if config.freeze_patch_projection:
            encoder.patch.requires_grad_(False)
        self.projector = mlp_head(3, encoder.embed_dim, config.hidden_dim, config.out_dim, last_scale=True)

    def views(self) -> Sequence[ViewSpec]:
        """Return two views of one distribution."""
        return simclr_views(self.encoder.config.image_size, self.config.crop_min)

    def forward(self, batch: Batch, plan: StepPlan) -> StepOutput:
        """Return the contrastive loss, the mean over the anchors."""
        features = self._features(batch, plan)
        one, two = (self.projector(features[view]) for view in (0, 1))
        loss = nt_xent(one, two, self.config.temperature, symmetric=self.config.symmetric)
        return StepOutput(loss, spread(features[0]))

    def forwards(self, plan: StepPlan) -> Sequence[Forward]:
        """Return two views that learn."""
        size = self.encoder.config.image_size
        return [Forward(size, plan.query, True), Forward(size, plan.key, True)]

    def head_flops(self, plan: StepPlan) -> int:
        """Return those of the projector, through which both views go."""
        return 2 * 3 * linear_flops(self.projector)

    def messages(self, samples: int) -> Sequence[Message]:
        """Return batch statistics and outputs of both views, all of which learn."""
        numbers = [*batch_statistics(self.projector), samples * self.config.out_dim]
        return [Message(each, learns=True) for each in numbers] * 2

    def _features(self, batch: Batch, plan: StepPlan) -> dict[int, Tensor]:
        sides = {0: plan.query, 1: plan.key}
        return encode(self.encoder, batch, sides, frozen_layers=plan.frozen_layers, stochastic=True)
