"""MoCo-v3 for Vision Transformers, with the compressed query of paper A."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from data.recipes import moco_views
from data.views import ViewSpec
from pipeline.compression import Compression, PatchScaling
from pipeline.distributed import at_least_fp32
from pipeline.losses import info_nce
from pipeline.methods.base import Batch, Method, StepOutput, frozen_share
from pipeline.models.heads import mlp_head
from pipeline.models.initialization import initialize_as_moco_v3
from pipeline.models.momentum import MomentumEncoder
from pipeline.models.vit import ViT
from pipeline.schedules import StepPlan


@dataclass
class MoCoConfig:
    """MoCo-v3 (Chen et al., 2021); defaults are those of its ViT recipe unless a comment says otherwise."""

    temperature: float = 0.2
    momentum: float = 0.99
    out_dim: int = 256
    hidden_dim: int = 4096
    # One pair a sample (view 1 is the query, view 2 the key), as in Section 6.1 of Lin et al., 2024; the
    # original has both pairs.
    symmetric: bool = False
    # A fixed random patch projection keeps the training of ViTs stable (Section 4.2 of Chen et al., 2021).
    freeze_patch_projection: bool = True
    crop_min: float = 0.08

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"method.temperature must be above 0, got {self.temperature:g}; MoCo-v3 uses 0.2.")
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"method.momentum must be in [0, 1], got {self.momentum:g}; MoCo-v3 uses 0.99.")
        if min(self.out_dim, self.hidden_dim) < 1:
            raise ValueError(
                f"method.out_dim and method.hidden_dim must be at least 1, got {self.out_dim} and {self.hidden_dim}."
            )
        if not 0 < self.crop_min <= 1:
            raise ValueError(f"method.crop_min must be a share of the image in (0, 1], got {self.crop_min:g}.")


class MoCo(Method):
    """Contrast a query encoder with predictor against a momentum encoder of the other view.

    The momentum encoder moves in `after_step`, which is the same order of events as in the reference, where
    it moves between the two forwards: keys always come from an average that has seen the current weights.
    """

    def __init__(self, config: MoCoConfig, encoder: ViT) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        initialize_as_moco_v3(encoder)
        if config.freeze_patch_projection:
            encoder.patch.requires_grad_(False)
        head = partial(mlp_head, hidden_dim=config.hidden_dim, out_dim=config.out_dim)
        self.projector = head(3, encoder.embed_dim)
        self.predictor = head(2, config.out_dim)
        # In a tuple, out of nn.Module's sight: the engine must not cast, shard or optimize it.
        online = nn.ModuleDict({"encoder": encoder, "projector": self.projector})
        self._target = (MomentumEncoder(online),)

    def views(self) -> Sequence[ViewSpec]:
        """Return MoCo-v3's two asymmetric views."""
        return moco_views(self.encoder.config.image_size, self.config.crop_min)

    def forward(self, batch: Batch, plan: StepPlan) -> StepOutput:
        """Return the contrastive loss, summed over the pairs."""
        pairs = [(0, 1), (1, 0)] if self.config.symmetric else [(0, 1)]
        queries = [self._query(batch, plan, q) for q, _ in pairs]
        keys = [self._key(batch, plan, k) for _, k in pairs]
        losses = [info_nce(q, k, self.config.temperature) for q, k in zip(queries, keys, strict=True)]
        return StepOutput(torch.stack(losses).sum(), {"feature_std": feature_std(queries[0])})

    def after_step(self, plan: StepPlan, output: StepOutput) -> None:
        """Move the momentum encoder towards the stepped weights."""
        self._target[0].update(plan.momentum)

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the momentum encoder to where the engine computes."""
        self._target[0].to(device, dtype)

    def momentum(self, progress: float) -> float:
        """Return a cosine from the configured momentum to 1."""
        return 1 - 0.5 * (1 + math.cos(math.pi * progress)) * (1 - self.config.momentum)

    def key_compression(self, query: Compression) -> Compression:
        """Return the query's patch size without its dropout: keys see every token."""
        return query.only(PatchScaling)

    def sample_cost(self, plan: StepPlan) -> float:
        """Return ((3 - 2 phi) L_q + L_k) / L_base per pair, phi the frozen share of the blocks."""
        query, key = self._lengths(plan)
        phi = frozen_share(plan, len(self.encoder.blocks))
        return float(self._pairs() * ((3 - 2 * phi) * query + key) / self.encoder.config.reference_length)

    def nominal_sample_cost(self, plan: StepPlan) -> float:
        """Return (3 L_q + L_k) / L_base per pair, Table 1 of Lin et al., 2024."""
        size = (self.encoder.config.image_size, self.encoder.config.patch_size)
        total = 3 * plan.query.nominal_length(*size) + plan.key.nominal_length(*size)
        return float(self._pairs() * total / self.encoder.config.reference_length)

    def tokens(self, plan: StepPlan) -> int:
        """Return the tokens of query and key forwards for one sample."""
        return self._pairs() * sum(self._lengths(plan))

    def state(self) -> dict[str, Tensor]:
        """Return the momentum encoder."""
        return self._target[0].state()

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the momentum encoder."""
        self._target[0].load(state)

    def _pairs(self) -> int:
        return 2 if self.config.symmetric else 1

    def _lengths(self, plan: StepPlan) -> tuple[int, int]:
        size = (self.encoder.config.image_size, self.encoder.config.patch_size)
        return plan.query.sequence_length(*size), plan.key.sequence_length(*size)

    def _query(self, batch: Batch, plan: StepPlan, view: int) -> Tensor:
        features = self.encoder(batch.views[view], plan.query, batch.index, view, plan.frozen_layers)
        projected: Tensor = self.predictor(self.projector(features))
        return projected

    def _key(self, batch: Batch, plan: StepPlan, view: int) -> Tensor:
        def encode(network: nn.Module) -> Tensor:
            assert isinstance(network, nn.ModuleDict)
            features = network["encoder"](batch.views[view], plan.key, batch.index, view)
            projected: Tensor = network["projector"](features)
            return projected

        keys: Tensor = self._target[0](encode)
        return keys


def feature_std(features: Tensor) -> Tensor:
    """Return the mean standard deviation of normalized features times sqrt(D): 1 is spread, 0 is collapse."""
    unit = nn.functional.normalize(at_least_fp32(features.detach()), dim=1)
    spread: Tensor = unit.std(0, correction=0).mean() * features.shape[1] ** 0.5
    return spread
