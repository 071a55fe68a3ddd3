"""Supervised fine-tuning of a whole encoder, as the published protocols do it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.randaugment import LARGEST
from data.recipes import finetune_views
from data.views import ViewSpec
from pipeline.compression import Compression
from pipeline.distributed import at_least_fp32
from pipeline.methods.base import Batch, Forward, Method, StepOutput
from pipeline.methods.indicators import spread
from pipeline.methods.mixing import Mixing, erased
from pipeline.models.flops import linear_flops
from pipeline.models.momentum import MomentumEncoder
from pipeline.models.vit import ViT
from pipeline.schedules import StepPlan


class Pool(Enum):
    """What of an encoder is classified."""

    # The class token after the encoder's last norm.
    token = "token"
    # The mean of the patches, after a norm of its own.
    mean = "mean"


@dataclass
class FineTuneDeiTConfig:
    """Fine-tuning as MoCo-v3's authors do it, by DeiT's recipe (Touvron et al., 2021), without repeated samples."""

    # As many as the shards have.
    classes: int = 0
    pool: Pool = Pool.token
    # Standard deviation of the classifier's first weights.
    head_std: float = 0.02
    smoothing: float = 0.1
    # Parameters of the beta distributions from which shares are drawn; 0 is off.
    mixup: float = 0.8
    cutmix: float = 1.0
    # Of a sample to lose a rectangle.
    erasing: float = 0.25
    # Magnitude, up to 10; 0 is off.
    randaugment: float = 9.0
    # What an average of the weights keeps of itself in a step; 0 keeps no average.
    average: float = 0.99996
    crop_min: float = 0.08

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ValueError(f"method.classes must be the number of classes of the shards, got {self.classes}.")
        for name in ("smoothing", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"method.{name} must be in [0, 1], got {getattr(self, name):g}; 0 is off.")
        for name in ("mixup", "cutmix", "head_std"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"method.{name} must be at least 0, got {getattr(self, name):g}.")
        if not 0 <= self.randaugment <= LARGEST:
            raise ValueError(f"method.randaugment must be in [0, {LARGEST:g}], got {self.randaugment:g}; 0 is off.")
        if not 0 <= self.average < 1:
            raise ValueError(f"method.average must be in [0, 1), got {self.average:g}; 0 keeps no average.")
        if not 0 < self.crop_min <= 1:
            raise ValueError(f"method.crop_min must be a share of the image in (0, 1], got {self.crop_min:g}.")


@dataclass
class FineTuneMAEConfig(FineTuneDeiTConfig):
    """Fine-tuning as in MAE (He et al., 2022)."""

    pool: Pool = Pool.mean
    head_std: float = 2e-5
    average: float = 0.0


@dataclass
class FineTuneLocalMIMConfig(FineTuneMAEConfig):
    """Fine-tuning as in LocalMIM (Wang et al., 2023) and ViTFreeze: MAE's at other rates."""


