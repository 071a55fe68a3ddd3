"""Linear classification of frozen features, as the published protocols do it, at several learning rates at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn

from pipeline.compression import Compression
from pipeline.distributed import sum_tensor
from pipeline.models.vit import ViT
from pipeline.probes.features import Encode, class_token

# Rates are those of so many samples a step.
REFERENCE_BATCH = 256
# DINO's features of backbones narrower than a ViT-B: the class tokens of so many last blocks.
BLOCKS_OF_SMALL = 4
WIDTH_OF_BASE = 768
# Of the running statistics, and of the variance (MAE).
NORM_MOMENTUM, NORM_EPS = 0.1, 1e-6


class Form(Enum):
    """Whose protocol."""

    moco = "moco"
    dino = "dino"
    mae = "mae"


@dataclass(frozen=True)
class Recipe:
    """What a protocol says: rate for a batch of 256, epochs, and of those to warm up; how images are resized.

    ``judged``: how those are resized on which it is judged.
    """

    rate: float
    epochs: int
    warmup: int
    interpolation: str
    judged: str = "bicubic"
    normalizes: bool = False


# Chen et al., 2021, and the code of MoCo-v3; Caron et al., 2021, and the code of DINO; He et al., 2022, Appendix A.1.
RECIPES = {
    Form.moco: Recipe(3.0, 90, 0, "bilinear", "bilinear"),
    Form.dino: Recipe(0.001, 100, 0, "bilinear"),
    Form.mae: Recipe(0.1, 90, 10, "bicubic", normalizes=True),
}


@dataclass
class LinearConfig:
    """Linear classifiers on frozen features."""

    form: Form = Form.moco
    # 0 are the form's own.
    epochs: int = 0
    batch_size: int = 1024
    # Multiples of the form's own rate: a classifier for each, all trained on the same features.
    rates: list[float] = field(default_factory=lambda: [0.01, 0.03, 0.1, 0.3, 1.0, 3.0])
    # The share of the training set by which the best rate is chosen; no classifier learns from it.
    held_out: float = 0.05

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_size < 1:
            raise ValueError(
                f"linear.epochs must be at least 0 and linear.batch_size at least 1, "
                f"got {self.epochs} and {self.batch_size}; 0 epochs are the form's own."
            )
        if not self.rates or not all(0 < rate < math.inf for rate in self.rates):
            raise ValueError(f"linear.rates must list numbers above 0, got {self.rates}; 1 is the form's own rate.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"linear.held_out must be a share in (0, 1), got {self.held_out:g}; 0.05 is usual.")

    @property
    def recipe(self) -> Recipe:
        """Return what the form says."""
        return RECIPES[self.form]

    @property
    def num_epochs(self) -> int:
        """Return how often the training set is seen."""
        return self.epochs or self.recipe.epochs

    def rate(self, factor: float, progress: float) -> float:
        """Return a classifier's learning rate at a share of the training: MoCo-v3 and DINO keep it for an epoch."""
        recipe, epoch = self.recipe, progress * self.num_epochs
        peak = factor * recipe.rate * self.batch_size / REFERENCE_BATCH
        if epoch < recipe.warmup:
            return peak * epoch / recipe.warmup
        epoch = epoch if recipe.warmup else math.floor(epoch)
        share = (epoch - recipe.warmup) / max(1, self.num_epochs - recipe.warmup)
        return peak * 0.5 * (1 + math.cos(math.pi * share))


def features_of(encoder: ViT, form: Form) -> Encode:
    """Return what a form classifies: the class token, or in DINO's more of it and of the mean patch."""
    if form is not Form.dino:
        return class_token(encoder)
    last = len(encoder.blocks)
    is_base = encoder.embed_dim >= WIDTH_OF_BASE
    blocks = [last] if is_base else list(range(max(1, last - BLOCKS_OF_SMALL + 1), last + 1))

    def encode(images: Tensor, index: Tensor) -> Tensor:
        taps = encoder.tapped(images, Compression(), index, blocks)
        tokens = [encoder.norm(taps[block]) for block in blocks]
        means = [tokens[-1][:, 1:].mean(1)] if is_base else []
        return torch.cat([each[:, 0] for each in tokens] + means, 1)

    return encode


