"""One clock, one plan: everything that changes during a run as a function of the budget spent."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Protocol

from pipeline.compression import Compression, CompressionSchedule
from pipeline.freezing import FreezeSchedule, Times, frozen_prefix

# A rate of exactly zero means frozen, so warm-up starts just above it.
WARMUP_START = 1e-3


class Unit(Enum):
    """What a budget counts."""

    steps = "steps"
    samples = "samples"
    cost = "cost"


@dataclass
class BudgetConfig:
    """How long a run lasts.

    One unit of cost is one forward of the uncompressed reference sequence for one image; a backward counts
    two (Table 1 of Lin et al., 2024).
    """

    # There is no sensible default: a run refuses 0.
    value: float = 0.0
    unit: Unit = Unit.steps


@dataclass(frozen=True)
class Budget:
    """Maps what a run has spent to its progress in [0, 1]."""

    value: float
    unit: Unit

    def progress(self, *, steps: int, samples: int, cost: float) -> float:
        """Return the share of the budget that is spent, at most 1."""
        return min(1.0, self.spent(steps=steps, samples=samples, cost=cost) / self.value)

    def spent(self, *, steps: int, samples: int, cost: float) -> float:
        """Return what was spent, in the budget's own unit."""
        return {Unit.steps: steps, Unit.samples: samples, Unit.cost: cost}[self.unit]


class Shape(Enum):
    """How a learning rate falls to zero after warm-up."""

    cosine = "cosine"
    # 1 - t^2: the only reading of "polynomial, alpha = 2" that keeps the rate above cosine late in a run,
    # which is what Section 6.1 of Lin et al., 2024 wants it for.
    polynomial = "polynomial"


@dataclass
class RateConfig:
    """Learning rate: `base` per 256 samples of the global batch, warmed up, then decayed to zero."""

    base: float = 1.5e-4
    warmup: float = 0.1
    shape: Shape = Shape.cosine
    # The share of the peak that is left at the end of the run; layers that freeze on the way still go to zero.
    final: float = 0.0
    # Each layer learns at this multiple of the rate of the one behind it, the last one of that of the heads.
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.base < math.inf:
            raise ValueError(f"rate.base must be above 0, got {self.base:g}; MoCo-v3 uses 1.5e-4 per 256 samples.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"rate.warmup must be a share of the budget in [0, 1), got {self.warmup:g}.")
        if not 0 <= self.final <= 1:
            raise ValueError(f"rate.final must be a share of the peak in [0, 1], got {self.final:g}.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(
                f"rate.layer_decay must be in (0, 1], got {self.layer_decay:g}; 0.65 to 0.75 are usual in fine-tuning, "
                "1 gives all layers one rate."
            )

    def peak(self, batch_size: int) -> float:
        """Return the rate at the end of warm-up by the linear scaling rule."""
        return self.base * batch_size / 256

    def decay(self, progress: float, end: float = 1.0) -> float:
        """Return the share of the peak rate at `progress` for a clock that stops at `end`.

        `end` is a share of the run after warm-up; from there on the result is exactly zero, or `final` at 1.
        """
        if progress < self.warmup:
            return max(progress / self.warmup, WARMUP_START)
        final = self.final if end >= 1 else 0.0
        elapsed = (progress - self.warmup) / (1 - self.warmup) / end
        if elapsed >= 1:
            return final
        shape = 1 - elapsed**2 if self.shape is Shape.polynomial else 0.5 * (1 + math.cos(math.pi * elapsed))
        return final + (1 - final) * shape


@dataclass(frozen=True)
class StepPlan:
    """Everything a step needs to know about when it happens. Logging it explains the step."""

    progress: float
    learning_rate: float
    weight_decay: float
    momentum: float
    # The learning rate of each layer, first layer first; 0.0 is frozen.
    layer_rates: tuple[float, ...]
    query: Compression = field(default_factory=Compression)
    key: Compression = field(default_factory=Compression)
    # The learning rate of the method's last layer, if it has one that starts later; 0.0 is frozen.
    last_layer_rate: float = 0.0
    # The softmax temperature of a teacher, for methods that have one.
    teacher_temperature: float = 1.0

    @property
    def frozen_layers(self) -> int:
        """Return how many layers, counted from the input, no longer learn."""
        return frozen_prefix(self.layer_rates)


class MethodSchedule(Protocol):
    """What a method itself changes during a run."""

    def momentum(self, progress: float) -> float:
        """Return the momentum of the target network."""

    def teacher_temperature(self, progress: float) -> float:
        """Return the softmax temperature of the teacher."""

    def last_layer_learns(self, progress: float) -> bool:
        """Return whether the last layer has started to learn."""

    def key_compression(self, query: Compression) -> Compression:
        """Return the compression of the key side by the method's own rule, given the query side's."""


class WeightDecay(Protocol):
    """Progress -> decoupled weight decay."""

    def __call__(self, progress: float) -> float:
        """Return the weight decay of the step that starts at `progress`."""


@dataclass(frozen=True)
class Schedules:
    """All schedules of a run; `at` is pure, so nothing here is ever checkpointed."""

    rate: RateConfig
    peak_rate: float
    weight_decay: WeightDecay
    compression: CompressionSchedule
    freeze: FreezeSchedule
    num_layers: int
    method: MethodSchedule
    # From when on the model has seen images in its own patches and without dropout; infinite for never.
    whole_from: float = 0.0

    @cached_property
    def freeze_times(self) -> Times:
        """Return when each layer freezes, as a share of the run after warm-up; None is never.

        Raises:
            ValueError: layers that are to see whole images for longer than there are any.
        """
        warmup = self.rate.warmup
        return self.freeze.freeze_times(self.num_layers, max(0.0, (self.whole_from - warmup) / (1 - warmup)))

    def at(self, progress: float) -> StepPlan:
        """Return the plan of the step that starts at `progress` in [0, 1]."""
        query = self.compression.at(progress)
        warming_up = progress < self.rate.warmup
        factors = self.freeze.rates(progress, self.freeze_times, self.rate.decay, warming_up=warming_up)
        peaks = (self.peak_rate * self.rate.layer_decay ** (self.num_layers - i) for i in range(self.num_layers))
        learning_rate = self.peak_rate * self.rate.decay(progress)
        return StepPlan(
            progress=progress,
            learning_rate=learning_rate,
            weight_decay=self.weight_decay(progress),
            momentum=self.method.momentum(progress),
            layer_rates=tuple(peak * factor for peak, factor in zip(peaks, factors, strict=True)),
            query=query,
            key=self.compression.key_at(progress, self.method.key_compression(query)),
            last_layer_rate=learning_rate if self.method.last_layer_learns(progress) else 0.0,
            teacher_temperature=self.method.teacher_temperature(progress),
        )

    def changes(self) -> list[float]:
        """Return every progress at which the shape of a step changes, in order, without 0 and 1."""
        return sorted(p for p in {*self.compression.changes(), *self.freezes()} if 0 < p < 1)

    def freezes(self) -> list[float]:
        """Return the progress at which each layer that ever freezes does, first layer first."""
        warmup = self.rate.warmup
        return [warmup + (1 - warmup) * t for t in self.freeze_times if t is not None]
