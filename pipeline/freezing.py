"""Which layers still learn, and how fast: one rate per layer as a function of progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

Decay = Callable[[float, float], float]
"""(progress, end) -> share of the base rate: warm-up, then decay to zero where the clock reaches `end`.

`end` is a share of the post-warm-up part of the run; 1.0 is the end of the run.
"""


class Curve(Enum):
    """How freeze times are spread over the layers: t -> t, t^2 or t^3."""

    linear = 1
    square = 2
    cubic = 3


@dataclass
class FreezeSchedule:
    """Progress -> one learning-rate factor per layer; 0.0 means frozen. Stateless."""

    def rates(self, progress: float, num_layers: int, decay: Decay) -> tuple[float, ...]:
        """Return the factor of the base learning rate of every layer, first layer first."""
        raise NotImplementedError

    def freeze_times(self, num_layers: int) -> tuple[float | None, ...]:
        """Return when each layer freezes, as a share of the run after warm-up; None is never."""
        raise NotImplementedError


@dataclass
class NoFreeze(FreezeSchedule):
    """Every layer follows the global rate to the end."""

    def rates(self, progress: float, num_layers: int, decay: Decay) -> tuple[float, ...]:
        """Return the global factor for each layer."""
        return (decay(progress, 1.0),) * num_layers

    def freeze_times(self, num_layers: int) -> tuple[float | None, ...]:
        """Return None for each layer."""
        return (None,) * num_layers


@dataclass
class FreezeOut(FreezeSchedule):
    """Freeze layers from the input on, each with a decay of its own (Brock et al., 2017).

    Layer i of n + 1 freezes at t_i = (t0 + (1 - t0) i / n) ^ curve of the run after warm-up, so the last
    one never does. Scaled rates start at 1 / t_i of the base rate; the warm-up ends at the layer's own rate.
    """

    t0: float = 0.8
    curve: Curve = Curve.cubic
    # Unscaled by default: the scaling nearly doubles the rate of the first layers, where contrastive
    # pre-training of ViTs is least stable.
    scaled: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.t0 <= 1:
            raise ValueError(f"freeze.t0 must be in (0, 1], got {self.t0}; 1 freezes nothing, 0.8 is usual.")

    def freeze_times(self, num_layers: int) -> tuple[float | None, ...]:
        """Return t_i of each layer, None where it is the end of the run."""
        return tuple(t if t < 1 else None for t in self._times(num_layers))

    def rates(self, progress: float, num_layers: int, decay: Decay) -> tuple[float, ...]:
        """Return each layer's own decay, times 1 / t_i if scaled."""
        return tuple(decay(progress, t) * (1 / t if self.scaled else 1.0) for t in self._times(num_layers))

    def _times(self, num_layers: int) -> list[float]:
        last = max(1, num_layers - 1)
        # Written from the end, so that the last is 1 to the bit.
        return [(1 - (1 - self.t0) * (last - i) / last) ** self.curve.value for i in range(num_layers)]


def frozen_prefix(rates: tuple[float, ...]) -> int:
    """Return the number of leading layers whose rate is zero."""
    for i, rate in enumerate(rates):
        if rate > 0:
            return i
    return len(rates)
