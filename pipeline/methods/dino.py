"""DINO: a student with small and large crops against a momentum teacher with large ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from data.recipes import dino_views
from data.views import ViewSpec
from pipeline.compression import Compression, PatchScaling
from pipeline.distributed import at_least_fp32, mean_over_ranks
from pipeline.losses import centered_softmax, distillation
from pipeline.methods.base import Batch, Forward, Message, Method, StepOutput
from pipeline.methods.indicators import entropy_ratio, spread
from pipeline.methods.multicrop import Group, encode, encode_prefix
from pipeline.models.flops import linear_flops
from pipeline.models.heads import PrototypeHead, batch_statistics
from pipeline.models.initialization import initialize_as_dino
from pipeline.models.momentum import MomentumEncoder
from pipeline.models.vit import Known, ViT
from pipeline.schedules import StepPlan

LARGE: tuple[int, ...] = (0, 1)


@dataclass
class DINOConfig:
    """DINO (Caron et al., 2021); defaults are those of its code unless a comment says otherwise."""

    out_dim: int = 65536
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    # Unit-norm prototypes; the reference recommends it for ViT-B and larger.
    norm_last_layer: bool = True
    # Batch norm in the head, an option of the reference that is off there.
    head_batch_norm: bool = False
    # The share of the budget during which the prototypes wait: one of 100 epochs.
    last_layer_start: float = 0.01
    student_temperature: float = 0.1
    # The warm-up that the authors' longer runs use: 0.04 -> 0.07 over the first 30 of 300 epochs.
    teacher_temperature: float = 0.07
    teacher_temperature_start: float = 0.04
    teacher_warmup: float = 0.1
    momentum: float = 0.996
    center_momentum: float = 0.9
    # One large crop is the student's and the other the teacher's, which is how Table 1 of Lin et al., 2024 counts; the
    # original gives both to both.
    symmetric: bool = False
    small_crops: int = 8
    small_size: int = 96
    large_scale: list[float] = field(default_factory=lambda: [0.4, 1.0])
    small_scale: list[float] = field(default_factory=lambda: [0.05, 0.4])

    def __post_init__(self) -> None:
        for name in ("student_temperature", "teacher_temperature", "teacher_temperature_start"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"method.{name} must be above 0, got {getattr(self, name):g}.")
        for name in ("momentum", "center_momentum", "last_layer_start", "teacher_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"method.{name} must be in [0, 1], got {getattr(self, name):g}.")
        for name in ("out_dim", "hidden_dim", "bottleneck_dim", "small_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"method.{name} must be at least 1, got {getattr(self, name)}.")
        if self.small_crops < 0:
            raise ValueError(f"method.small_crops must not be negative, got {self.small_crops}; 0 does without.")
        for name in ("large_scale", "small_scale"):
            scale = getattr(self, name)
            if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
                raise ValueError(f"method.{name} must be two rising shares of the image in (0, 1], got {scale}.")


class DINO(Method):
    """Distill a momentum teacher, centered and sharpened, into a student that sees other crops of the same image.

    Only the student's large crops are compressed: dropout on the student's side, patch scaling on both; small crops
    keep the backbone's own patches (Section 6.4 of Lin et al., 2024).
    """

    def __init__(self, config: DINOConfig, encoder: ViT) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        if config.small_crops and config.small_size % encoder.config.patch_size:
            raise ValueError(
                f"method.small_size must be a multiple of model.patch_size={encoder.config.patch_size}, "
                f"got {config.small_size}; small crops keep the model's own patches."
            )
        if config.small_crops and config.small_size > encoder.config.image_size:
            raise ValueError(
                f"method.small_size must not be above model.image_size={encoder.config.image_size}, "
                f"got {config.small_size}; 3/7 of it is usual, and method.small_crops=0 does without."
            )
        if not encoder.config.weights:
            initialize_as_dino(encoder)
        self.head = PrototypeHead(
            encoder.embed_dim,
            config.hidden_dim,
            config.bottleneck_dim,
            config.out_dim,
            unit_norm=config.norm_last_layer,
            batch_norm=config.head_batch_norm,
        )
        # In a tuple, out of nn.Module's sight: the engine must not cast, shard or optimize it.
        self._teacher = (MomentumEncoder(nn.ModuleDict({"encoder": encoder, "head": self.head})),)
        self._center = torch.zeros(config.out_dim)
        self._queries = LARGE if config.symmetric else LARGE[:1]
        self._keys = LARGE if config.symmetric else LARGE[1:]
        self._small = range(len(LARGE), len(LARGE) + config.small_crops)
        if config.head_batch_norm:
            self.whole_batch = "its head's batch statistics are those of the whole batch"

    def views(self) -> Sequence[ViewSpec]:
        """Return two large crops, then the small ones."""
        config = self.config
        large, small = ((scale[0], scale[1]) for scale in (config.large_scale, config.small_scale))
        return dino_views(self.encoder.config.image_size, config.small_size, config.small_crops, large, small)

    def forward(self, batch: Batch, plan: StepPlan) -> StepOutput:
        """Return the cross entropy, the mean over pairs of a teacher's and another student's crop."""
        prefix = self._shared_prefix(batch, plan)
        logits = self._teach(batch, plan, prefix)
        targets = {k: centered_softmax(each, self._center, plan.teacher_temperature) for k, each in logits.items()}
        features = self._features(batch, plan, prefix)
        outputs = self.head(torch.cat(list(features.values()))).chunk(len(features))
        students = dict(zip(features, outputs, strict=True))
        loss = distillation(students, targets, self.config.student_temperature)
        metrics = spread(features[self._queries[0]])
        metrics |= self._entropies(targets[self._keys[0]])
        center = mean_over_ranks(torch.cat([at_least_fp32(each) for each in logits.values()]).mean(0))
        return StepOutput(loss, metrics, {"center": center})

    def after_step(self, plan: StepPlan, output: StepOutput) -> None:
        """Move the teacher towards the stepped student, and the center towards the batch's mean logits."""
        self._teacher[0].update(plan.momentum)
        self._center.lerp_(output.pending["center"].to(self._center.dtype), 1 - self.config.center_momentum)

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move teacher and center to where the engine computes."""
        self._teacher[0].to(device, dtype)
        self._center = self._center.to(device)

    def forwards(self, plan: StepPlan) -> Sequence[Forward]:
        """Return the student's large and small crops, which learn, and the teacher's."""
        large, small = self.encoder.config.image_size, self.config.small_size
        return [
            *[Forward(large, plan.query, True)] * len(self._queries),
            *[Forward(small, Compression(), True)] * len(self._small),
            *[Forward(large, plan.key, False)] * len(self._keys),
        ]

    def head_flops(self, plan: StepPlan) -> int:
        """Return those of the student's head, whose prototypes may still wait, and of the teacher's."""
        mlp = linear_flops(self.head.mlp)
        prototypes = 2 * self.config.bottleneck_dim * self.config.out_dim
        students, teachers = len(self._queries) + len(self._small), len(self._keys)
        learning = 3 if plan.last_layer_rate > 0 else 2
        return students * (3 * mlp + learning * prototypes) + teachers * (mlp + prototypes)

    def messages(self, samples: int) -> Sequence[Message]:
        """Return the center, and the batch statistics of both heads if there are any."""
        statistics = batch_statistics(self.head)
        students = [Message(numbers, learns=True) for numbers in statistics]
        return [*students, *map(Message, statistics), Message(self.config.out_dim, gathered=False)]

    def shared_layers(self, plan: StepPlan) -> int:
        """Return the layers that rest in student and teacher, where both see the same large crops."""
        if not plan.frozen_layers or self._queries != self._keys or plan.query != plan.key:
            return 0
        return self._teacher[0].shared_layers(self.encoder.layers()[: plan.frozen_layers])

    def last_layer(self) -> list[nn.Parameter]:
        """Return the prototypes."""
        return list(self.head.prototypes.parameters())

    @property
    def representation(self) -> ViT:
        """Return the teacher's backbone, which the reference evaluates."""
        network = self._teacher[0].network
        assert isinstance(network, nn.ModuleDict)
        return cast(ViT, network["encoder"])

    def momentum(self, progress: float) -> float:
        """Return a cosine from the configured momentum to 1."""
        return 1 - 0.5 * (1 + math.cos(math.pi * progress)) * (1 - self.config.momentum)

    def teacher_temperature(self, progress: float) -> float:
        """Return a line from the first temperature to the last over the warm-up, then the last."""
        config = self.config
        done = min(1.0, progress / config.teacher_warmup) if config.teacher_warmup else 1.0
        return config.teacher_temperature_start + done * (config.teacher_temperature - config.teacher_temperature_start)

    def last_layer_learns(self, progress: float) -> bool:
        """Return whether the prototypes have waited long enough."""
        return progress >= self.config.last_layer_start

    def key_compression(self, query: Compression) -> Compression:
        """Return the query's patch size without its dropout: the teacher sees every token."""
        return query.only(PatchScaling)

    def momentum_encoders(self) -> Sequence[MomentumEncoder]:
        """Return the one there is."""
        return self._teacher

    def state(self) -> dict[str, Tensor]:
        """Return teacher and center."""
        return {**self._teacher[0].state(), "center": self._center}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore teacher and center."""
        self._center.copy_(state["center"])
        self._teacher[0].load({name: each for name, each in state.items() if name != "center"})

    @staticmethod
    def _entropies(target: Tensor) -> dict[str, Tensor]:
        # A teacher collapses in one of two ways: it says nothing, or it says one thing of every image.
        return {
            "teacher_entropy_ratio": entropy_ratio(target),
            "prototype_entropy_ratio": entropy_ratio(target.mean(0, keepdim=True)),
        }

    def _shared_prefix(self, batch: Batch, plan: StepPlan) -> dict[Group, Known]:
        """Return the first layers' outputs for large crops where the teacher would only compute them again."""
        return encode_prefix(self.encoder, batch, dict.fromkeys(self._keys, plan.key), self.shared_layers(plan))

    def _features(self, batch: Batch, plan: StepPlan, prefix: dict[Group, Known]) -> dict[int, Tensor]:
        crops = dict.fromkeys(self._queries, plan.query) | {s: Compression() for s in self._small}
        return encode(self.encoder, batch, crops, frozen_layers=plan.frozen_layers, stochastic=True, prefix=prefix)

    def _teach(self, batch: Batch, plan: StepPlan, prefix: dict[Group, Known]) -> dict[int, Tensor]:
        keys = dict.fromkeys(self._keys, plan.key)

        def project(network: nn.Module) -> dict[int, Tensor]:
            assert isinstance(network, nn.ModuleDict)
            features = encode(cast(ViT, network["encoder"]), batch, keys, prefix=prefix)
            # As the student's: batch norm is over all crops.
            logits = network["head"](torch.cat(list(features.values()))).chunk(len(features))
            return dict(zip(features, logits, strict=True))

        return self._teacher[0](project)
