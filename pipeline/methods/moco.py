"""MoCo-v3 for Vision Transformers, with the compressed query of paper A."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from data.recipes import moco_views
from data.views import ViewSpec
from pipeline.compression import Compression, PatchScaling
from pipeline.losses import info_nce
from pipeline.methods.base import Batch, Forward, Message, Method, StepOutput
from pipeline.methods.indicators import spread
from pipeline.methods.multicrop import Group, encode, encode_prefix
from pipeline.models.flops import linear_flops
from pipeline.models.heads import batch_statistics, mlp_head
from pipeline.models.initialization import initialize_as_moco_v3
from pipeline.models.momentum import MomentumEncoder
from pipeline.models.vit import Known, ViT
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
        if not 0 < self.temperature < math.inf:
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

    whole_batch = "its negatives and its heads' batch statistics are those of the whole batch"

    def __init__(self, config: MoCoConfig, encoder: ViT) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        if not encoder.config.weights:
            initialize_as_moco_v3(encoder)
        if config.freeze_patch_projection:
            encoder.patch.requires_grad_(False)
        head = partial(mlp_head, hidden_dim=config.hidden_dim, out_dim=config.out_dim)
        self.projector = head(3, encoder.embed_dim)
        self.predictor = head(2, config.out_dim)
        # In a tuple, out of nn.Module's sight: the engine must not cast, shard or optimize it.
        online = nn.ModuleDict({"encoder": encoder, "projector": self.projector})
        self._target = (MomentumEncoder(online),)
        self._pairs = [(0, 1), (1, 0)] if config.symmetric else [(0, 1)]

    def views(self) -> Sequence[ViewSpec]:
        """Return MoCo-v3's two asymmetric views."""
        return moco_views(self.encoder.config.image_size, self.config.crop_min)

    def forward(self, batch: Batch, plan: StepPlan) -> StepOutput:
        """Return the contrastive loss, summed over the pairs."""
        prefix = self._shared_prefix(batch, plan)
        queries, keys = self._features(batch, plan, prefix), self._keys(batch, plan, prefix)
        # Head by head: each view has batch statistics of its own.
        losses = [
            info_nce(self.predictor(self.projector(queries[q])), keys[k], self.config.temperature)
            for q, k in self._pairs
        ]
        return StepOutput(torch.stack(losses).sum(), spread(queries[0]))

    def after_step(self, plan: StepPlan, output: StepOutput) -> None:
        """Move the momentum encoder towards the stepped weights."""
        self._target[0].update(plan.momentum)

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the momentum encoder to where the engine computes."""
        self._target[0].to(device, dtype)

    def forwards(self, plan: StepPlan) -> Sequence[Forward]:
        """Return a query that learns and a key that does not, for each pair."""
        size = self.encoder.config.image_size
        return [Forward(size, plan.query, True), Forward(size, plan.key, False)] * len(self._pairs)

    def head_flops(self, plan: StepPlan) -> int:
        """Return those of projector and predictor, which learn, and of the momentum encoder's projector."""
        return len(self._pairs) * (4 * linear_flops(self.projector) + 3 * linear_flops(self.predictor))

    def messages(self, samples: int) -> Sequence[Message]:
        """Return the batch statistics of all heads, and the keys."""
        projector, predictor = batch_statistics(self.projector), batch_statistics(self.predictor)
        learning = [Message(numbers, learns=True) for numbers in (*projector, *predictor)]
        keys = [Message(samples * self.config.out_dim), *map(Message, projector)]
        return [*learning, *keys] * len(self._pairs)

    def shared_layers(self, plan: StepPlan) -> int:
        """Return the layers that rest in both encoders, where both see the same."""
        queries, keys = self._views(plan)
        if not plan.frozen_layers or queries != keys:
            return 0
        return self._target[0].shared_layers(self.encoder.layers()[: plan.frozen_layers])

    def momentum(self, progress: float) -> float:
        """Return a cosine from the configured momentum to 1."""
        return 1 - 0.5 * (1 + math.cos(math.pi * progress)) * (1 - self.config.momentum)

    def key_compression(self, query: Compression) -> Compression:
        """Return the query's patch size without its dropout: keys see every token."""
        return query.only(PatchScaling)

    def momentum_encoders(self) -> Sequence[MomentumEncoder]:
        """Return the one there is."""
        return self._target

    def state(self) -> dict[str, Tensor]:
        """Return the momentum encoder."""
        return self._target[0].state()

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the momentum encoder."""
        self._target[0].load(state)

    def _views(self, plan: StepPlan) -> tuple[dict[int, Compression], dict[int, Compression]]:
        """Return the compression of each query and each key."""
        return {q: plan.query for q, _ in self._pairs}, {k: plan.key for _, k in self._pairs}

    def _shared_prefix(self, batch: Batch, plan: StepPlan) -> dict[Group, Known]:
        """Return the first layers' outputs where the momentum encoder would only compute them again."""
        queries, _ = self._views(plan)
        return encode_prefix(self.encoder, batch, queries, self.shared_layers(plan))

    def _features(self, batch: Batch, plan: StepPlan, prefix: dict[Group, Known]) -> dict[int, Tensor]:
        queries, _ = self._views(plan)
        return encode(self.encoder, batch, queries, frozen_layers=plan.frozen_layers, stochastic=True, prefix=prefix)

    def _keys(self, batch: Batch, plan: StepPlan, prefix: dict[Group, Known]) -> dict[int, Tensor]:
        _, keys = self._views(plan)

        def project(network: nn.Module) -> dict[int, Tensor]:
            assert isinstance(network, nn.ModuleDict)
            features = encode(cast(ViT, network["encoder"]), batch, keys, prefix=prefix)
            return {view: network["projector"](each) for view, each in features.items()}

        return self._target[0](project)