class Classifier(nn.Module):
    """A linear layer behind the encoder, in fp32 from its logits on."""

    def __init__(self, encoder: ViT, config: FineTuneDeiTConfig) -> None:
        super().__init__()
        self.pool = config.pool
        self.norm: nn.Module = nn.Identity()
        if config.pool is Pool.mean:
            # Of the encoder's kind, and untrained.
            self.norm = nn.LayerNorm(encoder.embed_dim, eps=encoder.norm.eps)
        self.linear = nn.Linear(encoder.embed_dim, config.classes)
        nn.init.trunc_normal_(self.linear.weight, std=config.head_std)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits [B, C] of pooled features [B, D]."""
        return at_least_fp32(self.linear(self.norm(features)))


class FineTune(Method):
    """Learn classes, encoder and all. Where an average of the weights is kept, it is judged beside them."""

    def __init__(self, config: FineTuneDeiTConfig, encoder: ViT) -> None:
        super().__init__()
        self.config, self.classes = config, config.classes
        self.encoder = encoder
        self.classifier = Classifier(encoder, config)
        if config.pool is Pool.mean:
            # Nothing comes through it.
            encoder.norm.requires_grad_(False)
        self._mixing = Mixing(config.mixup, config.cutmix, config.smoothing, config.classes)
        self.multiple = 2 if self._mixing.mixes else 1
        online = nn.ModuleDict({"encoder": encoder, "classifier": self.classifier})
        # In a tuple, out of nn.Module's sight: the engine must not cast, shard or optimize it.
        self._averages: tuple[MomentumEncoder, ...] = (MomentumEncoder(online),) if config.average else ()

    def views(self) -> Sequence[ViewSpec]:
        """Return one view."""
        return finetune_views(self.encoder.config.image_size, self.config.crop_min, self.config.randaugment)

    def forward(self, batch: Batch, plan: StepPlan) -> StepOutput:
        """Return the cross entropy with the mixed and smoothed labels."""
        (images,) = batch.views
        assert batch.labels is not None
        if self.config.erasing:
            images = erased(images, batch.index, self.encoder.seed, self.config.erasing)
        images, targets = self._mixing(images, batch.labels, self.encoder.seed, plan.progress)
        pooled = self._pooled(self.encoder, images, batch.index, plan.query, plan.frozen_layers, stochastic=True)
        return StepOutput(F.cross_entropy(self.classifier(pooled), targets), spread(pooled))

    def logits(self, images: Tensor, index: Tensor, *, averaged: bool = False) -> Tensor:
        """Return the logits [B, C] of images as in evaluation, by the weights or by their average."""
        whole = Compression()
        if not averaged:
            classified: Tensor = self.classifier(self._pooled(self.encoder, images, index, whole))
            return classified

        def classify(network: nn.Module) -> Tensor:
            assert isinstance(network, nn.ModuleDict)
            pooled = self._pooled(cast(ViT, network["encoder"]), images, index, whole)
            return cast(Tensor, network["classifier"](pooled))

        return self._averages[0](classify)

    def classifier_of(self, *, averaged: bool) -> Classifier:
        """Return the classifier, or its average."""
        if not averaged:
            return self.classifier
        network = self._averages[0].network
        assert isinstance(network, nn.ModuleDict)
        return cast(Classifier, network["classifier"])

    def after_step(self, plan: StepPlan, output: StepOutput) -> None:
        """Move the average towards the stepped weights."""
        for average in self._averages:
            average.update(plan.momentum)

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the average to where the engine computes."""
        for average in self._averages:
            average.to(device, dtype)

    def forwards(self, plan: StepPlan) -> Sequence[Forward]:
        """Return the one pass that learns."""
        return [Forward(self.encoder.config.image_size, plan.query, True)]

    def head_flops(self, plan: StepPlan) -> int:
        """Return those of the classifier."""
        return 3 * linear_flops(self.classifier)

    def lengths(self, plan: StepPlan) -> tuple[int, int]:
        """Return the tokens of the one pass; there are no keys."""
        return self.tokens(plan), 0

    def undecayed(self) -> list[nn.Parameter]:
        """Return class token and positions."""
        positions = [self.encoder.positions] if isinstance(self.encoder.positions, nn.Parameter) else []
        return [self.encoder.class_token, *positions]

    def momentum(self, progress: float) -> float:
        """Return what the average keeps of itself, the same all the time."""
        return self.config.average or 1.0

    def momentum_encoders(self) -> Sequence[MomentumEncoder]:
        """Return the average, if there is one."""
        return self._averages

    def state(self) -> dict[str, Tensor]:
        """Return the average."""
        return self._averages[0].state() if self._averages else {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the average."""
        for average in self._averages:
            average.load(state)

    def _pooled(
        self,
        encoder: ViT,
        images: Tensor,
        index: Tensor,
        compression: Compression,
        frozen_layers: int = 0,
        stochastic: bool = False,
    ) -> Tensor:
        """Return what is classified of images, [B, D]."""
        if self.config.pool is Pool.token:
            features: Tensor = encoder(images, compression, index, frozen_layers=frozen_layers, stochastic=stochastic)
            return features
        last = len(encoder.blocks)
        tokens = encoder.tapped(images, compression, index, [last], frozen_layers=frozen_layers, stochastic=stochastic)[
            last
        ]
        return tokens[:, 1:].mean(1)