def width_of(encoder: ViT, form: Form) -> int:
    """Return how many numbers `features_of` gives of an image."""
    if form is not Form.dino:
        return encoder.embed_dim
    return encoder.embed_dim * (2 if encoder.embed_dim >= WIDTH_OF_BASE else min(BLOCKS_OF_SMALL, len(encoder.blocks)))


class Classifiers(nn.Module):
    """One linear classifier for each learning rate, on the same features.

    With several processes each holds all of them, and steps by the gradients of the global batch.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, config: LinearConfig, width: int, classes: int, seed: int) -> None:
        """Draw the weights: N(0, 0.01), biases 0."""
        super().__init__()
        self._config = config
        self.heads = nn.ModuleList(nn.Linear(width, classes) for _ in config.rates)
        generator = torch.Generator().manual_seed(seed)
        for head in self.heads:
            assert isinstance(head, nn.Linear)
            nn.init.normal_(head.weight, std=0.01, generator=generator)
            nn.init.zeros_(head.bias)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, features: Tensor) -> list[Tensor]:
        """Return the logits [B, C] of each classifier for features [B, D]."""
        if self._config.recipe.normalizes:
            mean, variance = self._statistics(features) if self.training else (self.mean, self.variance)
            features = (features - mean) * torch.rsqrt(variance + NORM_EPS)
        return [head(features) for head in self.heads]

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the sum over classifiers of this process's part of the global mean loss; labels below 0 do not count.

        Every process must call this.
        """
        counting = sum_tensor((labels >= 0).sum()).clamp_min(1)
        logits = self(features)
        each = [F.cross_entropy(one, labels, ignore_index=-1, reduction="sum") for one in logits]
        return torch.stack(each).sum() / counting

    @torch.no_grad()
    def _statistics(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the global batch, and let the running ones follow."""
        count = sum_tensor(torch.tensor(len(features), device=features.device))
        mean = sum_tensor(features.sum(0)) / count
        variance = sum_tensor((features - mean).square().sum(0)) / count
        self.mean.lerp_(mean, NORM_MOMENTUM)
        self.variance.lerp_(variance * count / (count - 1).clamp_min(1), NORM_MOMENTUM)
        return mean, variance


class Trainer:
    """Steps of all classifiers: SGD with momentum 0.9, or LARS where the protocol says so; no weight decay."""

    def __init__(self, config: LinearConfig, classifiers: Classifiers) -> None:
        self._config, self._classifiers = config, classifiers
        self._optimizer = _optimizer(config, classifiers)

    def step(self, features: Tensor, labels: Tensor, progress: float) -> Tensor:
        """Take a step at a share of the training; return this process's part of the loss."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.rate(group["factor"], progress)
        loss = self._classifiers.loss(features, labels)
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        for parameter in self._classifiers.parameters():
            assert parameter.grad is not None
            parameter.grad = sum_tensor(parameter.grad)
        self._optimizer.step()
        return loss.detach()

    def state(self) -> dict[str, Any]:
        """Return what is learned, and what the optimizer remembers."""
        return {"classifiers": self._classifiers.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self._classifiers.load_state_dict(state["classifiers"])
        self._optimizer.load_state_dict(state["optimizer"])


def _optimizer(config: LinearConfig, classifiers: Classifiers) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = []
    for factor, head in zip(config.rates, classifiers.heads, strict=True):
        assert isinstance(head, nn.Linear)
        # LARS adapts the rate of matrices, not that of biases.
        groups.append({"params": [head.weight], "factor": factor, **_adapts(config, True)})
        groups.append({"params": [head.bias], "factor": factor, **_adapts(config, False)})
    if config.recipe.normalizes:
        lars: torch.optim.Optimizer = Lars(groups, lr=0.0, momentum=0.9)
        return lars
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9)


def _adapts(config: LinearConfig, matrix: bool) -> dict[str, bool]:
    return {"always_adapt": matrix} if config.recipe.normalizes else {}


def best_of(scores: Sequence[float]) -> int:
    """Return the number of the best, the lower rate of equals."""
    return max(range(len(scores)), key=lambda i: (scores[i], -i))
